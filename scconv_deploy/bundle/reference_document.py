"""``reference.json``: names, shapes and noise floors of the arrays in a bundle's ``reference/``, and its SRU nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from scconv_deploy.gate.other_gates import OtherGate
from scconv_deploy.records.codec import decode, encode, parse
from scconv_deploy.verification.reference.run import ReferenceRun, RoundedRun, Site

REFERENCE_DOCUMENT = "reference.json"


@dataclass(frozen=True)
class SiteRunEntry:
    """Gates of one SRU on one sample: the shape of their mask, and the noise floor of the gate's input."""

    name: str
    shape: tuple[int, ...]
    floor: float | None


@dataclass(frozen=True)
class ViewEntry:
    """One view of a gate of no known SRU, see :class:`scconv_deploy.gate.other_gates.View`."""

    kind: str
    error: float | None


@dataclass(frozen=True)
class OtherGateEntry:
    """A gate of no known SRU on one sample."""

    name: str
    kind: str
    shape: tuple[int, ...]
    views: tuple[ViewEntry, ...]

    @classmethod
    def of(cls, gate: OtherGate) -> OtherGateEntry:
        views = tuple(ViewEntry(view.kind, view.error) for view in gate.views)
        return cls(gate.name, gate.kind, gate.decided.shape, views)


@dataclass(frozen=True)
class RoundedEntry:
    """A sample with every value rounded to ``data``, see :class:`.RoundedRun`."""

    data: str
    floors: dict[str, float | None]
    input_floors: dict[str, float]
    spread: float
    other_errors: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    part_floors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, rounded: RoundedRun, data: str) -> RoundedEntry:
        errors = {name: tuple(view.error for view in gate.views) for name, gate in rounded.others.items()}
        inputs, parts = dict(rounded.input_floors), dict(rounded.part_floors)
        return cls(data, dict(rounded.floors), inputs, rounded.spread, errors, parts)


@dataclass(frozen=True)
class SampleEntry:
    """A sample, see :class:`.ReferenceRun`; ``floors`` are in the order of the outputs.

    Attributes:
        free_noise: noise of an engine's outputs, by name.
        rounded: None, and no key in the file, where the artifact is float32.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    floors: tuple[float | None, ...]
    float64_refusal: str
    sites: tuple[SiteRunEntry, ...]
    others: tuple[OtherGateEntry, ...] = ()
    spread: float = 1.0
    continuous: bool = False
    part_floors: dict[str, float] = field(default_factory=dict)
    free_noise: dict[str, float] = field(default_factory=dict)
    rounded: RoundedEntry | None = None

    @classmethod
    def of(cls, run: ReferenceRun, free_noise: Mapping[str, float], rounded: RoundedEntry | None) -> SampleEntry:
        return cls(
            name=run.sample,
            inputs=tuple(run.inputs),
            outputs=tuple(run.given),
            floors=tuple(run.floors[name] for name in run.given),
            float64_refusal=run.float64_refusal,
            sites=tuple(SiteRunEntry(name, site.mask.shape, site.floor) for name, site in run.sites.items()),
            others=tuple(map(OtherGateEntry.of, run.others.values())),
            spread=run.spread,
            continuous=run.continuous,
            part_floors=dict(run.part_floors),
            free_noise=dict(free_noise),
            rounded=rounded,
        )


@dataclass(frozen=True)
class SiteEntry:
    """The node of one SRU, see :class:`.Site`; ``form`` is num_groups, ddof, eps_var, eps_std, uncentred."""

    name: str
    path: str
    variant: str
    operator: str
    parameters: tuple[str, ...]
    attributes: dict[str, int | str | float]
    straddle: bool
    form: tuple[int, int, float, float, bool]

    @classmethod
    def of(cls, site: Site) -> SiteEntry:
        form = site.form
        return cls(
            name=site.name,
            path=site.path,
            variant=site.variant,
            operator=site.operator,
            parameters=tuple(site.parameters),
            attributes=dict(site.attributes),
            straddle=site.straddle,
            form=(form.num_groups, form.ddof, form.eps_var, form.eps_std, form.uncentred),
        )


@dataclass(frozen=True)
class ReferenceDocument:
    """Content of ``reference.json``.

    Attributes:
        left_alone: (path, reason) of candidates that were not recognised.
        redundant: why sites without a node need none, by name.
        engine_data: data type of the engines that the reference was recorded for, "" for none.
    """

    schema_version: Literal[1]
    model: str
    left_alone: tuple[tuple[str, str], ...]
    redundant: dict[str, str]
    samples: tuple[SampleEntry, ...]
    sites: tuple[SiteEntry, ...]
    engine_data: str = ""

    @classmethod
    def read(cls, content: bytes) -> ReferenceDocument:
        """Decode the content of ``reference.json`` (DecodeError)."""
        return decode(cls, parse(content))

    def as_bytes(self) -> bytes:
        """Encode as the content of ``reference.json``."""
        document = encode(self)
        for sample in document["samples"]:
            if sample["rounded"] is None:
                del sample["rounded"]
        return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
