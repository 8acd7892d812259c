"""Reference models in PyTorch: loaded or given, with their SRUs recognised and swapped."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from scconv_deploy.errors import ModelError, UsageError, first_line
from scconv_deploy.gate.recognize import Recognition, recognize_in_run
from scconv_deploy.gate.swap import swap_reachable
from scconv_deploy.model import signature as signatures
from scconv_deploy.model.fake_quantizers import refuse_quantized_graphs, with_fixed_quantizers, with_folded_norms
from scconv_deploy.model.input_range import USUAL, InputRange, fitted
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.load import load_with_record
from scconv_deploy.model.signature import Signature
from scconv_deploy.model.spec import ModelSpec, source_kind
from scconv_deploy.model.yolo import YoloCheckpoint
from scconv_deploy.records.stage import Progress, StageLog, StageRecord, silent
from scconv_deploy.system.progress_lines import Notice
from scconv_deploy.zoo.embed import EmbedResult


def reference_from_spec(spec: ModelSpec, progress: Progress = silent) -> tuple[Reference, StageLog]:
    """Load a model, embed ScConv if asked, and recognise its SRUs; the log has a record of each stage.

    Raises:
        UsageError, ModelError, IntegrityError: see :func:`.load.load`; or the model refuses its inputs.
    """
    log = StageLog()
    with log.stage("load") as stage:
        progress(f"loading {spec.source}")
        if source_kind(spec.source) != "checkpoint":  # a checkpoint may know its inputs
            spec = spec.resolved()
        model, record = load_with_record(spec)
        spec = replace(spec, inputs=record.inputs).resolved()
        signature = signatures.from_specs(model, spec.inputs, spec.dynamic, spec.seed)
        drawn = _range_of(model, signature) if record.prepared is None else record.prepared.drawn
        stage.applied.append(f"{spec.source} with inputs {', '.join(str(i) for i in spec.inputs)}")
        if drawn != USUAL:
            signature = signatures.from_specs(model, spec.inputs, spec.dynamic, spec.seed, drawn)
            stage.applied.append(f"inputs drawn at {drawn}, where features are as large as in training")
        stage.applied += record.applied
        stage.skipped += record.skipped
        if record.notice:
            progress(Notice(record.notice))
    if record.embedded is not None:
        log.records.append(_embedding(record.embedded))
    progress("recognising SRUs by their behaviour")
    reference, recognized = _recognized(spec.label, model, signature, spec.seed)
    log.records.append(recognized)
    return replace(reference, checkpoint=record.checkpoint), log


def _range_of(model: nn.Module, signature: Signature) -> InputRange:
    def run(given: InputRange) -> None:
        signature.call(model, {n: given.of(t) if t.is_floating_point() else t for n, t in signature.tensors.items()})

    return fitted(model, run)


def _embedding(embedded: EmbedResult) -> StageRecord:
    applied = (*embedded.summary, *(f"{path}: {what}" for path, what in embedded.replaced))
    return StageRecord("embed", embedded.seconds, applied, embedded.left)


def reference_from_module(
    model: nn.Module | EmbedResult, example_inputs: Any, dynamic: Sequence[DynamicAxis] = (), seed: int = 0
) -> tuple[Reference, StageLog]:
    """Recognise the SRUs of a given module, which is not changed.

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
    refuse_quantized_graphs("The model", model)
    if any(module.training for module in model.modules()):
        raise UsageError("The model is in train mode.", "Call model.eval() first.")
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, dict):
        kwargs = example_inputs
    else:
        args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    signature = signatures.from_example(model, args, kwargs, dynamic)
    reference, recognized = _recognized(type(model).__name__, model, signature, seed)
    log.records.append(recognized)
    return reference, log


def _recognized(name: str, model: nn.Module, signature: Signature, seed: int) -> tuple[Reference, StageRecord]:
    """The model with its SRUs recognised and swapped, and the stage's record."""
    start = time.perf_counter()
    _require_float32(model)
    given, model = model, with_fixed_quantizers(model)
    outputs: list[Mapping[str, torch.Tensor]] = []
    try:
        recognition = recognize_in_run(model, lambda m: outputs.append(signature.call(m, signature.tensors)), seed)
    except RuntimeError as error:  # torch's word for a shape that does not fit
        if outputs:
            raise
        shapes = ", ".join(f"{n} {'x'.join(map(str, t.shape))}" for n, t in signature.tensors.items())
        raise ModelError(
            f"{name} refuses its inputs ({shapes}): {first_line(error)}", _shape_remedy(name, model, signature)
        ) from error
    if model is not given:
        _require_same_outputs(given, outputs[0], signature)
    not_finite = _not_finite(name, model, signature)
    recognition, swapped = swap_reachable(
        model, recognition, lambda m: signature.call(m, signature.tensors), outputs[0]
    )
    swapped = with_folded_norms(swapped)
    record = StageRecord(
        "recognize",
        time.perf_counter() - start,
        tuple(f"{found.path}: {found.gate.variant}" for found in recognition.srus),
        (*not_finite, *((refusal.path, refusal.reason) for refusal in recognition.refused)),
    )
    return Reference(name, model, swapped, recognition, signature), record


def _require_same_outputs(given: nn.Module, outputs: Mapping[str, torch.Tensor], signature: Signature) -> None:
    """Refuse a model whose quantisers are not what they were replaced by (ModelError)."""
    expected = signature.call(given, signature.tensors)
    if any(not torch.equal(outputs[name].nan_to_num(), value.nan_to_num()) for name, value in expected.items()):
        raise ModelError(
            "The model's fake quantisers compute something else than torch.fake_quantize with their scales.",
            "Use torch.ao.quantization.FakeQuantize or FusedMovingAvgObsFakeQuantize.",
        )


def _require_float32(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ModelError(f"{name} is {tensor.dtype}; the reference is float32.", "Call model.float() first.")


def _not_finite(name: str, model: nn.Module, signature: Signature) -> list[tuple[str, str]]:
    """Refuse a model whose output depends on NaN weights; return the other NaN weights as (path, contents).

    A gate turns NaN into zeros, so that the output alone does not show it. Infinities are often a mask's: those of
    parameters are refused where the output holds NaN.

    Raises:
        ModelError: naming what holds it.
    """
    tensors = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()}
    holding = {n: t for n, t in tensors.items() if not bool(torch.isfinite(t).all())}
    if not holding:
        return []
    told = {n: f"holds {_kinds(t)}" for n, t in holding.items()}
    before = signature.call(model, signature.tensors)
    wrong = {n: t for n, t in holding.items() if bool(torch.isnan(t).any())}
    if not wrong and any(bool(torch.isnan(y).any()) for y in before.values() if y.is_floating_point()):
        wrong = {n: t for n, t in holding.items() if isinstance(t, nn.Parameter)}
    if wrong and not _same_without(model, signature, wrong, before):
        path = next(iter(wrong))
        others = f", and so do {len(wrong) - 1} others of its tensors" if len(wrong) > 1 else ""
        raise ModelError(
            f"{name}: {path} {told[path]}{others}; the output depends on it.",
            "Check the checkpoint: the training has diverged, or the file is incomplete.",
        )
    return list(told.items())


def _kinds(tensor: torch.Tensor) -> str:
    counts = {"NaN": int(torch.isnan(tensor).sum()), "Inf": int(torch.isinf(tensor).sum())}
    found = " and ".join(f"{kind} in {count:,}" for kind, count in counts.items() if count)
    return f"{found} of {tensor.numel():,} values"


def _same_without(
    model: nn.Module, signature: Signature, tensors: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]
) -> bool:
    """Whether the model computes the same with zeros in place of NaN and Inf."""
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        try:
            for tensor in tensors.values():
                tensor.nan_to_num_(0.0, 0.0, 0.0)
            after = signature.call(model, signature.tensors)
        finally:
            for name, tensor in tensors.items():
                tensor.copy_(kept[name])
    return all(torch.equal(y.nan_to_num(), after[n].nan_to_num()) for n, y in before.items() if n in after)


def _shape_remedy(name: str, model: nn.Module, signature: Signature) -> str:
    """The command with the channels of the first convolution, where the given number of channels is wrong."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    rank = 0 if first is None else len(first.kernel_size) + 2
    shape = next((list(t.shape) for t in signature.tensors.values() if t.dim() == rank), None)
    if first is not None and shape is not None and shape[1] != first.in_channels:
        shape[1] = first.in_channels
        return f"Its first convolution takes {first.in_channels} channels: {name} --input {'x'.join(map(str, shape))}"
    return "Give another --input shape."


@dataclass(frozen=True, eq=False)
class Reference:
    """The PyTorch side: the model as given, the same with its SRUs swapped, and how it is called.

    ``checkpoint`` is what an ultralytics checkpoint says of the model; None for any other.
    """

    name: str
    model: nn.Module
    swapped: nn.Module
    recognition: Recognition
    signature: Signature
    checkpoint: YoloCheckpoint | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata that the owners of the checkpoint expect in the ONNX file."""
        if self.checkpoint is None:
            return {}
        (image,) = self.signature.tensors.values()
        return self.checkpoint.metadata(image.shape, bool(self.signature.dynamic))
