"""Weights from a file into a model, with a record of what was loaded and what was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.model.weights import WeightsFile
from scconv_deploy.model.weights_fit import Entry, Expected, Fit, choose, entry_names, fits, same_numbers

_SHOWN_KEYS = 5
_WORTH_NAMING = 0.5  # of the model's tensors that another entry gives


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """Weights read from a file into a model, tensor by tensor.

    Attributes:
        path: the file.
        entry: dotted path of the mapping in it, "" for the outermost one.
        prefix: of the file's keys, taken off.
        added: prefix of the model's keys, put on.
        loaded, expected: how many of the model's tensors were loaded, and how many it has.
        missing: model's keys that the file lacks; they keep what the model was built with.
        unexpected: the file's keys that the model lacks.
        reshaped: model's key -> both shapes, where they differ; such a tensor is not loaded.
        outside: keys beside the prefix, which are not the model's.
        wrappers: names of wrappers inside the file's keys, left out.
        converted: what was converted, such as ``float16 to float32`` -> how many tensors.
        others: other entries that fit at least in half -> how many of their tensors fit.
    """

    path: Path
    entry: str
    prefix: str
    added: str
    loaded: int
    expected: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: Mapping[str, str]
    outside: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()
    converted: Mapping[str, int] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The weights that were read, in one line."""
        parts = [f"{self.loaded} of {self.expected} tensors loaded"]
        parts += [f"from its entry {self.entry}"] if self.entry else []
        parts += [f"prefix {self.prefix} taken off"] if self.prefix else []
        parts += [f"prefix {self.added} put on"] if self.added else []
        parts += [f"{' and '.join(self.wrappers)} left out of keys"] if self.wrappers else []
        parts += [f"{count} converted from {types}" for types, count in self.converted.items()]
        return f"weights {self.path}: {', '.join(parts)}"

    @property
    def misfits(self) -> tuple[tuple[str, str], ...]:
        """Tensors that fail a strict load, as (what, how many and which)."""
        shapes = tuple(f"{key} {shapes}" for key, shapes in self.reshaped.items())
        found = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes))
        return tuple((what, listed(keys)) for what, keys in found if keys)

    @property
    def left(self) -> tuple[tuple[str, str], ...]:
        """Tensors that were not loaded or not used, as (what, how many and which)."""
        others = tuple(f"{name} ({count} tensors fit)" for name, count in self.others.items())
        beside = (("beside the prefix", self.outside), ("other entries that fit, not read", others))
        return (*self.misfits, *((what, listed(keys)) for what, keys in beside if keys))


def listed(names: Sequence[str]) -> str:
    """The number of names, and the first few."""
    return f"{len(names)} ({', '.join(names[:_SHOWN_KEYS])}{', ...' if len(names) > _SHOWN_KEYS else ''})"


def load_weights(
    model: nn.Module, weights: WeightsFile, owner: str, *, strict: bool = True, key: str | None = None
) -> LoadedWeights:
    """Load a state dict into a model.

    Args:
        weights: the state dict may be nested, and its keys may have a prefix or lack one, see
            :mod:`scconv_deploy.model.weights_fit`.
        owner: what the model is called in messages.
        strict: missing and unexpected keys, and other shapes, are an error.
        key: dotted path of the entry, and the prefix if it has one, where several fit.

    Raises:
        UsageError: several entries that fit, or none that ``key`` names.
        ModelError: the weights are of another architecture.
    """
    found, path = weights.entries, weights.path
    expected = Expected.of(model)
    ways = fits(found, expected, key)
    if not ways or not ways[0].count:
        raise _no_fit(ways, found, expected, path, owner, key)
    fit = choose(ways, expected, path, owner, key)
    _require_loadable(fit, expected, path, owner)
    inside, outside = _inside(fit, ways if key is None else fits([fit.entry], expected))
    state = {name: fit.entry.tensors[given] for name, given in inside.items()}
    missing, unexpected, lost = _load(model, state, fit.reshaped.keys(), path, owner)
    held = {expected.aliases[name] for name in state.keys() - lost if name in expected.aliases}
    missing = [name for name in missing if name not in lost and expected.aliases.get(name) not in held]
    loaded = LoadedWeights(
        path=path, entry=fit.entry.path, prefix=fit.prefix, added=fit.added,
        loaded=len(expected.tensors) - len(expected.tensors.keys() & {*missing, *lost}), expected=len(expected.tensors),
        missing=tuple(missing),
        unexpected=tuple(inside[name] for name in unexpected),
        reshaped={name: _shapes(fit, name, expected) for name in fit.reshaped if name in lost},
        outside=outside, wrappers=fit.entry.wrappers, converted=_converted(fit, expected),
        others=_others(fit, ways, expected),
    )  # fmt: skip
    if strict and loaded.misfits:
        raise ModelError(
            f"Weights {path} do not fit {owner}: {_words(loaded)}.", "Check --kwargs, or accept this with --non-strict."
        )
    return loaded


def _words(loaded: LoadedWeights) -> str:
    """The tensors that do not fit, and how many fit."""
    wrong = [which.replace(" (", f" {what} (", 1) for what, which in loaded.misfits]
    return "; ".join([*wrong, loaded.summary.partition(": ")[2].replace(" loaded", " fit")])


def _no_fit(
    ways: Sequence[Fit], found: Sequence[Entry], expected: Expected, path: Path, owner: str, key: str | None
) -> UsageError | ModelError:
    """The error where no tensor fits: none has a name, none the model's names, or none the model's shapes."""
    names = entry_names(found)
    if key is not None and not ways and not any(name == key or name.startswith(f"{key}.") for name in names):
        return UsageError(f"--weights-key {key}: {path} holds no such entry.", f"It holds {', '.join(names[:10])}.")
    if ways:
        shapes = [f"{name} {_shapes(ways[0], name, expected)}" for name in ways[0].reshaped]
        return ModelError(
            f"Weights {path} do not fit {owner}: none of {len(expected.tensors)} tensors fits, "
            f"{listed(shapes).replace(' (', ' of another shape (', 1)}.",
            "Check --kwargs and that the weights are of this architecture.",
        )
    theirs = max((tuple(entry.tensors) for entry in found), key=len, default=())
    lacks = listed(tuple(expected.tensors)).replace(" (", " missing (", 1)
    return ModelError(
        f"Weights {path} share no key with {owner}: {lacks}; {listed(theirs).replace(' (', ' unexpected (', 1)}.",
        "Give the weights of this model.",
    )


def _require_loadable(fit: Fit, expected: Expected, path: Path, owner: str) -> None:
    """Refuse tensors that torch would silently load as other numbers."""
    given = {name: fit.entry.tensors[key] for name, key in fit.fitting.items()}
    for what, wrong in (
        ("quantised", [n for n, t in given.items() if t.is_quantized]),
        ("complex", [n for n, t in given.items() if t.is_complex() and not expected.tensors[n].is_complex()]),
    ):
        if wrong:
            raise ModelError(
                f"Weights {path} hold {what} tensors, and {owner} is float32: {listed(wrong)}.",
                "Give the float weights that they were made from.",
            )
    for name, tensor in given.items():
        held = expected.tensors[name].dtype
        if (
            tensor.dtype == torch.float64
            and held == torch.float32
            and (tensor.isfinite() & tensor.float().isinf()).any()
        ):
            raise ModelError(
                f"Weights {path} hold numbers in {name} that float32 cannot hold.", "Give float32 weights."
            )
    first: dict[int, str] = {}
    for name, tensor in given.items():
        other = first.setdefault(expected.aliases[name], name)
        if not same_numbers(given[other], tensor, expected.tensors[name].dtype):
            raise ModelError(
                f"Weights {path} hold other numbers for {other} than for {name}, which are one tensor in {owner}.",
                "Give the weights of this model, or build it without sharing them.",
            )


def _inside(fit: Fit, ways: Iterable[Fit]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Model's key -> entry's key for keys with the prefix, and the other keys.

    Below the prefix there may be whole copies, as of a moving average; they count as beside it.
    """
    copies = tuple(
        way.prefix
        for way in ways
        if way.entry is fit.entry and way.moved and way.prefix != fit.prefix and way.prefix.startswith(fit.prefix)
    )
    inside = {name: key for name, key in fit.inside.items() if not key.startswith(copies or ("\0",))}
    used = set(inside.values())
    return inside, tuple(key for key in fit.entry.tensors if key not in used)


def _load(
    model: nn.Module, state: Mapping[str, torch.Tensor], reshaped: Iterable[str], path: Path, owner: str
) -> tuple[list[str], list[str], set[str]]:
    """Load; return missing and unexpected keys, and those left out for their shape. Some modules take other shapes."""
    lost = set(reshaped)
    try:
        result = model.load_state_dict(dict(state), strict=False)
        lost = set()
    except RuntimeError:
        try:
            result = model.load_state_dict({n: t for n, t in state.items() if n not in lost}, strict=False)
        except RuntimeError as error:
            lines = [line.strip(" \t.") for line in str(error).splitlines()[1:]]
            raise ModelError(
                f"Weights {path} do not fit {owner}: {lines[0] if lines else error}.",
                "Check --kwargs and that the weights are of this architecture.",
            ) from error
    return list(result.missing_keys), list(result.unexpected_keys), lost


def _shapes(fit: Fit, name: str, expected: Expected) -> str:
    given = fit.entry.tensors[fit.reshaped[name]].shape
    return f"is {_shape(given)}, expected {_shape(expected.tensors[name].shape)}"


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "one number"


def _converted(fit: Fit, expected: Expected) -> dict[str, int]:
    pairs = ((fit.entry.tensors[key].dtype, expected.tensors[name].dtype) for name, key in fit.fitting.items())
    return dict(Counter(f"{a} to {b}".replace("torch.", "") for a, b in pairs if a != b))


def _others(fit: Fit, ways: Iterable[Fit], expected: Expected) -> dict[str, int]:
    """Entries beside the one that was read, best fit of each."""
    named = {way.label: len(way.fitting) for way in reversed(list(ways)) if way.entry.path != fit.entry.path}
    return {name: count for name, count in named.items() if count >= _WORTH_NAMING * len(expected.tensors)}
