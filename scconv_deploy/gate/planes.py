"""Reshapes between gate inputs of any rank and the operator's ``[N, C, H, W]``.

The groups lie over the flattened ``C * D * H * W``, and gamma and beta are one number a channel, so an SRU of a volume
``[N, C, D, H, W]`` is that of ``[N, C, D*H, W]``, and one of a signal ``[N, C, L]`` that of ``[N, C, 1, L]``. Neither
moves an element. So there is one operator, one function body and one kernel for every rank, and a graph reshapes
before and after it.
"""

from __future__ import annotations

from torch import Tensor

RANKS = range(2, 9)
"""Ranks that :func:`as_planes` takes: ``[N, C]`` up to six axes behind the channels."""


def as_planes(x: Tensor) -> Tensor:
    """Reshape ``[N, C, *]`` to ``[N, C, H, W]``; an input of rank 4 is returned unchanged."""
    if x.dim() == 2:
        return x.unsqueeze(2).unsqueeze(3)
    if x.dim() == 3:
        return x.unsqueeze(2)
    return x if x.dim() == 4 else x.flatten(2, -2)


def from_planes(y: Tensor, like: Tensor) -> Tensor:
    """Reshape ``[N, C, H, W]`` back to the shape of ``like``, the input of :func:`as_planes`."""
    if like.dim() == 2:
        return y.squeeze(3).squeeze(2)
    if like.dim() == 3:
        return y.squeeze(2)
    return y if like.dim() == 4 else y.reshape(like.shape)
