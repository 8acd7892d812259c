"""Checkpoints of any origin, read without executing code in them."""

from __future__ import annotations

import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scconv_deploy.errors import IntegrityError, ModelError, UntrustedError, UsageError, first_line
from scconv_deploy.model.file_kind import holds_weights_alone, readable_kind
from scconv_deploy.model.harmless import SAFE
from scconv_deploy.model.weights_fit import Entry, entries, same_numbers
from scconv_deploy.model.yolo import is_yolo

_SHOWN_KEYS = 5
_RUN_THERE = "Give the folder of the code that wrote it: --path FOLDER."


@dataclass(frozen=True)
class PickledModule:
    """A module out of a checkpoint.

    Attributes:
        module: as it was pickled.
        file: the dictionary that it was in; empty where the module itself was pickled.
    """

    module: nn.Module
    file: Mapping[str, Any]


def read_module(path: Path, trust: bool, key: str | None = None) -> PickledModule:
    """Read a checkpoint that is a pickled module, or a dictionary with one in it.

    Of a dictionary of ultralytics the moving average ``ema`` is taken, as ultralytics does.

    Args:
        trust: execute what the file holds; without it the file is only looked at.
        key: which of the dictionary's modules.

    Raises:
        UsageError: no such file, it holds no module, none of that key, or several that differ.
        ModelError: it needs code that is not here, or it is TorchScript or an exported program.
        IntegrityError, UntrustedError: it is damaged, or reading it would execute code.
    """
    value = _read(path, trust, "Checkpoint")
    modules = {"": value} if isinstance(value, nn.Module) else {}
    file = value if isinstance(value, Mapping) else {}
    if file:
        modules = {str(name): item for name, item in value.items() if isinstance(item, nn.Module)}
    if not modules:
        raise UsageError(f"{path} holds weights, not a module.", f"Give a MODEL and these as --weights {path}.")
    if key is not None:
        if key not in modules:
            raise UsageError(
                f"--weights-key {key}: {path} holds no such module.",
                "Leave it out." if "" in modules else f"It holds {', '.join(modules)}.",
            )
        return PickledModule(modules[key], file)
    if is_yolo(modules.get("ema")):
        return PickledModule(modules["ema"], file)
    weighty = {name: module for name, module in modules.items() if module.state_dict()} or modules  # a loss has none
    first, *others = weighty.values()
    if any(not _same_module(first, other) for other in others):
        raise UsageError(
            f"{path} holds {len(weighty)} modules that differ: {', '.join(weighty)}.",
            f"Choose one: {' or '.join(f'--weights-key {name}' for name in weighty)}.",
        )
    return PickledModule(first, file)


def _same_module(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return type(a) is type(b) and ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and same_numbers(a, b, a.dtype)
    return type(a) is type(b) and bool(a == b)


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights and the mappings with tensors in it."""

    path: Path
    entries: tuple[Entry, ...]


def read_weights(path: Path, trust: bool = False) -> WeightsFile:
    """Read a file of weights; its content says what it is, not its name.

    Args:
        trust: see :func:`read_module`.

    Raises:
        UsageError: no such file.
        ModelError: it holds a model, not weights.
        IntegrityError, UntrustedError: it is damaged, holds no tensors, or reading it would execute code.
    """
    value = _read(path, trust, "Weights file")
    found = entries(value)
    if not found:
        keys = f"keys {', '.join(map(str, list(value)[:_SHOWN_KEYS]))}" if isinstance(value, Mapping) and value else ""
        raise IntegrityError(
            f"Weights file {path} holds no state dict, found {keys or type(value).__name__}.",
            "Save model.state_dict().",
        )
    return WeightsFile(path, found)


def _read(path: Path, trust: bool, what: str) -> Any:
    """Contents of a file; what torch raises becomes an error with a remedy."""
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise UsageError(f"{what} {path} {problem}.", "Check the path.")
    kind = readable_kind(path, what)
    if kind == "safetensors" or (kind == "unknown" and path.suffix == ".safetensors"):
        return _read_safetensors(path, what)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE):
            warnings.simplefilter("ignore")  # on pickle protocols: the errors below say it
            with path.open("rb") as file:  # given a path, torch.load goes by its name
                return torch.load(file, map_location="cpu", weights_only=not trust)
    except Exception as error:  # on a damaged file torch.load raises anything; on a trusted one so does its code
        raise _read_error(path, trust, what, kind == "pickle", error) from error


def _read_safetensors(path: Path, what: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, ValueError, OSError) as error:
        raise IntegrityError(
            f"{what} {path} is damaged or not safetensors: {_first_sentence(error)}.", "Copy it again."
        ) from error


def _read_error(path: Path, trust: bool, what: str, is_pickle: bool, error: Exception) -> Exception:
    if not trust and is_pickle and isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        holds = f"more than tensors ({named[1]})" if named else "more than tensors"
        if what == "Checkpoint" and holds_weights_alone(path):
            return UsageError(
                f"{path} holds weights, not a module, and {holds}.",
                f"Give a MODEL and these as --weights {path}; if you trust its author, add --trust-checkpoint.",
            )
        return UntrustedError(
            f"{what} {path} holds {holds}; reading it would execute code.",
            "If you trust its author, add --trust-checkpoint; better, save a state dict as .safetensors.",
        )
    if trust and isinstance(error, (ImportError, AttributeError)):
        return _missing_code(f"{what} {path}", error)
    if trust and "process group" in str(error):
        return ModelError(
            f"{what} {path} is a module inside DistributedDataParallel, which can be read in a process group only.",
            "Save its model.module, or the state dict, and give that as --weights.",
        )
    return IntegrityError(
        f"{what} {path} is damaged or not a PyTorch file: {_first_sentence(error)}.", "Copy it again."
    )


def _missing_code(file: str, error: ImportError | AttributeError) -> ModelError:
    """Name the module or class that a pickle looks for and that is not here; and the remedy."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.split(".")[0]
        found = getattr(sys.modules.get(top), "__file__", None)
        other = f"; the {top} that was imported ({found}) has none" if found and top != error.name else ""
        return ModelError(
            f"{file} needs the module {error.name}, which cannot be imported{other}.",
            f"Give the folder of the code that trained it, which holds {top}: --path FOLDER; or install it.",
        )
    lost = re.search(r"get attribute '([\w.]+)' on <module '([\w.]+)'(?: from '(.+)')?", str(error))
    if lost is None:
        return ModelError(f"{file} needs code that is not here: {_first_sentence(error)}.", _RUN_THERE)
    name, module, place = lost.groups()
    if module.endswith("__main__"):  # with python -m, its package stands before it
        return ModelError(
            f"{file} needs the class {name} of the script that was run when it was saved.",
            "Define the class in a module that the script imports, and save again; or save a state dict.",
        )
    return ModelError(
        f"{file} needs the class {name} of {module}, and the one that was imported ({place}) has none.",
        f"Give the folder of the code that trained it, which holds {module.split('.')[0]}: --path FOLDER.",
    )


def _first_sentence(error: BaseException) -> str:
    return first_line(error, type(error).__name__).split(". ")[0].rstrip(".")
