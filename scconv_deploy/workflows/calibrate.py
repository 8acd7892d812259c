"""Calibration of a float ONNX file on the user's data: batches of rows, observed values, ranges, and their cache."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from scconv_deploy import zoo
from scconv_deploy.errors import UsageError
from scconv_deploy.graph import inputs
from scconv_deploy.precision.calibration import Calibration, Method, Observer
from scconv_deploy.precision.int8 import Prepared
from scconv_deploy.records.stage import Progress
from scconv_deploy.runtimes.half import runner_of
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.system.atomic import write_file
from scconv_deploy.verification.data import sources
from scconv_deploy.verification.data.blocks import Block, DataSource
from scconv_deploy.verification.data.images import Affine
from scconv_deploy.verification.reference.onnx_file import NamedArrays
from scconv_deploy.verification.vision.targets import Task

RANDOM = "random"
"""Name of seeded noise as calibration data, which nothing takes by itself."""
_SOURCE = "scconv_deploy.source"
_DEEP = 2
"""Batches on which a file is judged in full where there is no model; the others run free."""
_AT_ONCE = 8
"""Rows in one run of a file with an open batch."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Data and method of a calibration.

    Attributes:
        data: source as for :func:`.verification.data.sources.open_source`, or ``random``.
        samples: most rows that are read.
        method: how ranges follow.
        preprocessing: of images; None takes a zoo model's own.
        cache: file of the ranges; read if it fits, else written.
        seed: of random data.
    """

    data: str
    samples: int = 256
    method: Method = field(default_factory=Method)
    preprocessing: Affine | None = None
    cache: Path | None = None
    seed: int = 0


class Rows:
    """Rows of the user's data for a file's inputs, in batches that the file takes.

    Raises:
        UsageError, IntegrityError, ModelError, MissingRuntimeError: see :func:`.verification.data.sources.open_source`.
    """

    def __init__(self, proto: onnx.ModelProto, options: CalibrationOptions) -> None:
        self._options = options
        examples = _examples(proto, options.seed)
        self._kinds = {name: example.dtype for name, example in examples.items()}
        batches = {_batch(value) for value in inputs.graph_inputs(proto)}
        self._batch = next(iter(batches)) if len(batches) == 1 else None
        if options.data == RANDOM:
            self._source = _random_source(examples, options)
        else:
            fitting = _in_sizes_of(Path(options.data), proto, examples)
            affine = options.preprocessing or _affine(proto)
            self._source = sources.open_source(options.data, fitting, affine, _task(proto))

    @property
    def name(self) -> str:
        return self._source.name

    def batches(self, rows: int | None) -> Iterator[NamedArrays]:
        """Yield batches of at most this many rows together.

        Raises:
            UsageError: there is no row, or one holds NaN or an infinity.
        """
        size, start = self._batch or _AT_ONCE, 0
        pending: list[Block] = []
        for block in self._source.blocks():
            block = block if rows is None else block[: max(rows - start - sum(map(len, pending)), 0)]
            if len(block):
                self._check(block, start + sum(map(len, pending)))
                pending.append(block)
            while sum(map(len, pending)) >= size:
                joined = Block.joined(pending)
                yield self._arrays(joined[:size], start, size)
                pending = [joined[size:]] if len(joined) > size else []
                start += size
            if rows is not None and start + sum(map(len, pending)) >= rows:
                break
        if pending:
            joined = Block.joined(pending)
            count = len(joined)
            if self._batch:  # a fixed batch is filled with the same rows
                filled = Block.joined([joined, *[joined.without_labels()] * (size // count)])[:size]
                joined = filled
            yield self._arrays(joined, start, count)
        elif not start:
            raise UsageError(f"--data {self._options.data} yields nothing.", "Give at least one row.")

    def samples(self) -> Iterator[NamedArrays]:
        """All rows in batches, as samples for a verdict on a file without its model; the first are judged in full."""
        from scconv_deploy.verification.samples import FREE

        for number, batch in enumerate(self.batches(None)):
            deep = number < _DEEP
            yield replace(batch, deep=deep, kind=f"{self.name}{'' if deep else FREE}")

    def _arrays(self, block: Block, start: int, count: int) -> NamedArrays:
        arrays = {name: np.ascontiguousarray(a, self._kinds[name]) for name, a in block.arrays.items()}
        return NamedArrays(f"{self.name} {start}-{start + count - 1}", arrays, block.labels, count)

    def _check(self, block: Block, start: int) -> None:
        for name, array in block.arrays.items():
            if array.dtype.kind != "f" or np.isfinite(array).all():
                continue
            row = start + int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
            raise UsageError(
                f"--data {self._options.data}: row {row} of {name} holds NaN or an infinity.", "Leave such rows out."
            )


@dataclass(frozen=True)
class SeenRows:
    """What is known of the rows of a calibration without a run of the model.

    Attributes:
        sha256: hash of their values.
        count: number of rows.
        distinct: number of rows that differ from one another.
        constant: number of rows in which every floating input holds one value throughout.
    """

    sha256: str
    count: int
    distinct: int
    constant: int

    @classmethod
    def of(cls, rows: Rows, most: int) -> SeenRows:
        """Read at most so many rows."""
        digest, count, constant = hashlib.sha256(), 0, 0
        different: set[bytes] = set()
        for batch in rows.batches(most):
            for name in sorted(batch.inputs):
                array = batch.inputs[name]
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(array.tobytes())
            here = batch.count or 0
            for row in range(here):
                values = [array[row] for array in batch.inputs.values() if array.ndim]
                different.add(hashlib.sha256(b"".join(value.tobytes() for value in values)).digest())
                floats = [value for value in values if value.dtype.kind == "f" and value.size > 1]
                constant += bool(floats) and all((value == value.flat[0]).all() for value in floats)
            count += here
        return cls(digest.hexdigest(), count, len(different), constant)

    @property
    def notes(self) -> tuple[str, ...]:
        """Why ranges observed on these rows may be too narrow."""
        usual = "some hundred different rows are usual"
        found = []
        if self.count == 1:
            found.append(f"calibrated on one row alone: other inputs may be cut off; {usual}")
        elif 2 * self.distinct <= self.count:
            found.append(f"only {self.distinct} of the {self.count} rows of the calibration differ; {usual}")
        if self.constant:
            found.append(
                f"{self.constant} of {self.count} rows of the calibration hold one value throughout, as no photograph "
                "does: look at the data"
            )
        return tuple(found)


def require_own_file(cache: Path | None, output: Path) -> None:
    """Refuse a calibration cache that is the output, or stands in it (UsageError)."""
    if cache is not None and cache.resolve().is_relative_to(output.resolve()):
        raise UsageError(
            f"--calibration-cache {cache} is the output itself, or in it ({output}).", "Name another file for it."
        )


def calibrate(
    proto: onnx.ModelProto, digest: str, prepared: Prepared, rows: Rows, options: CalibrationOptions, progress: Progress
) -> tuple[Calibration, SeenRows]:
    """Observe the values of a placement on rows of data, or take their ranges from the cache.

    Args:
        digest: SHA-256 of the file.

    Returns:
        The ranges, and the rows.

    Raises:
        UsageError: the data do not fit, or a value is 0 on all of them.
        IntegrityError: the cache is damaged.
        ModelError: ONNX Runtime refuses the file, or a value is not finite.
    """
    seen = SeenRows.of(rows, options.samples)
    count = seen.count
    wanted = Calibration(str(options.method), count, rows.name, seen.sha256, digest, {})
    if options.cache is not None and options.cache.exists():
        cached = Calibration.read(options.cache)
        if cached.fits(wanted, prepared.values):
            progress(f"ranges from {options.cache}")
            return cached, seen
        progress(f"{options.cache} is of another model, data or method")
    observer, done = Observer(options.method), 0
    with runner_of(_exposed(proto, prepared.values), RuntimeOptions(optimization="basic")) as runner:
        for batch in rows.batches(options.samples):
            progress(f"calibrating on {batch.name} ({done} of {count} rows, {done / count:.0%})")
            found = runner.run(batch.inputs)
            observer.add({name: found[name] for name in prepared.values}, batch.name)
            done += batch.count or 0
    made = replace(wanted, ranges=observer.ranges())
    if options.cache is not None:
        write_file(options.cache, made.as_bytes())
    return made, seen


def _exposed(proto: onnx.ModelProto, values: list[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    known = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(values) if name not in known)
    return copy


def _examples(proto: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    """Arrays of the inputs' shapes and types; where an axis is open, of the first size that the file takes."""
    with runner_of(proto, RuntimeOptions(optimization="none")) as runner:
        return inputs.noise(proto, seed, runner.run)


def _in_sizes_of(path: Path, proto: onnx.ModelProto, examples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Examples with the sizes of an ``.npz`` where the file leaves an axis open; what does not fit stays as it is."""
    if path.suffix != ".npz" or not path.is_file():
        return examples
    shapes = sources.npz_shapes(path)
    found = dict(examples)
    for value in inputs.graph_inputs(proto):
        axes, given = value.type.tensor_type.shape.dim, shapes.get(value.name, ())
        if len(axes) == len(given) and all(
            axis.dim_value in (0, size) for axis, size in zip(axes[1:], given[1:], strict=True)
        ):
            found[value.name] = np.empty((1, *given[1:]), examples[value.name].dtype)
    return found


def _batch(value: onnx.ValueInfoProto) -> int | None:
    """Fixed size of axis 0; None if it is open."""
    axes = value.type.tensor_type.shape.dim
    return axes[0].dim_value or None if axes else None


def affine_of(source: str) -> Affine | None:
    """Preprocessing of a zoo model; None for others."""
    entry = zoo.MODELS.get(source)
    return None if entry is None else (entry.mean, entry.std, None)


def _affine(proto: onnx.ModelProto) -> Affine:
    """Preprocessing of the zoo model that a file was exported from; none for others."""
    source = next((entry.value for entry in proto.metadata_props if entry.key == _SOURCE), "")
    return affine_of(source) or ((0.0,), (1.0,), None)


def _task(proto: onnx.ModelProto) -> Task | None:
    """What the metadata of ultralytics say of a file; None for others."""
    said = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        names = ast.literal_eval(said["names"])
        numbered = {int(number): str(name) for number, name in names.items()}
        return Task(said["task"], numbered, said.get("end2end") == "True", said.get("head", ""))
    except (KeyError, ValueError, SyntaxError, AttributeError, RecursionError):
        return None


def _random_source(examples: Mapping[str, np.ndarray], options: CalibrationOptions) -> DataSource:
    def blocks() -> Iterator[Block]:
        rng = np.random.default_rng(options.seed)
        for _ in range(options.samples):
            one = {n: inputs.random_array((1, *e.shape[1:]), e.dtype, rng) for n, e in examples.items()}
            yield Block(one)

    return DataSource(RANDOM, options.samples, blocks)


def parse_affine(text: str) -> Affine:
    """Preprocessing from ``--preprocessing JSON`` (UsageError if it is invalid)."""
    from scconv_deploy.verification.preprocessing import Preprocessing

    found = Preprocessing.parse(text)
    return found.mean, found.std, found.resize
