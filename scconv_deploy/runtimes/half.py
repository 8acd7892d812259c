"""ONNX Runtime for a model whose data are half: float32 arrays in and out, like the float32 model's runner."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper

from scconv_deploy.graph.types import NUMPY, half_in
from scconv_deploy.runtimes.onnxruntime import CPU, OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.runtimes.stand_in import stand_in


class HalfRunner:
    """Runner of a half model in ONNX Runtime, or of its float32 stand-in where ONNX Runtime cannot run it.

    ONNX Runtime's CPU provider has no arithmetic in half: it multiplies float16 in float32, drops roundings between
    operators that it fuses or casts, and has no bfloat16. So there the stand-in is what the file says.

    Args:
        native: the model itself, even where a stand-in is nearer to it.

    Inputs are rounded to the type that the model takes, half outputs come back as float32.

    Raises:
        MissingRuntimeError, ModelError: as :class:`.onnxruntime.OnnxRuntimeRunner`.
    """

    name = "onnxruntime"

    def __init__(
        self, model: onnx.ModelProto, options: RuntimeOptions = RuntimeOptions(), *, native: bool = False
    ) -> None:
        self._taken = {
            value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in model.graph.input
        }
        emulated = not native and needs_stand_in(model, options)
        self._fed = np.dtype(np.float32) if emulated else None
        self._runner = OnnxRuntimeRunner(stand_in(model) if emulated else model, options)
        self.inputs, self.outputs = self._runner.inputs, self._runner.outputs

    def __enter__(self) -> HalfRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self._runner.__exit__(*exc)

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays by name in and out."""
        given = {name: self._as_taken(name, array) for name, array in tensors.items()}
        found = self._runner.run(given)
        return {name: y.astype(np.float32) if y.dtype in NUMPY.values() else y for name, y in found.items()}

    def _as_taken(self, name: str, array: np.ndarray) -> np.ndarray:
        taken = self._taken.get(name, array.dtype)
        if taken not in NUMPY.values():
            return array
        with np.errstate(over="ignore"):  # beyond half's range is infinite, and shows in what comes out
            return array.astype(taken).astype(self._fed or taken)


def needs_stand_in(model: onnx.ModelProto, options: RuntimeOptions) -> bool:
    """Whether a provider computes in other arithmetic than a half file says, as ONNX Runtime's CPU provider does."""
    return half_in(model) is not None and options.resolved_provider() == CPU


def runs_here(model: onnx.ModelProto, options: RuntimeOptions) -> bool:
    """Whether ONNX Runtime runs the type at all: its CPU provider has no bfloat16 (Where among others)."""
    return half_in(model) != "bf16" or options.resolved_provider() != CPU


def runner_of(model: onnx.ModelProto, options: RuntimeOptions = RuntimeOptions()) -> OnnxRuntimeRunner | HalfRunner:
    """Runner of a model, whatever the type of its data."""
    return OnnxRuntimeRunner(model, options) if half_in(model) is None else HalfRunner(model, options)
