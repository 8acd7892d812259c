"""A model from what the user names: build it, load its weights, embed ScConv."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from scconv_deploy import zoo
from scconv_deploy.errors import ModelError, UsageError, first_line
from scconv_deploy.model import signature as signatures
from scconv_deploy.model.fake_quantizers import refuse_quantized_graphs
from scconv_deploy.model.initialisation import Draws, RandomParameters
from scconv_deploy.model.inputs import InputSpec
from scconv_deploy.model.spec import ModelSpec, source_kind
from scconv_deploy.model.user_code import add_to_path, import_factory, running_user_code
from scconv_deploy.model.weights import WeightsFile, read_module, read_weights
from scconv_deploy.model.weights_fit import Expected, fits
from scconv_deploy.model.weights_load import LoadedWeights, listed, load_weights
from scconv_deploy.model.yolo import Prepared, YoloCheckpoint, checkpoint_of, prepare
from scconv_deploy.zoo.embed import EmbedResult, Example, embed_on
from scconv_deploy.zoo.embed_spec import EmbedSpec


@dataclass(frozen=True)
class LoadRecord:
    """Origin of a model's parameters.

    Attributes:
        weights: what was loaded of ``spec.weights``.
        embedded: what ``spec.embed`` did.
        random: what of the parameters nobody trained.
        inputs: those of the spec, else the image that an ultralytics checkpoint was trained on.
        checkpoint: what an ultralytics checkpoint says of its model; None for any other model.
        prepared: what was done to that model.
    """

    weights: LoadedWeights | None
    embedded: EmbedResult | None
    random: RandomParameters
    inputs: tuple[InputSpec, ...] = ()
    checkpoint: YoloCheckpoint | None = None
    prepared: Prepared | None = None

    @property
    def applied(self) -> tuple[str, ...]:
        """The loaded weights, the preparation and the random parameters, one line each."""
        lines = [self.weights.summary] if self.weights else []
        lines += self.prepared.applied if self.prepared else ()
        return (*lines, f"weights: {self.random}") if self.random.random else tuple(lines)

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """Weights that were not loaded or not used, and steps of the preparation, as (what, which or why)."""
        return (*self._left, *(self.prepared.skipped if self.prepared else ()))

    @property
    def _left(self) -> tuple[tuple[str, str], ...]:
        if self.weights is None:
            return ()
        left = self.weights.left
        if self.random.random:
            left = (*left, ("parameters that stay at their random initialisation", listed(self.random.names)))
        return tuple((f"weights {self.weights.path}: {what}", which) for what, which in left)

    @property
    def notice(self) -> str:
        """The weights that were read and those that were not, in one line; "" without weights."""
        if self.weights is None:
            return ""
        left = [f"{what}: {which}" for what, which in self.weights.left]
        random = [f"{self.random}, in {listed(self.random.names)}"] if self.random.random else []
        return "; ".join([self.weights.summary, *left, *random])


def load_weights_and_embed(model: nn.Module, spec: ModelSpec) -> tuple[LoadedWeights | None, EmbedResult | None]:
    """Load ``spec.weights`` into a model and follow ``spec.embed``, in the order that fits the weights.

    Weights that hold a ScConv where the network has a convolution (``conv2.SRU.gn.gamma``) are those of the embedded
    network and load after embedding, any others before. ``strict`` is judged against the network that they load into.

    Args:
        model: in eval mode, float32, on the CPU; the weights may be loaded into it.

    Returns:
        What was loaded, and the embedded network; None for each that ``spec`` does not ask for.

    Raises:
        UsageError, ModelError, IntegrityError, UntrustedError: see :func:`load` and :func:`scconv_deploy.embed`.
    """
    if spec.weights is None:
        return None, None if spec.embed is None else _embed(model, spec, spec.embed)
    weights = read_weights(spec.weights, spec.trust_checkpoint)
    if spec.embed is None or not _of_embedded(weights, model, spec.weights_key):
        loaded = load_weights(model, weights, spec.source, strict=spec.strict, key=spec.weights_key)
        return loaded, None if spec.embed is None else _embed(model, spec, spec.embed)
    if spec.embed.calibrate:
        raise UsageError(
            f"--embed: {spec.weights} holds weights of the embedded network, with its statistics.",
            "Leave calibrate out.",
        )
    embedded = _embed(model, spec, spec.embed)
    loaded = load_weights(embedded.model, weights, spec.label, strict=spec.strict, key=spec.weights_key)
    return loaded, replace(embedded, untrained=False)


def _of_embedded(weights: WeightsFile, model: nn.Module, key: str | None) -> bool:
    """Whether weights are the embedded network's, by the names in the best fit, or else in any entry."""
    ways = fits(weights.entries, Expected.of(model), key)
    if ways:
        return _holds_scconv(ways[0].inside, model)
    names = [name.split(".") for entry in weights.entries for name in entry.tensors]
    return _holds_scconv((".".join(parts[n:]) for parts in names for n in range(len(parts))), model)


def _holds_scconv(keys: Iterable[str], model: nn.Module) -> bool:
    """Whether a key lies below a convolution, which itself has no modules."""
    own = set(model.state_dict())
    convolutions = {path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for key in keys:
        parts = key.split(".")
        if key not in own and any(".".join(parts[:n]) in convolutions for n in range(1, len(parts))):
            return True
    return False


def _embed(model: nn.Module, spec: ModelSpec, wanted: EmbedSpec) -> EmbedResult:
    """Embed ScConv, with example inputs where the spec says or the zoo knows the model's."""
    example = None
    if spec.inputs or source_kind(spec.source) == "zoo":
        signature = signatures.from_specs(model, spec.resolved().inputs, spec.dynamic, spec.seed)
        example = Example(signature.args, signature.kwargs)
    return embed_on(model, wanted.rule, example, wanted.calibrate, wanted.scconv)


def load(spec: ModelSpec) -> nn.Module:
    """Build the model, load its weights, embed ScConv if asked, and put it into eval mode, in float32, on the CPU.

    A checkpoint of ultralytics is also prepared as its own exporter does, see :mod:`scconv_deploy.model.yolo`.

    Raises:
        UsageError: an unknown name, a missing file or factory, arguments that the factory does not take, a file that
            trains on import, weights of which several entries fit.
        ModelError: the user's code raises, or the weights are of another architecture.
        IntegrityError, UntrustedError: a file that is not what it claims, or that would execute code.
    """
    return load_with_record(spec)[0]


def load_with_record(spec: ModelSpec) -> tuple[nn.Module, LoadRecord]:
    """:func:`load`, with the record of its steps: build, load weights, embed."""
    if spec.weights_key is not None and spec.weights is None and source_kind(spec.source) != "checkpoint":
        raise UsageError("--weights-key chooses among weights, and none are given.", "Add --weights, or leave it out.")
    model, checkpoint, draws = build(spec)
    with draws:  # loading overwrites what was drawn, embedding draws more
        weights, embedded = load_weights_and_embed(model, spec)
    model = model if embedded is None else embedded.model
    random = draws.of(model)
    if checkpoint is None:
        if spec.raw_outputs:
            raise UsageError(
                f"--raw-outputs: {spec.source} is no ultralytics checkpoint; all its outputs are kept anyway.",
                "Leave it out.",
            )
        return model, LoadRecord(weights, embedded, random, spec.inputs)
    inputs = spec.inputs or checkpoint.inputs
    prepared = _prepared(model, checkpoint, spec, inputs)
    return prepared.model, LoadRecord(weights, embedded, random, inputs, checkpoint, prepared)


def _prepared(model: nn.Module, checkpoint: YoloCheckpoint, spec: ModelSpec, inputs: tuple[InputSpec, ...]) -> Prepared:
    """An ultralytics model as its own exporter prepares it."""
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise UsageError(
            f"{spec.source} takes one image, found --input {' --input '.join(map(str, inputs))}.",
            f"Write for example --input {checkpoint.inputs[0]}, or leave it out.",
        )
    sizes_open = any(axis.axis >= 2 for axis in spec.dynamic)
    try:
        return prepare(model, checkpoint, inputs[0].shape, raw=spec.raw_outputs, sizes_open=sizes_open)
    except Exception as error:  # the user's own code
        raise ModelError(
            f"{spec.source} refuses its input ({inputs[0]}): {type(error).__name__}: {first_line(error)}",
            f"It was trained on {checkpoint.inputs[0]}; sizes are multiples of {checkpoint.stride}.",
        ) from error


def build(spec: ModelSpec) -> tuple[nn.Module, YoloCheckpoint | None, Draws]:
    """Build or read ``spec.source``, in eval mode, float32, on the CPU.

    Returns:
        The model, what an ultralytics checkpoint says of it, and the random numbers drawn for it.
    """
    draws = Draws()
    try:
        with draws:
            return *_module(spec), draws
    except ModelError as error:
        if not _traces(error):
            raise
    return *_module(spec), Draws()  # a factory that traces cannot be watched: torch.jit.trace loses the parameters then


def _module(spec: ModelSpec) -> tuple[nn.Module, YoloCheckpoint | None]:
    """The model from its factory or file, in eval mode, float32, on the CPU; and what a checkpoint says of it."""
    torch.manual_seed(spec.seed)
    kind = source_kind(spec.source)
    file: Mapping[str, Any] = {}
    if kind == "checkpoint":
        add_to_path(Path.cwd())  # where the pickle looks for its classes
        for folder in reversed(spec.paths):
            add_to_path(folder)
        key = spec.weights_key if spec.weights is None else None
        pickled = read_module(Path(spec.source), spec.trust_checkpoint, key)
        factory: Any = pickled.module
        file = pickled.file
    else:
        for folder in reversed(spec.paths):
            add_to_path(folder)
        factory = zoo.MODELS[spec.source].build if kind == "zoo" else import_factory(spec.source)
    model = _call(factory, spec)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{spec.source} gives {type(model).__name__}, expected a torch.nn.Module.",
            "Name a factory or class that builds the model.",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{spec.source} is TorchScript, which torch.export cannot read.",
            "Give the Python module; or export the scripted one with torch.onnx.export(..., dynamo=False) and give "
            "that file to scconv-deploy rewrite.",
        )
    model = unwrapped(model)
    refuse_quantized_graphs(spec.source, model)
    try:
        model = model.cpu().float().eval()
    except RuntimeError as error:  # parameters on the meta device have no values, graphs of torch.export no eval()
        if any(isinstance(module, torch.fx.GraphModule) for module in model.modules()):
            raise ModelError(
                f"{spec.source} holds a graph that torch.export made: {first_line(error)}",
                "Give the module that was exported; or write the graph with torch.onnx.export(..., dynamo=True), and "
                "give the file to scconv-deploy deploy.",
            ) from error
        raise ModelError(
            f"{spec.source} cannot be put on the CPU: {first_line(error)}", "Give its parameters values."
        ) from error
    return model, checkpoint_of(model, file) if kind == "checkpoint" else None


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without what training wrapped it in: torch.compile, DataParallel, a moving average; inside it too.

    torch.export crashes on the first, the second takes any inputs, and none computes anything in eval mode.
    """
    while (inner := _wrapped(model)) is not None:
        model = inner
    for parent in model.modules():
        for name, child in parent.named_children():
            if _wrapped(child) is not None:
                setattr(parent, name, unwrapped(child))
    return model


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a module wraps; None if it is no wrapper."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
        return module.module
    inner = vars(module)["_modules"].get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else None


def _traces(error: BaseException) -> bool:
    """Whether an error was raised within torch.jit.trace."""
    frames = traceback.walk_tb(error.__cause__.__traceback__) if error.__cause__ else ()
    return any(frame.f_globals.get("__name__") == "torch.jit._trace" for frame, _ in frames)


def _call(factory: Any, spec: ModelSpec) -> Any:
    """Call a factory or class; a module is taken as it is."""
    if isinstance(factory, nn.Module) or not callable(factory):
        if spec.kwargs:
            raise UsageError(f"--kwargs: {spec.source} is no factory that takes arguments.", "Leave --kwargs out.")
        return factory
    _check_kwargs(factory, spec)
    try:
        with running_user_code(spec.source, "Check --kwargs and the factory."):
            return factory(**spec.kwargs)
    except ModelError as error:
        if source_kind(spec.source) == "zoo" and isinstance(error.__cause__, TypeError):  # what our modules do not take
            raise UsageError(
                f"--kwargs do not fit {spec.source}: {error.__cause__}.", "See ScConv's options."
            ) from error
        raise


def _check_kwargs(factory: Callable[..., Any], spec: ModelSpec) -> None:
    try:
        signature = inspect.signature(factory)
    except (ValueError, TypeError):  # some callables have none; calling them tells
        return
    try:
        signature.bind(**spec.kwargs)
    except TypeError as error:
        takes = ", ".join(map(str, signature.parameters.values())) or "no argument"
        raise UsageError(f"--kwargs do not fit {spec.source}: {error}.", f"It takes {takes}.") from error
