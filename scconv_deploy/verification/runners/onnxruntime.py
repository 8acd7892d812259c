"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime

from scconv_deploy.errors import MissingRuntimeError, ModelError


class OnnxRuntimeRunner:
    """Runs an ONNX model in ONNX Runtime.

    Args:
        model: the model, below 2 GiB.
        providers: execution providers; the CPU's by default.
        threads: within an operator; 0 is ONNX Runtime's own choice.

    Raises:
        MissingRuntimeError: a provider is not installed.
        ModelError: ONNX Runtime refuses the model, or (in ``run``) its inputs.
    """

    name = "onnxruntime"

    def __init__(
        self, model: onnx.ModelProto, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int = 0
    ) -> None:
        missing = [p for p in providers if p not in onnxruntime.get_available_providers()]
        if missing:
            raise MissingRuntimeError(
                f"ONNX Runtime has no {', '.join(missing)} here.",
                f"Installed: {', '.join(onnxruntime.get_available_providers())}.",
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised; warnings of its optimiser are not ours to show
        options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(providers))
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise ModelError(
                f"ONNX Runtime refuses the model: {_one_line(error)}", "Export it again, or with another --opset."
            ) from error
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def __enter__(self) -> OnnxRuntimeRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._session

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays by name in and out."""
        try:
            values = self._session.run(list(self.outputs), dict(tensors))
        except Exception as error:  # see above
            raise ModelError(
                f"ONNX Runtime cannot run the model: {_one_line(error)}", "Give the inputs that it was exported for."
            ) from error
        return dict(zip(self.outputs, values, strict=True))


def _one_line(error: BaseException) -> str:
    """All of the message: what was expected and found is on its later lines."""
    return " ".join(str(error).split()) or type(error).__name__
