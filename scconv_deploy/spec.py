"""What the user names (a zoo model, a factory, a checkpoint, weights, inputs) and how it becomes an ``nn.Module``."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import json
import pickle
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scconv_deploy import zoo
from scconv_deploy.errors import (
    IntegrityError,
    ModelError,
    ScconvDeployError,
    UntrustedError,
    UsageError,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net", "ema", "params", "weights")
_MODULE_KEYS = ("ema", "model", "net", "module")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")


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

    ``input`` is the name of an input; None means axis 0 of every input, one shared symbol ``batch``.
    """

    minimum: int
    optimum: int
    maximum: int
    axis: int = 0
    input: str | None = None

    @classmethod
    def parse_batch(cls, text: str) -> DynamicAxis:
        """Read ``--batch MIN:OPT:MAX``."""
        return cls(*_parse_range("--batch", text))

    @classmethod
    def parse(cls, text: str) -> DynamicAxis:
        """Read ``--dynamic NAME:AXIS=MIN:OPT:MAX``."""
        match = re.fullmatch(r"([A-Za-z_]\w*):(\d+)=(.+)", text)
        if match is None:
            raise UsageError(f"--dynamic {text!r} is not NAME:AXIS=MIN:OPT:MAX.", "Write for example x:2=64:224:512.")
        return cls(*_parse_range("--dynamic", match[3]), axis=int(match[2]), input=match[1])

    @property
    def symbol(self) -> str:
        return "batch" if self.input is None else f"{self.input}_{self.axis}"


def _parse_range(option: str, text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+):(\d+):(\d+)", text)
    if match is None:
        raise UsageError(f"{option} {text!r} is not MIN:OPT:MAX.", "Write for example 1:4:8.")
    low, best, high = (int(g) for g in match.groups())
    if not 1 <= low <= best <= high or high < 2:
        raise UsageError(f"{option} {text!r}: expected 1 <= MIN <= OPT <= MAX, with MAX of at least 2.")
    return low, best, high


@dataclass(frozen=True)
class ModelSpec:
    """A model as the user names it.

    Attributes:
        source: a zoo name, ``package.module:factory``, ``path/file.py:factory``, or a checkpoint that is a pickled
            module (with ``trust_checkpoint``).
        kwargs: for the factory.
        weights: a ``.safetensors``, ``.pt`` or ``.pth`` state dict.
        inputs: empty for a zoo model's own default.
        dynamic: axes left open.
        seed: of the initialisation and of every random input.
        strict: missing and unexpected keys of the weights are an error.
        trust_checkpoint: read files whose reading executes code.
    """

    source: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    inputs: tuple[InputSpec, ...] = ()
    dynamic: tuple[DynamicAxis, ...] = ()
    seed: int = 0
    strict: bool = True
    trust_checkpoint: bool = False

    def resolved(self) -> ModelSpec:
        """The same with a zoo model's default inputs, and the batch's optimum as their axis 0.

        Raises:
            UsageError: no inputs were given for a model that is not in the zoo.
        """
        inputs = self.inputs
        if not inputs:
            if self.source not in zoo.MODELS:
                raise UsageError(
                    f"{self.source}: its inputs are not known.",
                    f"Add --input, for example: {self.source} --input 1x3x224x224",
                )
            inputs = (InputSpec(zoo.MODELS[self.source].input_shape),)
        batch = next((axis for axis in self.dynamic if axis.input is None), None)
        if batch is not None:
            inputs = tuple(replace(i, shape=(batch.optimum, *i.shape[1:])) for i in inputs)
        for axis in self.dynamic:
            if axis.input is not None:
                inputs = tuple(_with_optimum(i, axis) if i.name == axis.input else i for i in inputs)
        return replace(self, inputs=inputs)


def _with_optimum(spec: InputSpec, axis: DynamicAxis) -> InputSpec:
    if axis.axis >= len(spec.shape):
        raise UsageError(f"--dynamic {axis.input}:{axis.axis}: the input {spec} has {len(spec.shape)} axes.")
    sizes = list(spec.shape)
    sizes[axis.axis] = axis.optimum
    return replace(spec, shape=tuple(sizes))


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """Read ``--kwargs JSON`` (UsageError if it is not a JSON object)."""
    try:
        value = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise UsageError(f"--kwargs is not JSON: {error}.", "Write for example '{\"num_classes\": 10}'.") from error
    if not isinstance(value, dict):
        raise UsageError(f"--kwargs is a JSON {type(value).__name__}, expected an object.")
    return value


def load(spec: ModelSpec) -> nn.Module:
    """Build the model, load its weights, and put it into eval mode, in float32, on the CPU.

    What the user's code prints goes to stderr.

    Raises:
        UsageError: an unknown name, a missing file or factory, a file that trains on import.
        ModelError: the factory raises, or the weights are of another architecture.
        IntegrityError, UntrustedError: a file that is not what it claims, or that would execute code.
    """
    import torch
    from torch import nn

    torch.manual_seed(spec.seed)
    with contextlib.redirect_stdout(sys.stderr):
        if Path(spec.source).suffix in _CHECKPOINT_SUFFIXES:
            model = _unpickle_module(Path(spec.source), spec.trust_checkpoint)
        else:
            model = _call_factory(spec)
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"{spec.source} returned {type(model).__name__}, expected a torch.nn.Module.",
                "Name a factory or class that builds the model.",
            )
        if spec.weights is not None:
            _load_weights(model, spec)
    return model.cpu().float().eval()


# --- the factory -------------------------------------------------------------------------------------------------


def _call_factory(spec: ModelSpec) -> Any:
    if spec.source in zoo.MODELS:
        factory: Any = zoo.MODELS[spec.source].build
    elif ":" in spec.source:
        factory = _import_factory(spec.source)
    else:
        near = difflib.get_close_matches(spec.source, zoo.MODELS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"The zoo has {', '.join(zoo.MODELS)}."
        raise UsageError(
            f"{spec.source!r} is not a zoo model, package.module:factory, file.py:factory or checkpoint.", hint
        )
    if not callable(factory):
        return factory
    if _is_module(factory) and not spec.kwargs:
        return factory
    try:
        return factory(**spec.kwargs)
    except ScconvDeployError:
        raise
    except Exception as error:  # the user's own code: whatever it raises is the message
        raise ModelError(
            f"{spec.source} raised {type(error).__name__}: {_first_line(error)}", "Check --kwargs and the factory."
        ) from error


def _is_module(value: object) -> bool:
    from torch import nn

    return isinstance(value, nn.Module)


def _import_factory(source: str) -> Any:
    where, _, name = source.rpartition(":")
    if where.endswith(".py"):
        module = _import_file(Path(where))
    else:
        try:
            with _import_path(Path.cwd()), _no_exit(where):
                module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
                raise UsageError(
                    f"No module {where!r} can be imported.", "Check the name, or give the file: path/file.py:factory."
                ) from error
            raise ModelError(f"{where} needs the module {error.name!r}, which is missing.") from error
        except ScconvDeployError:
            raise
        except Exception as error:  # the user's own code
            raise ModelError(f"Importing {where} raised {type(error).__name__}: {_first_line(error)}") from error
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            names = [n for n in vars(module) if not n.startswith("_")]
            near = difflib.get_close_matches(name, names, n=1)
            raise UsageError(f"{where} has no {name!r}.", f"Did you mean {near[0]}?" if near else "Check the name.")
        target = getattr(target, part)
    return target


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path} does not exist.", "Give path/file.py:factory.")
    _refuse_training_on_import(path)
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(module_spec)
    # registered, so that dataclasses and pickles of the file find it; never over a module that is already there
    sys.modules.setdefault(path.stem, module)
    try:
        with _import_path(path.parent.resolve()), _no_exit(str(path)):
            module_spec.loader.exec_module(module)
    except ScconvDeployError:
        raise
    except Exception as error:  # the user's own code
        raise ModelError(f"Importing {path} raised {type(error).__name__}: {_first_line(error)}") from error
    return module


def _refuse_training_on_import(path: Path) -> None:
    """A training script without a main guard would train before we get its factory."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not Python: {error}") from error
    pending: list[ast.AST] = [n for n in tree.body if not _is_main_guard(n)]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward":
            raise UsageError(
                f"{path} trains when it is imported: line {node.lineno} calls .backward() at the top level.",
                "Put the training under if __name__ == '__main__':",
            )
        pending.extend(ast.iter_child_nodes(node))


def _is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))


@contextlib.contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    # stays on the path: factories import lazily
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    yield


@contextlib.contextmanager
def _no_exit(name: str) -> Iterator[None]:
    try:
        yield
    except SystemExit as error:
        raise ModelError(
            f"{name} called sys.exit({error.code!r}) when it was imported.",
            "Put its command line under if __name__ == '__main__':",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


# --- files -------------------------------------------------------------------------------------------------------


def _require_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise UsageError(f"{what} {path} does not exist." if not path.exists() else f"{what} {path} is not a file.")
    if path.stat().st_size == 0:
        raise IntegrityError(f"{what} {path} is empty.")


def _read_pickle(path: Path, trust: bool, what: str) -> Any:
    """torch.load with the error that the user can act on."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "nsupported" in str(error):
            raise UntrustedError(
                f"{what} {path} holds more than tensors; reading it would execute code.",
                "If you trust its author, add --trust-checkpoint; better, save a state dict as .safetensors.",
            ) from error
        raise IntegrityError(f"{what} {path} is damaged or not a PyTorch file.", "Copy it again.") from error
    except (ModuleNotFoundError, AttributeError) as error:
        raise ModelError(
            f"{what} {path} needs code that is not here: {_first_line(error)}.",
            "Run from the project that wrote it, or set PYTHONPATH.",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise IntegrityError(
            f"{what} {path} is damaged or not a PyTorch file: {_first_line(error)}", "Copy it again."
        ) from error


def _unpickle_module(path: Path, trust: bool) -> Any:
    from torch import nn

    _require_file(path, "Checkpoint")
    value = _read_pickle(path, trust, "Checkpoint")
    if isinstance(value, Mapping):
        for key in _MODULE_KEYS:
            if isinstance(value.get(key), nn.Module):
                return value[key]
        raise UsageError(f"{path} holds weights, not a module.", f"Give a MODEL and these as --weights {path}.")
    return value


def _read_state_dict(path: Path, trust: bool) -> dict[str, torch.Tensor]:
    import torch
    from torch import nn

    _require_file(path, "Weights file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path, device="cpu")
        except (SafetensorError, ValueError) as error:
            raise IntegrityError(
                f"Weights file {path} is damaged or not safetensors: {_first_line(error)}", "Copy it again."
            ) from error
    value = _read_pickle(path, trust, "Weights file")
    for _ in range(3):  # a state dict may be nested, for example {"checkpoint": ..., "ema": {"model": ...}}
        if isinstance(value, nn.Module):
            value = value.state_dict()
        if isinstance(value, Mapping) and not any(isinstance(v, torch.Tensor) for v in value.values()):
            value = next((value[k] for k in _STATE_DICT_KEYS if k in value), value)
    if not isinstance(value, Mapping) or not any(isinstance(v, torch.Tensor) for v in value.values()):
        keys = ", ".join(map(str, list(value)[:5])) if isinstance(value, Mapping) else type(value).__name__
        raise IntegrityError(f"Weights file {path} holds no state dict (found: {keys}).")
    return {str(k): v for k, v in value.items() if isinstance(v, torch.Tensor)}


def _load_weights(model: nn.Module, spec: ModelSpec) -> None:
    assert spec.weights is not None  # noqa: S101  (for the type checker)
    state = _read_state_dict(spec.weights, spec.trust_checkpoint)
    expected = set(model.state_dict())
    for prefix in _WRAPPER_PREFIXES:
        if all(key.startswith(prefix) for key in state) and not any(key in expected for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise ModelError(
            f"Weights {spec.weights} do not fit {spec.source}: {'; '.join(lines[:3])}"
            + (f" and {len(lines) - 3} more" if len(lines) > 3 else ""),
            "Check --kwargs and that the weights are of this architecture.",
        ) from error
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
        for what, keys in (("missing", result.missing_keys), ("unexpected", result.unexpected_keys))
        if keys
    ]
    if problems and spec.strict:
        raise ModelError(
            f"Weights {spec.weights} do not fit {spec.source}: {'; '.join(problems)}.",
            "Check --kwargs, or accept this with --non-strict.",
        )
    if len(result.missing_keys) == len(expected) and expected:
        raise ModelError(f"Weights {spec.weights} share no key with {spec.source}.")
