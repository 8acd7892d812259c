"""AveragePool and MaxPool for ``onnx.reference``, all windows at once: its own visit them one by one in Python.

``onnx.reference`` takes 20 us a window, over a second for a small network and minutes for a real one. Here each place
of the kernel is one strided slice, and slices are added (in float64) or compared.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_max_pool


class AveragePool(OpRun):
    """ONNX's AveragePool ``[N, C, *sizes]`` of any opset."""

    def _run(
        self,
        x: np.ndarray,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        count_include_pad: int | None = None,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] = (),
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[np.ndarray]:
        windows = _Windows(x.shape[2:], auto_pad, ceil_mode, dilations, kernel_shape, pads, strides)
        total = functools.reduce(np.add, windows.slices(x.astype(np.float64), 0.0))
        inside = np.ones((1, 1, *x.shape[2:]))
        count = functools.reduce(np.add, windows.slices(inside, 0.0, padding=float(bool(count_include_pad))))
        return ((total / count).astype(x.dtype),)


class MaxPool(op_max_pool.MaxPool):
    """ONNX's MaxPool ``[N, C, *sizes]``; indices, if they are wanted, are those of ``onnx.reference``."""

    def _run(  # type: ignore[override]  # a common base's has other arguments
        self,
        x: np.ndarray,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] = (),
        pads: Sequence[int] | None = None,
        storage_order: int | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, ...]:
        if len(self.onnx_node.output) > 1:
            return super()._run(x, auto_pad, ceil_mode, dilations, kernel_shape, pads, storage_order, strides)
        least: Any = -np.inf if x.dtype.kind not in "iu" else np.iinfo(x.dtype).min
        windows = _Windows(x.shape[2:], auto_pad, ceil_mode, dilations, kernel_shape, pads, strides)
        return (functools.reduce(np.maximum, windows.slices(x, least)),)


class _Windows:
    """Places of a pool's windows on images of some sizes; arguments as in the operators' attributes."""

    def __init__(
        self,
        sizes: Sequence[int],
        auto_pad: str | None,
        ceil_mode: int | None,
        dilations: Sequence[int] | None,
        kernel: Sequence[int],
        pads: Sequence[int] | None,
        strides: Sequence[int] | None,
    ) -> None:
        axes = len(sizes)
        self._kernel, self._strides, self._dilations = kernel, strides or [1] * axes, dilations or [1] * axes
        self._pads, self._beyond, self._counts = [], [], []
        for axis, size in enumerate(sizes):
            reach, stride = (kernel[axis] - 1) * self._dilations[axis] + 1, self._strides[axis]
            before, after = (pads[axis], pads[axis + axes]) if pads else (0, 0)
            if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
                missing = max((-(-size // stride) - 1) * stride + reach - size, 0)
                before = missing // 2 if auto_pad == "SAME_UPPER" else missing - missing // 2
                after = missing - before
            room = size + before + after - reach
            count = room // stride + 1
            if ceil_mode and room % stride and count * stride < size + before:  # one more, which begins in the image
                count += 1
            self._pads.append((before, after))
            self._beyond.append((0, max((count - 1) * stride - room, 0)))
            self._counts.append(count)

    def slices(self, x: np.ndarray, beyond: float, padding: float | None = None) -> Iterator[np.ndarray]:
        """Every window's element at each place of the kernel.

        Args:
            beyond: what stands where a window reaches over the padded image.
            padding: what stands in the padding; None for the same.
        """
        around = ((0, 0), (0, 0))
        x = np.pad(x, (*around, *self._pads), constant_values=beyond if padding is None else padding)
        x = np.pad(x, (*around, *self._beyond), constant_values=beyond)
        for place in itertools.product(*map(range, self._kernel)):
            starts = [at * dilation for at, dilation in zip(place, self._dilations, strict=True)]
            steps = zip(starts, self._strides, self._counts, strict=True)
            index: tuple[Any, ...] = (..., *(slice(at, at + stride * (n - 1) + 1, stride) for at, stride, n in steps))
            yield x[index]
