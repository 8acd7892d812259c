"""How threads of PyTorch and NumPy wait for work. Standard library only: it is read when they are imported."""

from __future__ import annotations

import os

_ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_THREAD_TIMEOUT": "4"}
"""OpenMP's threads are PyTorch's, OpenBLAS's are NumPy's: those sleep after 2**4 cycles, by default after 2**26."""


def wait_asleep() -> None:
    """Let threads sleep between operators, unless the user has set how they wait.

    They spin by default. Beside other load that costs the processor more than the work itself: ``deploy
    scconv_resnet20`` on two busy cores took 1.5 times the processor time, and 1.3 to 2.4 times as long. An inner
    product of 800,000 numbers in NumPy took 162 ms, 1.4 ms with threads that sleep.
    """
    for name, value in _ASLEEP.items():
        os.environ.setdefault(name, value)
