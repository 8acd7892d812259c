"""How PyTorch's threads wait for each other. Standard library only: OpenMP reads it when torch is imported."""

from __future__ import annotations

import os

_POLICY = "OMP_WAIT_POLICY"


def wait_asleep() -> None:
    """Let OpenMP's threads sleep between operators, unless the user has set how they wait.

    They spin by default. Beside other load that costs the processor more than the work itself: ``deploy
    scconv_resnet20`` on two busy cores took 1.5 times the processor time, and 1.3 to 2.4 times as long.
    """
    os.environ.setdefault(_POLICY, "PASSIVE")
