"""Write and read ``reference/`` of a bundle: PyTorch's results for the samples. Standard library and NumPy only.

``reference.json`` lists the contents. Indices count from 0 in its order: I inputs or outputs, S SRUs, K gates of no
known SRU, V their views (:mod:`scconv_deploy.gate.other_gates`).

``sample-N.npz``, one per sample::

    input:I                  inputs
    given:I, output:I        outputs of the model as given, and with its SRUs swapped
    rounded:I                for a half artifact: outputs with every value rounded
    open:S                   gate mask, packed bits
    x:S                      the gate's input
    margin:S                 float16: margin in units of the rounding bound (within 1 a gate may flip); NaN in
                             ill-conditioned groups
    decided:K                decisions, packed bits; float32 for roundings
    operand:K:V, scale:K:V, noise:K:V        margin, scale and noise of a view
    rounded noise:K:V        for a half artifact: noise of the rounded margin

Only the first sample has ``x``, ``margin`` and the views, as far as the size limit allows.

``sites.npz`` holds the parameters of each SRU's node (``P:S``, P a parameter's name), and its ``GateForm.cut_scale`` as
``reach:S``. ``sru-S.FORM.onnx``, for engines, is the SRU alone for an input like ``x:S`` (forms ``function``,
``plugin``, ``inlined``; see :mod:`scconv_deploy.verification.engine.sru_alone`), because the device has no onnx.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scconv_deploy.bundle.contents import REFERENCE
from scconv_deploy.bundle.manifest import differing_files, read_manifest
from scconv_deploy.bundle.reference_document import (
    REFERENCE_DOCUMENT,
    OtherGateEntry,
    ReferenceDocument,
    RoundedEntry,
    SampleEntry,
    SiteEntry,
)
from scconv_deploy.errors import IntegrityError, UsageError, first_line
from scconv_deploy.gate.margins import GateForm, margins
from scconv_deploy.gate.other_gates import OtherGate, View
from scconv_deploy.records.gates import Refusal
from scconv_deploy.records.quantization import is_code
from scconv_deploy.system.atomic import write_file
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun, ReferenceSource, RoundedRun, Site, SiteRun

_FORMS = ("function", "plugin", "inlined")
LARGEST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class EngineInputs:
    """Further inputs of a reference that engines of the artifact are judged by.

    Attributes:
        data: the type of the artifact's data, ``float32``, ``float16`` or ``bfloat16``.
        sru_models: function from a site and x's shape to the SRU's ONNX model by form; empty if the artifact has no
            node for it.
    """

    data: str
    sru_models: Callable[[Site, tuple[int, ...]], Mapping[Any, bytes]]


def write_reference(
    bundle: Path,
    source: ReferenceSource,
    runs: Iterable[ReferenceRun],
    nodes: Container[str],
    largest_bytes: int = LARGEST_BYTES,
    engines: EngineInputs | None = None,
    rounded_to: str = "",
    artifact: Any = None,
) -> None:
    """Write ``reference/`` from runs of the reference.

    Args:
        bundle: folder of the bundle.
        source: what was run.
        runs: the first one is always written, further ones as far as the size limit allows.
        nodes: the sites that the artifact has a node for.
        largest_bytes: size limit of ``reference/``; inputs, outputs and gates of the first run are always written.
        engines: data for engines; None writes none.
        rounded_to: the data type of a half artifact (``float16``, ``bfloat16``), in whose arithmetic it is judged.
        artifact: the half artifact, as for :meth:`.ReferenceSource.rounded`.
    """
    folder = bundle / REFERENCE
    left = largest_bytes
    entries: list[SampleEntry] = []
    sites: dict[str, Site] = {}
    redundant: dict[str, str] = {}
    for number, run in enumerate(runs):
        rounded = source.rounded(run, artifact, rounded_to) if rounded_to else None
        arrays = _outer_arrays(run, rounded)
        size = sum(array.nbytes for array in arrays.values())
        if number and size > left:
            break
        left -= size
        if not number:
            sites = {name: site.site for name, site in run.sites.items()}
            missing = [name for name in sites if name not in nodes]
            redundant = source.redundant(run, missing, [n for n in sites if n in nodes]) if missing else {}
            left -= _add_inner_arrays(arrays, run, left)
            if engines is not None:
                left -= _write_sru_models(folder, arrays, run, engines)
        _save(folder / f"sample-{number}.npz", arrays)
        noise = source.free_noise(run, engines.data) if engines is not None else {}
        entries.append(
            SampleEntry.of(run, noise, RoundedEntry.of(rounded, rounded_to) if rounded is not None else None)
        )
    _save(folder / "sites.npz", _site_arrays(sites))
    document = ReferenceDocument(
        schema_version=1,
        model=source.name,
        left_alone=tuple((refusal.path, refusal.reason) for refusal in source.left_alone),
        redundant=redundant,
        samples=tuple(entries),
        sites=tuple(map(SiteEntry.of, sites.values())),
        engine_data=engines.data if engines is not None else "",
    )
    write_file(folder / REFERENCE_DOCUMENT, document.as_bytes())


def _outer_arrays(run: ReferenceRun, rounded: RoundedRun | None) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for kind, values in (("input", run.inputs), ("given", run.given), ("output", run.outputs)):
        arrays |= {f"{kind}:{index}": value for index, value in enumerate(values.values())}
    arrays |= {f"decided:{i}": _packed(gate.decided) for i, gate in enumerate(run.others.values())}
    if rounded is not None:
        arrays |= {f"rounded:{index}": rounded.outputs[name] for index, name in enumerate(run.outputs)}
        arrays |= {
            f"rounded noise:{index}:{number}": view.noise
            for index, name in enumerate(run.others)
            if name in rounded.others
            for number, view in enumerate(rounded.others[name].views)
            if view.noise is not None
        }
    return arrays | {f"open:{i}": np.packbits(site.mask) for i, site in enumerate(run.sites.values())}


def _packed(decided: np.ndarray) -> np.ndarray:
    """Decisions as bits, and those of roundings as integers where they are small."""
    if decided.dtype == bool:
        return np.packbits(decided)
    small = decided.astype(np.int16) if np.abs(decided).max(initial=0) <= np.iinfo(np.int16).max else decided
    return small if np.array_equal(small, decided) else decided


def _add_inner_arrays(arrays: dict[str, np.ndarray], run: ReferenceRun, left: int) -> int:
    """Add inputs and margins of SRUs, in the model's order, up to ``left`` bytes. Returns the bytes added."""
    used = 0
    for index, site in enumerate(run.sites.values()):
        if site.x is None or not np.isfinite(site.x).all() or used + site.x.nbytes * 3 // 2 > left:
            continue
        found = margins(site.x, site.site.form)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(found.ill, np.nan, np.clip(found.margin / found.bound, -6e4, 6e4))  # float16's range
        arrays[f"x:{index}"], arrays[f"margin:{index}"] = site.x, ratio.astype(np.float16)
        used += site.x.nbytes * 3 // 2
    for index, gate in enumerate(run.others.values()):
        kept = {f"{name}:{index}:{number}": array for number, view in enumerate(gate.views)
                for name, array in (("operand", view.margin), ("scale", view.scale), ("noise", view.noise))
                if array is not None}  # fmt: skip
        size = sum(array.nbytes for array in kept.values())
        if used + size <= left:
            arrays |= kept
            used += size
    return used


def _write_sru_models(folder: Path, arrays: Arrays, run: ReferenceRun, engines: EngineInputs) -> int:
    """Write ONNX models of the SRUs whose inputs are kept; only these can be judged. Returns the bytes written."""
    used = 0
    for index, site in enumerate(run.sites.values()):
        if f"x:{index}" in arrays:
            for form, model in engines.sru_models(site.site, arrays[f"x:{index}"].shape).items():
                write_file(folder / _model_file(index, form), model)
                used += len(model)
    return used


def _model_file(index: int, form: str) -> str:
    return f"sru-{index}.{form}.onnx"


def _site_arrays(sites: Mapping[str, Site]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for index, site in enumerate(sites.values()):
        arrays |= {f"{name}:{index}": value for name, value in site.parameters.items()}
        arrays[f"reach:{index}"] = site.form.cut_scale
    return arrays


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # its stub takes allow_pickle for one of the arrays
    write_file(path, buffer.getvalue())


@dataclass(frozen=True, eq=False)
class RecordedReference:
    """A :class:`scconv_deploy.verification.reference.run.ReferenceSource` that reads a bundle's ``reference/``."""

    name: str
    left_alone: tuple[Refusal, ...]
    folder: Path
    entries: Sequence[SampleEntry]
    sites: Mapping[str, Site]
    why_redundant: Mapping[str, str]
    engine_data: str = ""
    swapped_link = "the reference was recorded when the bundle was made; PyTorch was not run"
    is_float32_form = False

    @property
    def recognised(self) -> bool:
        return bool(self.sites)

    @property
    def weights(self) -> Arrays:
        return {}

    @property
    def rounds_to_codes(self) -> bool:
        return any(is_code(gate.name) for entry in self.entries for gate in entry.others)

    @property
    def samples(self) -> range:
        """Sample numbers for :meth:`run`."""
        return range(len(self.entries))

    def run(self, sample: object) -> ReferenceRun:
        """Read a sample by its number (IntegrityError if it is damaged)."""
        number = int(str(sample))
        entry = self.entries[number]
        arrays = _load(self.folder / f"sample-{number}.npz")
        with _undamaged(self.folder):
            inputs, given, outputs = (
                {name: arrays[f"{kind}:{i}"] for i, name in enumerate(names)}
                for kind, names in (("input", entry.inputs), ("given", entry.outputs), ("output", entry.outputs))
            )
            sites = {}
            for index, site in enumerate(entry.sites):
                mask = _unpacked(arrays[f"open:{index}"], site.shape)
                sites[site.name] = SiteRun(self.sites[site.name], arrays.get(f"x:{index}"), mask, site.floor)
            return ReferenceRun(
                entry.name,
                inputs,
                given,
                outputs,
                outputs,
                dict(zip(entry.outputs, entry.floors, strict=True)),
                sites,
                float64_refusal=entry.float64_refusal,
                count=max((len(value) for value in inputs.values() if value.ndim), default=1),
                others={gate.name: _other_gate(gate, index, arrays) for index, gate in enumerate(entry.others)},
                spread=entry.spread,
                continuous=entry.continuous,
                part_floors=entry.part_floors,
            )

    def redundant(self, run: ReferenceRun, missing: Sequence[str], present: Sequence[str]) -> dict[str, str]:
        return {name: self.why_redundant[name] for name in missing if name in self.why_redundant}

    def sru(self, site: Site, x: np.ndarray) -> None:
        """None: the model in PyTorch is not at hand."""

    def sru_models(self, site: Site, shape: tuple[int, ...]) -> dict[Any, bytes]:
        """ONNX models of one SRU by form, for the recorded input; empty if none were written."""
        index = list(self.sites).index(site.name)
        places = {form: self.folder / _model_file(index, form) for form in _FORMS}
        if not all(place.is_file() for place in places.values()):
            return {}
        return {form: place.read_bytes() for form, place in places.items()}

    def free_noise(self, run: ReferenceRun, rounding: str) -> dict[str, float]:
        """Recorded noise of an engine's outputs, by name; empty for another data type than the artifact's."""
        entry = next(entry for entry in self.entries if entry.name == run.sample)
        return dict(entry.free_noise) if rounding == self.engine_data else {}

    def jumps(self, run: ReferenceRun, free: Sequence[str], data: str) -> dict[str, float]:
        """Empty: the model in PyTorch is not at hand."""
        return {}

    def between(self, run: ReferenceRun, outputs: Arrays) -> None:
        """None: the model in PyTorch is not at hand."""

    def between_noise(self, run: ReferenceRun, outputs: Arrays, rounding: str) -> None:
        """None: the model in PyTorch is not at hand."""

    def rounded(self, run: ReferenceRun, artifact: Any, data: str) -> RoundedRun | None:
        """Recorded results with every value rounded, without gate inputs; None for another type than the artifact's."""
        number, entry = next((n, entry) for n, entry in enumerate(self.entries) if entry.name == run.sample)
        found = entry.rounded
        if found is None or found.data != data:
            return None
        arrays = _load(self.folder / f"sample-{number}.npz")
        with _undamaged(self.folder):
            outputs = {name: arrays[f"rounded:{i}"] for i, name in enumerate(entry.outputs)}
            others = _with_rounded_noise(run.others, found.other_errors, arrays)
            return RoundedRun(outputs, found.floors, {}, found.input_floors, found.spread, others, found.part_floors)

    def modules(self, run: ReferenceRun, paths: Sequence[str]) -> Iterator[tuple[str, int, np.ndarray, float | None]]:
        """Empty: the model in PyTorch is not at hand."""
        return iter(())


def read_reference(bundle: Path) -> RecordedReference:
    """Read ``reference/`` of a bundle.

    Raises:
        UsageError: the bundle has none.
        IntegrityError: it is damaged.
    """
    folder = bundle / REFERENCE
    place = folder / REFERENCE_DOCUMENT
    if not place.is_file():
        raise UsageError(f"{bundle} has no {REFERENCE}/{place.name}.", "Give the model with --reference.")
    with _undamaged(place):
        document = ReferenceDocument.read(place.read_bytes())
    arrays = _load(folder / "sites.npz")
    with _undamaged(folder):
        sites = {entry.name: _site(entry, index, arrays) for index, entry in enumerate(document.sites)}
    return RecordedReference(
        name=document.model,
        left_alone=tuple(Refusal(path, reason) for path, reason in document.left_alone),
        folder=folder,
        entries=document.samples,
        sites=sites,
        why_redundant=document.redundant,
        engine_data=document.engine_data,
    )


def read_sealed_reference(bundle: Path) -> RecordedReference:
    """Check ``reference/`` of a bundle against the manifest, and read it.

    Raises:
        UsageError: the folder is no bundle, or it has no ``reference/``.
        IntegrityError: a file of ``reference/`` is damaged, or differs from the manifest.
    """
    changed = differing_files(bundle, read_manifest(bundle), f"{REFERENCE}/")
    if changed:
        raise IntegrityError(
            f"{bundle}: {changed[0]} is not the file that was sealed, so nothing can be judged by it.",
            "Copy the bundle again, or give the model with --reference.",
        )
    return read_reference(bundle)


def _site(entry: SiteEntry, index: int, arrays: Arrays) -> Site:
    parameters = {name: arrays[f"{name}:{index}"] for name in entry.parameters}
    form = GateForm(*entry.form, parameters["cut"], parameters["sign"], arrays[f"reach:{index}"])
    return Site(
        entry.name, entry.path, entry.variant, entry.operator, parameters, entry.attributes, entry.straddle, form
    )


def _other_gate(entry: OtherGateEntry, index: int, arrays: Arrays) -> OtherGate:
    decided = arrays[f"decided:{index}"]
    decided = _unpacked(decided, entry.shape) if decided.dtype == np.uint8 else decided.astype(np.float32)
    views = [
        View(view.kind, arrays[f"operand:{index}:{number}"], arrays[f"scale:{index}:{number}"],
             arrays.get(f"noise:{index}:{number}"), view.error)
        for number, view in enumerate(entry.views)
        if f"operand:{index}:{number}" in arrays
    ]  # fmt: skip
    return OtherGate(entry.name, entry.kind, decided, tuple(views))


def _unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape)


def _with_rounded_noise(
    others: Mapping[str, OtherGate], errors: Mapping[str, Sequence[float | None]], arrays: Arrays
) -> dict[str, OtherGate]:
    """Gates with the noise of rounded margins. The rounded margins were not kept; float32's lie within that noise."""
    found = {}
    for index, (name, gate) in enumerate(others.items()):
        noise = [arrays.get(f"rounded noise:{index}:{number}") for number in range(len(gate.views))]
        if gate.views and name in errors and all(n is not None for n in noise):
            views = (replace(v, noise=n, error=e) for v, n, e in zip(gate.views, noise, errors[name], strict=True))
            found[name] = replace(gate, views=tuple(views))
    return found


def _load(path: Path) -> dict[str, np.ndarray]:
    with _undamaged(path), np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except Exception as error:  # zipfile, zlib, json and NumPy each raise their own on a damaged file
        reason = first_line(error, type(error).__name__)
        raise IntegrityError(f"{path} is damaged: {reason}.", "Make the bundle again.") from error
