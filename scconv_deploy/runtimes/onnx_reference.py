"""``onnx.reference``: the specification's own interpreter in NumPy, a second opinion on single SRUs and whole files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from scconv_deploy.errors import ModelError
from scconv_deploy.runtimes.pooling import AveragePool, MaxPool

_INSTEAD = "Run it in ONNX Runtime."


class OnnxReferenceRunner:
    """Runner of an ONNX model in ``onnx.reference``: slow, and independent of every runtime.

    Args:
        operators: of the model beside ONNX's own.

    Raises:
        ModelError: ``onnx.reference`` does not know an operator, or (in ``run``) refuses the inputs.
    """

    name = "onnx.reference"

    def __init__(self, model: onnx.ModelProto, operators: Sequence[type[OpRun]] = ()) -> None:
        try:
            self._evaluator = ReferenceEvaluator(model, new_ops=[AveragePool, MaxPool, *operators])
        except Exception as error:  # the evaluator has no exception class of its own
            raise ModelError(f"onnx.reference refuses the model: {_one_line(error)}", _INSTEAD) from error
        self.inputs = tuple(self._evaluator.input_names)
        self.outputs = tuple(self._evaluator.output_names)

    def __enter__(self) -> OnnxReferenceRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._evaluator

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once on arrays by name; return the outputs by name."""
        try:
            values = self._evaluator.run(None, dict(tensors))
        except Exception as error:  # see above
            raise ModelError(f"onnx.reference cannot run the model: {_one_line(error)}", _INSTEAD) from error
        return {name: np.asarray(value) for name, value in zip(self.outputs, values, strict=True)}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
