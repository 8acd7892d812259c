"""Replace the weights of a refittable engine, with TensorRT's refitter for ONNX. It deserialises the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from scconv_deploy.errors import BuildError, MissingRuntimeError
from scconv_deploy.runtimes.tensorrt import log as logs

_NAMED = 3
"""Missing weights that an error names."""


@dataclass(frozen=True)
class RefittedPlan:
    """Bytes of a refitted engine, whether it can be refitted again, and the library's warnings."""

    data: bytes
    refittable: bool
    warnings: tuple[str, ...]


def refit_plan(module: ModuleType, data: bytes, model: bytes, host_code: bool) -> RefittedPlan:
    """Refit an engine from an ONNX model, and serialise it with its weights.

    Args:
        data: the engine; the caller has checked the bytes.
        model: the model in the form that the engine was built from.
        host_code: see :class:`scconv_deploy.runtimes.tensorrt.runner.Plan`.

    Raises:
        MissingRuntimeError: the engine cannot be opened on this GPU.
        BuildError: the model lacks weights of the engine, or the library refuses it.
    """
    log = logs.library_log(module)
    with log.recording() as messages:
        runtime = module.Runtime(log.logger)
        if host_code:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise MissingRuntimeError(
                f"The engine cannot be opened on this GPU: {_reason(messages)}", "Refit it on the GPU that it is for."
            )
        refitter = module.Refitter(engine, log.logger)
        parser = module.OnnxParserRefitter(refitter, log.logger)
        read = parser.refit_from_bytes(model)
        _check_weights(list(refitter.get_missing_weights()))
        if not read or not refitter.refit_cuda_engine():
            found = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            raise BuildError(
                f"The library cannot refit the engine: {' '.join((found or [_reason(messages)])[0].split())}",
                "Build the engine again from this ONNX file.",
            )
        refitted = _serialized(module, engine)
        again = runtime.deserialize_cuda_engine(refitted)
        if again is None:
            raise BuildError(f"The refitted engine does not open: {_reason(messages)}", "Build the engine again.")
        return RefittedPlan(refitted, bool(again.refittable), logs.warnings(messages))


def _check_weights(missing: Sequence[str]) -> None:
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise BuildError(
            f"The ONNX file lacks weights of the engine: {', '.join(missing[:_NAMED])}{more}.",
            "Give a file of the network that the engine was built from, with weights of the same names.",
        )


def _serialized(module: ModuleType, engine: Any) -> bytes:
    """The engine's bytes with its weights, refittable again where the library can keep it so."""
    config = engine.create_serialization_config()
    config.clear_flag(module.SerializationFlag.EXCLUDE_WEIGHTS)
    if keep := getattr(module.SerializationFlag, "INCLUDE_REFIT", None):
        config.set_flag(keep)
    return bytes(engine.serialize_with_config(config))


def _reason(messages: Sequence[tuple[str, str]]) -> str:
    return next(iter(logs.errors(messages)), "no reason given")
