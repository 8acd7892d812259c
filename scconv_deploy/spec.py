"""What the user names (a zoo model, a factory, a checkpoint, weights, inputs) and how it becomes an ``nn.Module``."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
import shlex
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scconv_deploy import zoo
from scconv_deploy.errors import ModelError, UsageError, first_line
from scconv_deploy.file_kind import has_checkpoint_start
from scconv_deploy.source_file import parse_source
from scconv_deploy.user_code import add_to_path, import_factory, running_user_code
from scconv_deploy.zoo.embed_spec import EmbedSpec

if TYPE_CHECKING:
    from torch import nn

    from scconv_deploy.loading import LoadRecord

DTYPES = ("float32", "float64", "float16", "int64", "int32", "uint8", "bool")
"""Of inputs: those that torch, NumPy and ONNX share."""

_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".pt2", ".pkl")


@dataclass(frozen=True)
class InputSpec:
    """One input tensor: shape (axis 0 is the batch), the forward parameter it goes to (None: by position), dtype."""

    shape: tuple[int, ...]
    name: str | None = None
    dtype: str = "float32"

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """Read ``[name:]1x3x224x224[:dtype]``.

        Raises:
            UsageError: it is written in another way.
        """
        match = re.fullmatch(r"(?:([A-Za-z_]\w*):)?(\d+(?:x\d+)*)(?::(\w+))?", text)
        if match is None:
            raise UsageError(f"--input {text!r} is not [name:]SHAPE[:dtype].", "Write for example 1x3x224x224.")
        shape = tuple(int(size) for size in match[2].split("x"))
        dtype = match[3] or "float32"
        if dtype not in DTYPES:
            raise UsageError(f"--input {text!r}: no dtype {dtype!r}.", f"Known: {', '.join(DTYPES)}.")
        if min(shape) < 1:
            raise UsageError(f"--input {text!r}: every size must be at least 1.")
        return cls(shape, match[1], dtype)

    def __str__(self) -> str:
        name = f"{self.name}:" if self.name else ""
        dtype = "" if self.dtype == "float32" else f":{self.dtype}"
        return name + "x".join(map(str, self.shape)) + dtype


@dataclass(frozen=True)
class DynamicAxis:
    """An axis whose size is left open, from ``minimum`` to ``maximum``; ``optimum`` is what it is tuned for.

    ``input`` is the name of an input; None means axis 0 of every input, one shared symbol ``batch``. Sizes are the
    multiples of ``step``. Axes with the same name in ``shared`` always have the same size.
    """

    minimum: int
    optimum: int
    maximum: int
    axis: int = 0
    input: str | None = None
    step: int = 1
    shared: str | None = None

    @classmethod
    def parse_batch(cls, text: str) -> DynamicAxis:
        """Read ``--batch MIN:OPT:MAX[:STEP]``."""
        low, best, high, step = _parse_range("--batch", text)
        return cls(low, best, high, step=step)

    @classmethod
    def parse(cls, text: str) -> DynamicAxis:
        """Read ``--dynamic NAME:AXIS=MIN:OPT:MAX[:STEP]``."""
        first, *others = cls.parse_all(text)
        if others:
            raise UsageError(
                f"--dynamic {text!r} names several axes, expected one.", "Write for example x:2=64:224:512."
            )
        return first

    @classmethod
    def parse_all(cls, text: str) -> tuple[DynamicAxis, ...]:
        """Read ``--dynamic NAME:AXIS=MIN:OPT:MAX[:STEP]``, or several ``NAME:AXIS,NAME:AXIS=...`` of one size."""
        match = re.fullmatch(rf"({_AXIS}(?:,{_AXIS})*)=(.+)", text)
        if match is None:
            raise UsageError(f"--dynamic {text!r} is not NAME:AXIS=MIN:OPT:MAX.", "Write for example x:2=64:224:512.")
        low, best, high, step = _parse_range("--dynamic", match[2])
        places = [(name, int(axis)) for name, _, axis in (place.partition(":") for place in match[1].split(","))]
        shared = "{}_{}".format(*places[0]) if len(places) > 1 else None
        return tuple(cls(low, best, high, axis, name, step, shared) for name, axis in places)

    @property
    def symbol(self) -> str:
        return "batch" if self.input is None else self.shared or f"{self.input}_{self.axis}"


_LARGEST_SIZE = 2**31 - 1  # of an axis in TensorRT
_AXIS = r"[A-Za-z_]\w*:\d+"


def _parse_range(option: str, text: str) -> tuple[int, int, int, int]:
    """Minimum, optimum, maximum and step."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+)(?::(\d+))?", text)
    if match is None:
        raise UsageError(f"{option} {text!r} is not MIN:OPT:MAX.", "Write for example 1:4:8.")
    low, best, high, step = (int(g) for g in match.groups("1"))
    if not 1 <= low <= best <= high:
        raise UsageError(f"{option} {text!r}: expected 1 <= MIN <= OPT <= MAX.")
    if high > _LARGEST_SIZE:
        raise UsageError(f"{option} {text!r}: MAX is {high}, expected at most {_LARGEST_SIZE}.", "Give a smaller one.")
    for size in (low, best, high):
        if step < 1 or size % step:
            raise UsageError(
                f"{option} {text!r}: MIN:OPT:MAX:STEP are multiples of STEP, found {size} for {step}.",
                "Give whole steps, for example 64:224:512:32.",
            )
    return low, best, high, step


@dataclass(frozen=True)
class ModelSpec:
    """A model as the user names it.

    Attributes:
        source: a zoo name, ``package.module:factory``, ``path/file.py:factory``, or a checkpoint that is a pickled
            module (with ``trust_checkpoint``).
        kwargs: for the factory.
        weights: a ``.safetensors``, ``.pt`` or ``.pth`` state dict, nested or not.
        weights_key: which entry of the weights, where several fit; or which module of a checkpoint.
        inputs: empty for a zoo model's own default.
        dynamic: axes left open.
        seed: of the initialisation and of every random input.
        strict: missing and unexpected keys of the weights are an error.
        trust_checkpoint: read files whose reading executes code.
        embed: what ScConv is put in the place of, if anything.
    """

    source: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    inputs: tuple[InputSpec, ...] = ()
    dynamic: tuple[DynamicAxis, ...] = ()
    seed: int = 0
    strict: bool = True
    trust_checkpoint: bool = False
    embed: EmbedSpec | None = None
    weights_key: str | None = None

    @property
    def label(self) -> str:
        """What the model is called, and how the command line names it."""
        return self.source if self.embed is None else f"{self.source} --embed {shlex.quote(str(self.embed))}"

    def resolved(self) -> ModelSpec:
        """The same with a zoo model's default inputs, and the batch's optimum as their axis 0.

        Raises:
            UsageError: an unknown or missing source, or no inputs for a model that is not in the zoo.
        """
        inputs = self.inputs
        if source_kind(self.source) == "zoo" and not inputs:
            inputs = (InputSpec(zoo.MODELS[self.source].input_shape),)
        if not inputs:
            raise UsageError(
                f"{self.source}: its inputs are not known.",
                f"Add --input, for example: {self.source} --input 1x3x224x224",
            )
        batch = next((axis for axis in self.dynamic if axis.input is None), None)
        if batch is not None:
            inputs = tuple(replace(i, shape=(batch.optimum, *i.shape[1:])) for i in inputs)
        return replace(self, inputs=inputs)


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """Read ``--kwargs JSON`` (UsageError if it is not a JSON object)."""
    example = "Write for example --kwargs '{\"num_classes\": 10}'."
    try:
        value = json.loads(text) if text is not None else {}
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"--kwargs {text!r} is not JSON: {error}.", example) from error
    if not isinstance(value, dict):
        raise UsageError(f"--kwargs {text!r} is a JSON {type(value).__name__}, expected an object.", example)
    return value


SourceKind = Literal["zoo", "checkpoint", "file", "module"]


def source_kind(source: str) -> SourceKind:
    """What a MODEL is, by its form and by whether the file exists; nothing is imported.

    Raises:
        UsageError: it is none of them, or there is no such file.
    """
    if source in zoo.MODELS:
        return "zoo"
    path = Path(source)
    if path.suffix == ".safetensors":
        raise UsageError(f"{source} holds weights, not a module.", f"Give a MODEL and these as --weights {source}.")
    if path.suffix in _CHECKPOINT_SUFFIXES:
        if not path.is_file():
            raise UsageError(f"Checkpoint {path} does not exist.", "Check the path.")
        return "checkpoint"
    where, _, name = source.rpartition(":")
    file = path if path.suffix == ".py" else Path(where)
    if file.suffix == ".py" and not file.is_file():
        raise UsageError(f"{file} does not exist.", "Give path/file.py:factory.")
    if file.suffix == ".py" and (file == path or not name):
        names = [n.name for n in parse_source(file).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        raise UsageError(
            f"{source} names no factory.",
            f"Write {file}:NAME; it defines {', '.join(names) or 'no function or class'}.",
        )
    if file.suffix == ".py":
        return "file"
    if where and name:
        return "module"
    if path.is_file() and has_checkpoint_start(path):
        return "checkpoint"
    if source and (path.is_dir() or path.suffix in (".onnx", ".engine", ".rejected")):
        what = "a folder" if path.is_dir() else "an artifact"
        raise UsageError(
            f"{source} is {what}, expected a model: a zoo name, package.module:factory, file.py:factory or checkpoint.",
            "Name the model that it was made from.",
        )
    near = difflib.get_close_matches(source, zoo.MODELS, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"The zoo has {', '.join(zoo.MODELS)}."
    raise UsageError(f"{source!r} is not a zoo model, package.module:factory, file.py:factory or checkpoint.", hint)


def load(spec: ModelSpec) -> nn.Module:
    """Build the model, load its weights, embed ScConv if asked, and put it into eval mode, in float32, on the CPU.

    Raises:
        UsageError: an unknown name, a missing file or factory, arguments that the factory does not take, a file that
            trains on import, weights of which several entries fit.
        ModelError: the user's code raises, or the weights are of another architecture.
        IntegrityError, UntrustedError: a file that is not what it claims, or that would execute code.
    """
    return load_with_record(spec)[0]


def load_with_record(spec: ModelSpec) -> tuple[nn.Module, LoadRecord]:
    """:func:`load`, and how the model came by its numbers."""
    from scconv_deploy import loading
    from scconv_deploy.initialisation import Draws

    if spec.weights_key is not None and spec.weights is None and source_kind(spec.source) != "checkpoint":
        raise UsageError("--weights-key chooses among weights, and none are given.", "Add --weights, or leave it out.")
    draws = Draws()
    try:
        with draws:
            model = _module(spec)
    except ModelError as error:
        if not _traces(error):
            raise
        draws = Draws()  # a factory that traces cannot be watched: torch.jit.trace loses the parameters then
        model = _module(spec)
    with draws:
        model, weights, embedded = loading.weigh_and_embed(model, spec)
    return model, loading.LoadRecord(weights, embedded, draws.of(model))


def _module(spec: ModelSpec) -> nn.Module:
    """The model as it is built or read, in eval mode, float32, on the CPU."""
    import torch
    from torch import nn

    from scconv_deploy.weights import read_module

    torch.manual_seed(spec.seed)
    kind = source_kind(spec.source)
    if kind == "checkpoint":
        add_to_path(Path.cwd())  # where the pickle looks for its classes
        key = spec.weights_key if spec.weights is None else None
        factory: Any = read_module(Path(spec.source), spec.trust_checkpoint, key)
    else:
        factory = zoo.MODELS[spec.source].build if kind == "zoo" else import_factory(spec.source)
    model = _build(factory, spec)
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
    # torch.compile wraps the module; it is not needed here, and torch.export crashes on the wrapper
    model = getattr(model, "_orig_mod", model)
    try:
        return model.cpu().float().eval()
    except RuntimeError as error:  # parameters on the meta device have no values
        raise ModelError(
            f"{spec.source} cannot be put on the CPU: {first_line(error)}", "Give its parameters values."
        ) from error


def _traces(error: BaseException) -> bool:
    """Whether torch.jit.trace was on the way to an error."""
    frames = traceback.walk_tb(error.__cause__.__traceback__) if error.__cause__ else ()
    return any(frame.f_globals.get("__name__") == "torch.jit._trace" for frame, _ in frames)


# --- the factory -------------------------------------------------------------------------------------------------


def _build(factory: Any, spec: ModelSpec) -> Any:
    """Call a factory or class; a module is taken as it is."""
    from torch import nn

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
