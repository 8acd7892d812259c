"""What dispatch modes share: their base, and the tensors among an operator's arguments and results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class EagerMode(TorchDispatchMode):
    """Dispatch mode of runs that nothing compiles."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: it would import torch._dynamo, seconds of time."""
        return False


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """Tensors in values and in lists and tuples of them; an operator's schema holds nothing deeper.

    torch's pytree takes ten times as long, which is a fifth of a run under a dispatch mode.
    """
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(*value)
