"""Checkpoints that somebody else may have written: read without executing their code, and loaded into a model."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scconv_deploy.errors import IntegrityError, ModelError, UntrustedError, UsageError

_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net", "ema", "params", "weights", "checkpoint")
_MODULE_KEYS = ("ema", "model", "net", "module")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch.save's archive, and a bare pickle
_SHOWN_KEYS = 5


def read_module(path: Path, trust: bool) -> nn.Module:
    """Read a checkpoint that is a pickled module, or a dictionary with one in it.

    Args:
        trust: execute what the file holds; without it the file is only looked at.

    Raises:
        UsageError: no such file, or it holds no module.
        ModelError: it needs code that is not here.
        IntegrityError, UntrustedError: it is damaged, or reading it would execute code.
    """
    value = _read_pickle(path, trust, "Checkpoint")
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, Mapping):
        for key in _MODULE_KEYS:
            if isinstance(value.get(key), nn.Module):
                return value[key]
    raise UsageError(f"{path} holds weights, not a module.", f"Give a MODEL and these as --weights {path}.")


def load_weights(model: nn.Module, path: Path, owner: str, *, strict: bool = True, trust: bool = False) -> str:
    """Load a state dict into a model.

    Args:
        path: ``.safetensors``, else what ``torch.save`` writes. A state dict may be nested, its keys may have the
            prefixes of ``DataParallel`` and ``torch.compile``.
        owner: what the model is called in messages.
        strict: missing and unexpected keys are an error.
        trust: see :func:`read_module`.

    Returns:
        What was missing and unexpected, in words; empty if nothing was.

    Raises:
        UsageError: no such file.
        ModelError: the weights are of another architecture.
        IntegrityError, UntrustedError: the file is damaged, or reading it would execute code.
    """
    return load_state(model, read_state_dict(path, trust), path, owner, strict=strict)


def load_state(model: nn.Module, state: dict[str, torch.Tensor], path: Path, owner: str, *, strict: bool = True) -> str:
    """The same for a state dict that was read from ``path``."""
    expected = set(model.state_dict())
    state = without_wrapper(state, expected)
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # sizes differ
        lines = [line.strip(" \t.") for line in str(error).splitlines()[1:]]
        more = f"; and {len(lines) - 1} more" if len(lines) > 1 else ""
        raise ModelError(
            f"Weights {path} do not fit {owner}: {lines[0] if lines else error}{more}.",
            "Check --kwargs and that the weights are of this architecture.",
        ) from error
    problems = "; ".join(
        f"{len(keys)} {what} ({', '.join(keys[:_SHOWN_KEYS])}{', ...' if len(keys) > _SHOWN_KEYS else ''})"
        for what, keys in (("missing", result.missing_keys), ("unexpected", result.unexpected_keys))
        if keys
    )
    if expected and not expected & set(state):
        raise ModelError(f"Weights {path} share no key with {owner}: {problems}.", "Give the weights of this model.")
    if problems and strict:
        raise ModelError(
            f"Weights {path} do not fit {owner}: {problems}.", "Check --kwargs, or accept this with --non-strict."
        )
    return problems


def without_wrapper(state: dict[str, torch.Tensor], expected: set[str]) -> dict[str, torch.Tensor]:
    """Strip the prefixes that wrappers put before every key, until the keys are the model's own."""
    while state and not expected & set(state):
        prefix = next((p for p in _WRAPPER_PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def read_state_dict(path: Path, trust: bool) -> dict[str, torch.Tensor]:
    """The state dict in a file; raises what :func:`load_weights` says of files."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        _require_file(path, "Weights file")
        try:
            return load_file(path, device="cpu")
        except (SafetensorError, ValueError, OSError) as error:
            raise IntegrityError(
                f"Weights file {path} is damaged or not safetensors: {_first_sentence(error)}.", "Copy it again."
            ) from error
    value = _read_pickle(path, trust, "Weights file")
    found = _find_state_dict(value)
    if found is None:
        keys = f"keys {', '.join(map(str, list(value)[:_SHOWN_KEYS]))}" if isinstance(value, Mapping) and value else ""
        raise IntegrityError(
            f"Weights file {path} holds no state dict, found {keys or type(value).__name__}.",
            "Save model.state_dict().",
        )
    return found


def _find_state_dict(value: Any) -> dict[str, torch.Tensor] | None:
    """The state dict in a checkpoint; training code nests it, for example ``{"checkpoint": {"model": ...}}``."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if not isinstance(value, Mapping):
        return None
    tensors = {str(key): item for key, item in value.items() if isinstance(item, torch.Tensor)}
    if tensors:
        return tensors
    nested = (_find_state_dict(value[key]) for key in _STATE_DICT_KEYS if key in value)
    return next((state for state in nested if state is not None), None)


def _require_file(path: Path, what: str) -> None:
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise UsageError(f"{what} {path} {problem}.", "Check the path.")
    with path.open("rb") as file:
        start = file.read(40)
    if not start:
        raise IntegrityError(f"{what} {path} is empty.", "Copy it again.")
    if start.startswith(b"version https://git-lfs"):
        raise IntegrityError(f"{what} {path} is a Git LFS pointer, not the file itself.", "Run git lfs pull.")


def _read_pickle(path: Path, trust: bool, what: str) -> Any:
    """torch.load, with errors that the user can act on."""
    _require_file(path, what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols and TorchScript: the errors below say it
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # on a damaged file torch.load raises anything; on a trusted one so does its code
        raise _read_error(path, trust, what, error) from error


def _read_error(path: Path, trust: bool, what: str, error: Exception) -> Exception:
    with path.open("rb") as file:
        is_pickle = file.read(4).startswith(_PICKLE_STARTS)
    torchscript = "TorchScript" in str(error)
    if not trust and (torchscript or (is_pickle and isinstance(error, pickle.UnpicklingError))):
        return UntrustedError(
            f"{what} {path} holds more than tensors; reading it would execute code.",
            "If you trust its author, add --trust-checkpoint; better, save a state dict as .safetensors.",
        )
    if trust and isinstance(error, (ImportError, AttributeError)):
        return ModelError(
            f"{what} {path} needs code that is not here: {_first_sentence(error)}.",
            "Run from the project that wrote it, or set PYTHONPATH.",
        )
    return IntegrityError(
        f"{what} {path} is damaged or not a PyTorch file: {_first_sentence(error)}.", "Copy it again."
    )


def _first_sentence(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0].rstrip(".")
