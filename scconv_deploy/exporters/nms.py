"""Translation of :func:`scconv_deploy.zoo.nms.non_max_suppression` to standard ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset18 as op

from scconv_deploy.zoo import nms  # noqa: F401  (registers the operator)


def _non_max_suppression(
    boxes: Any, scores: Any, max_per_class: int, iou_threshold: float, score_threshold: float
) -> Any:
    """Mark the selected boxes with ones in ``[N, C, M]`` zeros.

    NonMaxSuppression lists them as ``[S, 3]`` indices (image, class, box), and ScatterND marks them. S depends on the
    data and stays between these two nodes, so the result has a fixed size.
    """
    limits: list[Any] = [
        op.Constant(value_ints=[max_per_class]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[score_threshold]),
    ]
    selected: Any = op.NonMaxSuppression(boxes, scores, *limits)
    nothing = onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT, [1], [0.0])
    one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
    zeros: Any = op.ConstantOfShape(op.Shape(scores), value=nothing)
    ones: Any = op.ConstantOfShape(op.Shape(selected, start=0, end=1), value=one)
    return op.ScatterND(zeros, selected, ones)


TRANSLATIONS: dict[Callable, Callable] = {torch.ops.scconv_deploy.non_max_suppression.default: _non_max_suppression}
"""For ``torch.onnx.export(custom_translation_table=...)``."""
