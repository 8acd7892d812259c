"""The tensors of a checkpoint that are the model's, by the entry and the one prefix that make most keys fit.

Training code nests state dicts in any way and wraps models, so neither names of entries nor of wrappers are known here.
Every mapping with tensors in it is an entry; each is tried with every prefix of its keys taken off, and with every
prefix of the model's keys put on. A key fits where the model has one of that name and shape. A list of tensors is an
entry too: moving averages (``torch_ema``) are lists in the order of ``model.parameters()``, and fit by that order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scconv_deploy.errors import UsageError

TOP = "."
"""Name of the checkpoint itself for ``--weights-key``, without any prefix."""

_DEEPEST = 8
_LEAST_SHARE = 0.1
"""Share of the model's keys that a prefix must be able to give; a smaller share is a coincidence of names."""
_MOST_KEYS = 500_000
"""Keys to look up for one entry: half a second."""
_WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which torch's wrappers hold a module: compile, DataParallel, activation checkpointing, sharding."""
_COUNTS_BATCHES = "num_batches_tracked"
"""Buffer that torch fills in where an old state dict lacks it; eval mode does not read it."""


@dataclass(frozen=True)
class Entry:
    """A mapping or list with tensors in a checkpoint: its dotted path ("" for the checkpoint itself) and the tensors.

    Attributes:
        path: dotted.
        tensors: by key; of a list, by index.
        listed: whether it is a list, whose order stands for the names.
        wrappers: names of torch's wrappers of inner modules (``layer1._orig_mod.0.weight``), left out of the keys.
    """

    path: str
    tensors: Mapping[str, Tensor]
    listed: bool = False
    wrappers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expected:
    """Tensors that a model expects from its weights.

    Attributes:
        tensors: by key.
        parameters: the keys of those that training moves.
        order: one key for each parameter, in the order of ``model.parameters()``.
        aliases: key -> a number; the keys that are one tensor have the same one.
        prefixes: how many keys have each dotted prefix.
    """

    tensors: Mapping[str, Tensor]
    parameters: frozenset[str]
    order: tuple[str, ...]
    aliases: Mapping[str, int]
    prefixes: Counter[str]

    @classmethod
    def of(cls, model: nn.Module) -> Expected:
        tensors = {key: t for key, t in model.state_dict().items() if isinstance(t, Tensor)}
        numbers: dict[Any, int] = {}
        aliases = {key: numbers.setdefault(_place(key, t), len(numbers)) for key, t in tensors.items()}
        parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
        return cls(
            tensors=tensors,
            parameters=parameters & tensors.keys(),
            order=tuple(name for name, _ in model.named_parameters() if name in tensors),
            aliases=aliases,
            prefixes=_counts(tensors),
        )

    @property
    def needed(self) -> tuple[str, ...]:
        """The keys that must be given; torch itself fills the others in."""
        return tuple(key for key in self.tensors if not key.endswith(_COUNTS_BATCHES))

    def lacking(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Needed keys that a set of keys lacks, under this name or another."""
        held = {self.aliases[key] for key in keys}
        return tuple(key for key in self.needed if self.aliases[key] not in held)


def _place(key: str, tensor: Tensor) -> Any:
    """Place of a tensor's numbers in memory; its key where it has none."""
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)) or tensor.is_meta or not tensor.numel():
        return key
    if tensor.layout != torch.strided:
        return key
    return tensor.data_ptr(), tensor.shape, tensor.stride()


@dataclass(frozen=True)
class Fit:
    """One way to read weights.

    Attributes:
        entry: that they are read from.
        prefix: of its keys, taken off.
        added: prefix of the model's keys, put on.
        fitting: model's key -> entry's key, of the same shape.
        reshaped: the same, of another shape.
        whole: whether nothing is lacking.
        moved: whether nothing that training moves is lacking; a moving average often keeps no more.
    """

    entry: Entry
    prefix: str
    added: str
    fitting: Mapping[str, str]
    reshaped: Mapping[str, str]
    whole: bool
    moved: bool

    @property
    def label(self) -> str:
        """The name of this reading for ``--weights-key``."""
        return _label(self.entry.path, self.prefix)

    @property
    def count(self) -> int:
        """Number of tensors that fit, without counts of batches, which fit everywhere."""
        return sum(not name.endswith(_COUNTS_BATCHES) for name in self.fitting)

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Sort key: the tensors that fit, then those of which only the name fits."""
        return self.whole, self.count, len(self.reshaped)

    @property
    def inside(self) -> dict[str, str]:
        """Model's key -> entry's key for every key with the prefix, also those that the model lacks."""
        if self.entry.listed:
            return dict(self.fitting)
        return {self.added + k[len(self.prefix) :]: k for k in self.entry.tensors if k.startswith(self.prefix)}

    def holds_the_same_as(self, other: Fit, expected: Expected) -> bool:
        """Whether two readings give the model the same numbers, bit for bit."""
        both = [name for name in self.fitting if name in other.fitting and not name.endswith(_COUNTS_BATCHES)]
        if not (self.whole or other.whole) and self.fitting.keys() != other.fitting.keys():
            return False
        return all(
            same_numbers(
                self.entry.tensors[self.fitting[name]],
                other.entry.tensors[other.fitting[name]],
                expected.tensors[name].dtype,
            )
            for name in both
        )


def same_numbers(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are the same as a type, bit for bit."""
    if a is b:
        return True
    if a.is_quantized or b.is_quantized or a.layout != torch.strided or b.layout != torch.strided:
        return False
    a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _label(path: str, prefix: str) -> str:
    return ".".join(part for part in (path, prefix.rstrip(".")) if part) or TOP


def _tensor(value: Any) -> Tensor | None:
    """A tensor, or an array of numbers as one; None of anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.isnative:
        return torch.from_numpy(value.copy())
    return value if isinstance(value, Tensor) else None


def entry_names(found: Iterable[Entry]) -> list[str]:
    """Names of the entries for ``--weights-key``."""
    return list(dict.fromkeys(entry.path or TOP for entry in found))


def entries(value: Any) -> tuple[Entry, ...]:
    """Every mapping with tensors in a checkpoint, from the outside in; an optimizer's state is none."""
    return tuple(_entries(value, (), set()))


def _entries(value: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[Entry]:
    if isinstance(value, nn.Module):
        yield from _entries(value.state_dict(), path, set())
        return
    descended = id(value) in seen or len(path) > _DEEPEST
    seen.add(id(value))  # what is in two places is an entry in both, and is descended into once
    if isinstance(value, (list, tuple)):
        inner: Iterable[tuple[str, Any]] = ((str(n), item) for n, item in enumerate(value))
        tensors = {str(n): t for n, item in enumerate(value) if (t := _tensor(item)) is not None}
        if tensors and len(tensors) == len(value):
            yield Entry(".".join(path), tensors, listed=True)
    elif isinstance(value, Mapping):
        tensors = {str(key): t for key, item in value.items() if (t := _tensor(item)) is not None}
        if tensors:
            entry = Entry(".".join(path), tensors)
            yield entry
            yield from _without_wrappers(entry)
        # torch's optimizers save their state beside their groups of parameters
        inner = ((str(k), item) for k, item in value.items() if not ("param_groups" in value and k == "state"))
    else:
        return
    for name, item in () if descended else inner:
        yield from _entries(item, (*path, name), seen)


def _without_wrappers(entry: Entry) -> Iterator[Entry]:
    """The entry with the names of wrappers left out of its keys, as a second reading; none if it has none inside."""
    names: dict[str, None] = {}
    tensors: dict[str, Tensor] = {}
    for key, tensor in entry.tensors.items():
        parts = key.split(".")
        names.update(dict.fromkeys(part for part in parts[1:-1] if part in _WRAPPERS))
        tensors[".".join([*(part for part in parts[:-1] if part not in _WRAPPERS), parts[-1]])] = tensor
    if names and len(tensors) == len(entry.tensors):
        yield Entry(entry.path, tensors, wrappers=tuple(names))


def fits(found: Iterable[Entry], expected: Expected, key: str | None = None) -> list[Fit]:
    """The ways to read each entry, best first: all that give every parameter, else those that give most.

    Args:
        key: what ``--weights-key`` says: only these entries and prefixes, and what is below them.
    """
    ways = [fit for entry in found for fit in _fits_of(entry, expected, key)]
    return sorted(ways, key=lambda fit: fit.rank, reverse=True)  # stable: outer entries and short prefixes first


def _fits_of(entry: Entry, expected: Expected, key: str | None) -> list[Fit]:
    if entry.listed:
        return [] if key not in (None, _label(entry.path, "")) else _fits_in_order(entry, expected)
    made: list[Fit] = []
    best = 0
    fewest = len({expected.aliases[name] for name in expected.parameters})  # that can give every parameter
    for prefix, added, most in _prefixes(entry, expected):
        label = _label(entry.path, prefix)
        if key is not None and label != key and not label.startswith(f"{key}."):
            continue
        if most < min(best, fewest or best):
            break
        fit = _fit(entry, prefix, added, expected)
        if fit.fitting or fit.reshaped:
            made.append(fit)
            best = max(best, len(fit.fitting))
    top = max((fit.rank for fit in made), default=None)
    return [fit for fit in made if fit.moved or fit.rank == top]


def _fits_in_order(entry: Entry, expected: Expected) -> list[Fit]:
    """A list of tensors as the model's parameters in order, where each has the same shape."""
    names = expected.order
    if not names or len(names) != len(entry.tensors):
        return []
    fitting = dict(zip(names, entry.tensors, strict=True))
    if not all(_same_shape(entry.tensors[index], expected.tensors[name]) for name, index in fitting.items()):
        return []
    return [Fit(entry, "", "", fitting, {}, whole=not expected.lacking(names), moved=True)]


def _fit(entry: Entry, prefix: str, added: str, expected: Expected) -> Fit:
    fitting: dict[str, str] = {}
    reshaped: dict[str, str] = {}
    for name, tensor in expected.tensors.items():
        given = entry.tensors.get(prefix + name[len(added) :]) if name.startswith(added) else None
        if given is not None:
            (fitting if _same_shape(given, tensor) else reshaped)[name] = prefix + name[len(added) :]
    lacking = set(expected.lacking(fitting))
    moved = bool(expected.parameters) and not lacking & expected.parameters
    return Fit(entry, prefix, added, fitting, reshaped, not lacking, moved)


def _same_shape(given: Tensor, expected: Tensor) -> bool:
    if isinstance(expected, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return True
    one_number = expected.dim() == 0 and given.shape == (1,)  # as torch 0.3 saved them
    return given.shape == expected.shape or one_number


def _prefixes(entry: Entry, expected: Expected) -> list[tuple[str, str, int]]:
    """(taken off, put on, how many keys can fit at most), most first and short ones first among equals."""
    theirs, ours, total = _counts(entry.tensors), expected.prefixes, len(expected.tensors)
    common = [q for q, count in ours.items() if count == total]  # "" among them
    pairs = [(p, q) for p in theirs for q in common] + [("", q) for q in ours if q not in common]
    bounds = {(p, q): min(theirs[p], ours[q]) for p, q in pairs if not _ends_alike(p, q)}
    least = max(1.0, _LEAST_SHARE * total)
    wanted = [(p, q, most) for (p, q), most in bounds.items() if most >= least or not (p or q)]
    wanted.sort(key=lambda way: (-way[2], len(way[0]) + len(way[1])))
    return wanted[: max(10, _MOST_KEYS // max(1, total))]


def _ends_alike(prefix: str, added: str) -> bool:
    """Whether the pair means the same without the last name of both."""
    return bool(prefix and added) and prefix.split(".")[-2] == added.split(".")[-2]


def _counts(keys: Iterable[str]) -> Counter[str]:
    """Number of keys under each dotted prefix."""
    counts: Counter[str] = Counter()
    for key in keys:
        names = key.split(".")[:-1]
        counts.update(["".join(f"{name}." for name in names[:n]) for n in range(len(names) + 1)])
    return counts


def choose(ways: list[Fit], expected: Expected, path: Path, owner: str, key: str | None = None) -> Fit:
    """The best way to read the weights.

    Raises:
        UsageError: several are as good and give other numbers.
    """
    first = ways[0]
    rivals = [way for way in ways if way.moved or way.rank[:2] == first.rank[:2]]
    rivals = [way for way in rivals if way.label == key] or rivals
    best = rivals[0]
    others = [way for way in rivals[1:] if not way.holds_the_same_as(best, expected)]
    if not others:
        return best
    shown = list({way.label: way for way in (*reversed(others), best)}.values())[::-1]
    labels = [way.label for way in shown]
    if len(labels) == 1:
        places = ", ".join(way.added or TOP for way in (best, *others))
        raise UsageError(
            f"Weights {path} fit {owner} in several places ({places}).",
            "Save them with the model's own keys.",
        )
    raise UsageError(
        f"Weights {path} hold {len(labels)} sets that fit {owner} and differ: "
        f"{', '.join(f'{way.label} ({len(way.fitting)} of {len(expected.tensors)} tensors)' for way in shown)}.",
        f"Choose one: {' or '.join(f'--weights-key {label}' for label in labels)}.",
    )
