"""The PyTorch side: from what the user names, or a module at hand, to a model with its SRUs recognised and swapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from scconv_deploy import signature as signatures
from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.gate import recognize, swap_reachable
from scconv_deploy.report.records import StageLog, StageRecord
from scconv_deploy.signature import Signature
from scconv_deploy.spec import DynamicAxis, ModelSpec, load_with_record
from scconv_deploy.verification.torch_reference import Reference
from scconv_deploy.zoo.embed import EmbedResult

Progress = Callable[[str], None]


def silent(message: str) -> None:
    """The default progress: none."""


def reference_from_spec(spec: ModelSpec, log: StageLog, progress: Progress = silent) -> Reference:
    """Load a model, embed ScConv if asked, and recognise its SRUs.

    Raises:
        UsageError, ModelError, IntegrityError: see :func:`scconv_deploy.spec.load`; or the model refuses its inputs.
    """
    with log.stage("load") as stage:
        progress(f"loading {spec.source}")
        spec = spec.resolved()
        noted: list[str] = []
        model, embedded = load_with_record(spec, noted)
        signature = signatures.from_specs(model, spec.inputs, spec.dynamic, spec.seed)
        stage.applied.append(f"{spec.source} with inputs {', '.join(str(i) for i in spec.inputs)}")
        if spec.weights:
            stage.applied.append(f"weights {spec.weights}")
            stage.skipped += [(f"weights {spec.weights}", problems) for problems in noted if problems]
    if embedded is not None:
        log.records.append(_embedding(embedded))
    return _reference(spec.label, model, signature, spec.seed, log, progress)


def _embedding(embedded: EmbedResult) -> StageRecord:
    applied = (*embedded.summary, *(f"{path}: {what}" for path, what in embedded.replaced))
    return StageRecord("embed", embedded.seconds, applied, embedded.left)


def reference_from_module(
    model: nn.Module | EmbedResult, example_inputs: Any, dynamic: Sequence[DynamicAxis] = (), seed: int = 0
) -> tuple[Reference, StageLog]:
    """The same for a module at hand; it is not changed.

    Args:
        model: or what :func:`scconv_deploy.embed` returned, whose record is then kept.
        example_inputs: a tensor, a tuple of positional arguments, or a dictionary of named ones.
    """
    log = StageLog()
    if isinstance(model, EmbedResult):
        log.records.append(_embedding(model))
        model = model.model
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper hides the modules
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("The model is TorchScript, which hides its modules.", "Give the eager nn.Module.")
    if any(module.training for module in model.modules()):
        raise UsageError("The model is in train mode.", "Call model.eval() first.")
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, dict):
        kwargs = example_inputs
    else:
        args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    signature = signatures.from_example(model, args, kwargs, dynamic)
    return _reference(type(model).__name__, model, signature, seed, log, silent), log


def _reference(
    name: str, model: nn.Module, signature: Signature, seed: int, log: StageLog, progress: Progress
) -> Reference:
    with log.stage("recognize") as stage:
        progress("recognising SRUs by their behaviour")
        _require_float32(model)
        try:
            signature.call(model, signature.tensors)
        except RuntimeError as error:  # torch's word for a shape that does not fit
            shapes = ", ".join(f"{n} {'x'.join(map(str, t.shape))}" for n, t in signature.tensors.items())
            raise ModelError(
                f"{name} refuses its inputs ({shapes}): {str(error).splitlines()[0]}",
                _shape_remedy(name, model, signature),
            ) from error
        recognition = recognize(model, signature.args, signature.kwargs, seed)
        recognition, swapped = swap_reachable(model, recognition, lambda m: signature.call(m, signature.tensors))
        stage.applied += [f"{found.path}: {found.variant}" for found in recognition.srus]
        stage.skipped += [(refusal.path, refusal.reason) for refusal in recognition.refused]
    return Reference(name, model, swapped, recognition, signature)


def _require_float32(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ModelError(f"{name} is {tensor.dtype}; the reference is float32.", "Call model.float() first.")


def _shape_remedy(name: str, model: nn.Module, signature: Signature) -> str:
    """The command with the channels that the first convolution wants, where that is what is wrong."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    rank = 0 if first is None else len(first.kernel_size) + 2
    shape = next((list(t.shape) for t in signature.tensors.values() if t.dim() == rank), None)
    if first is not None and shape is not None and shape[1] != first.in_channels:
        shape[1] = first.in_channels
        return f"Its first convolution takes {first.in_channels} channels: {name} --input {'x'.join(map(str, shape))}"
    return "Give another --input shape."
