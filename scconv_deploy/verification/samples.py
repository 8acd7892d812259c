"""Samples for verification: seeded noise, and batches of the user's data."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scconv_deploy.errors import UsageError
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.signature import Signature, random_tensor
from scconv_deploy.model.yolo import YoloCheckpoint
from scconv_deploy.verification.data.blocks import Block, DataSource
from scconv_deploy.verification.data.sources import open_source
from scconv_deploy.verification.preprocessing import Preprocessing
from scconv_deploy.verification.vision.targets import Task

FREE = " (running free: gates, end to end, accuracy)"
"""Suffix in the report for samples that are not judged in full."""
_AFFORDABLE = 2**18
"""Largest number of elements of noise at other sizes than the example's: 85 images of 32x32, or one of 295x295."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Inputs of one run, with labels if there are any.

    Attributes:
        name: origin of the inputs.
        tensors: inputs by name.
        labels: of the rows, see :class:`.data.blocks.Block`; None without labels.
        kind: name for all samples of this kind.
        rows: number of rows that count; None for all (a padded last batch has fewer).
        deep: whether the sample is judged in full; else it runs free, see :attr:`.reference.run.ReferenceRun.deep`.
    """

    name: str
    tensors: Mapping[str, Tensor]
    labels: np.ndarray | None = None
    kind: str = ""
    rows: int | None = None
    deep: bool = True

    @property
    def count(self) -> int:
        return (
            self.rows if self.rows is not None else max((len(t) for t in self.tensors.values() if t.dim()), default=1)
        )

    def __str__(self) -> str:
        return f"{self.name}: {self.shapes}"

    @property
    def shapes(self) -> str:
        return ", ".join(f"{name} {'x'.join(map(str, t.shape))}" for name, t in self.tensors.items())


def noise_samples(signature: Signature, seed: int) -> list[Sample]:
    """Make the example inputs and others, because a traced graph may be right only for the inputs of the trace.

    With open axes: noise with every open axis at its minimum, at its maximum (or the largest affordable size), and at
    odd sizes between. Else: the example with the values of each floating tensor shuffled, which keeps their range;
    indices and masks are not changed.
    """
    samples = [Sample("seeded noise", signature.tensors)]
    generator = torch.Generator().manual_seed(seed + 1)
    if signature.dynamic:
        return [*samples, *_other_sizes(signature, generator)]
    shuffled = {n: _shuffled(t, generator) if t.is_floating_point() else t for n, t in signature.tensors.items()}
    return [*samples, Sample("seeded noise, shuffled", shuffled)]


def _other_sizes(signature: Signature, generator: torch.Generator) -> Iterator[Sample]:
    """Noise at the smallest sizes, at the largest affordable ones, and between; each shape once."""
    axes = {axis.symbol: axis for axis in signature.dynamic}
    smallest = {symbol: axis.minimum for symbol, axis in axes.items()}
    largest = {symbol: axis.maximum for symbol, axis in axes.items()}
    example = sum(tensor.numel() for tensor in signature.tensors.values())
    affordable = _fitted(signature, largest, max(2 * example, _AFFORDABLE))
    between = _fitted(signature, _between(axes, generator), max(example, _AFFORDABLE))
    seen = [{name: list(tensor.shape) for name, tensor in signature.tensors.items()}]
    chosen: list[tuple[str, dict[str, int]]] = []
    nearly = "at" if affordable == largest else "near"
    for name, sizes in (
        ("at the smallest sizes", smallest), (f"{nearly} the largest sizes", affordable), ("at sizes between", between)
    ):  # fmt: skip
        if not chosen or _shapes(signature, sizes) not in seen:
            seen.append(_shapes(signature, sizes))
            chosen.append((name, sizes))
    for number, (name, sizes) in enumerate(chosen):
        unseen = affordable != largest and number == min(1, len(chosen) - 1)
        shapes = ", ".join(f"{n} {'x'.join(map(str, shape))}" for n, shape in _shapes(signature, largest).items())
        note = f" ({shapes} is too large to run here)" if unseen else ""
        yield Sample(f"seeded noise {name}{note}", _noise(signature, sizes, generator))


def _between(axes: Mapping[str, DynamicAxis], generator: torch.Generator) -> dict[str, int]:
    """Draw a size for each symbol, odd if the range has one: wrong halves and pairs show at odd sizes."""
    drawn = {}
    for symbol, axis in axes.items():
        steps = int(torch.randint(axis.minimum // axis.step, axis.maximum // axis.step + 1, (), generator=generator))
        up, down = (steps | 1) * axis.step, (steps - 1 | 1) * axis.step
        drawn[symbol] = next((s for s in (up, down) if axis.minimum <= s <= axis.maximum), steps * axis.step)
    return drawn


def _fitted(signature: Signature, sizes: Mapping[str, int], most: int) -> dict[str, int]:
    """Reduce sizes, the batch first, until all inputs together have at most ``most`` elements."""
    fitted = dict(sizes)
    axes = {axis.symbol: axis for axis in signature.dynamic}
    while sum(math.prod(shape) for shape in _shapes(signature, fitted).values()) > most:
        open_ones = [symbol for symbol, axis in axes.items() if fitted[symbol] > axis.minimum]
        if not open_ones:
            break
        first = [symbol for symbol in open_ones if axes[symbol].axis == 0] or open_ones
        symbol = max(first, key=lambda s: fitted[s])
        step = axes[symbol].step
        smaller = fitted[symbol] // step * 3 // 4 * step
        fitted[symbol] = max(axes[symbol].minimum, smaller)
    return fitted


def _shapes(signature: Signature, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Shapes of the inputs for given sizes of the open axes."""
    shapes = {}
    for name, tensor in signature.tensors.items():
        shape = list(tensor.shape)
        for axis in signature.dynamic:
            if axis.input in (None, name):
                shape[axis.axis] = sizes[axis.symbol]
        shapes[name] = shape
    return shapes


def _noise(signature: Signature, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: random_tensor(shape, signature.tensors[name].dtype, generator, signature.drawn)
        for name, shape in _shapes(signature, sizes).items()
    }


def _shuffled(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape)


class Samples:
    """Batches of the user's data, of the example's batch size, read one at a time in each iteration.

    If the batch size is fixed, the last batch is padded with rows from the start, which do not count.

    Args:
        deep: number of rows that are judged in full, rounded up to whole batches; None for all.
        start: number of the source's first row; above 0 for a part of the data.
        fill: rows from the start of the data, to pad the last batch of a part.

    Attributes:
        total: number of batches; None if unknown before reading.
    """

    def __init__(
        self,
        source: DataSource,
        signature: Signature,
        deep: int | None = None,
        start: int = 0,
        fill: Block | None = None,
    ) -> None:
        self._source, self._signature, self._deep = source, signature, deep
        self._start, self._fill = start, fill
        sizes = {key: len(example) if example.dim() else 0 for key, example in signature.tensors.items()}
        if source.rows is not None and source.rows == 0:
            found = ", ".join(f"{key} 0 for batches of {batch}" for key, batch in sizes.items())
            raise UsageError(f"--data {source.name}: {found}.", "Give at least one.")
        if len(set(sizes.values())) != 1 or not all(sizes.values()):
            found = ", ".join(f"{key} for batches of {batch}" for key, batch in sizes.items())
            raise UsageError(
                f"--data {source.name}: {found}; expected as many of each.", "Give every input the same length."
            )
        (self._batch,) = set(sizes.values())
        self.total = None if source.rows is None else -(-source.rows // self._batch)

    def __iter__(self) -> Iterator[Sample]:
        pending: list[Block] = []
        first = [] if self._fill is None else [self._fill]  # first rows, to pad the last batch
        start = self._start
        for block in self._source.blocks():
            pending.append(block)
            while sum(len(b) for b in pending) >= self._batch:
                rows, pending = _take(pending, self._batch)
                first = first or [rows]
                yield self._sample(rows, start, self._batch)
                start += self._batch
        left = sum(len(b) for b in pending)
        if not left:
            if start == self._start:
                raise UsageError(f"--data {self._source.name} yields nothing.", "Give at least one batch.")
            return
        last, _ = _take(pending, left)
        if left < _smallest_batch(self._signature, self._batch):
            fill = [*(first or [last])] * (-(-self._batch // left))
            last, _ = _take([last, *(b.without_labels() for b in fill)], self._batch)
        yield self._sample(last, start, left)

    @property
    def rows(self) -> int:
        """Number of rows; 0 if unknown before reading."""
        return self._source.rows or 0

    def split(self, parts: int) -> tuple[list[Samples], list[Samples]]:
        """The samples that are judged in full, and those that run free in at most this many parts of whole batches.

        Both together are all samples, in order. There is no part where the data can only be read from their start.
        """
        rows, batch = self._source.rows, self._batch
        if rows is None or self._source.part is None:
            return [self], []
        border = rows if self._deep is None else min(rows, -(-self._deep // batch) * batch)
        batches = -(-(rows - border) // batch)
        borders = sorted({border + round(batches * number / parts) * batch for number in range(parts + 1)})
        free = [self._part(start, min(stop, rows)) for start, stop in itertools.pairwise(borders)]
        return [self._part(0, border)] if border else [], free

    def _part(self, start: int, stop: int) -> Samples:
        """The samples of some rows of this source."""
        part = self._source.part
        if part is None:
            raise TypeError(f"{self._source.name} can only be read from its start")
        fill = Block.joined(list(part(0, self._batch).blocks())) if start and stop == self._source.rows else None
        return Samples(part(start, stop), self._signature, self._deep, start, fill)

    def carried(self) -> Samples:
        """The same samples with their data in memory, for another machine."""
        make = self._source.carried
        source = self._source if make is None else make()
        return Samples(source, self._signature, self._deep, self._start, self._fill)

    def _sample(self, rows: Block, start: int, count: int) -> Sample:
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(rows.arrays[name])).to(example.dtype)
            for name, example in self._signature.tensors.items()
        }
        name = f"{self._source.name} {start}-{start + count - 1}"
        deep = self._deep is None or start < self._deep
        sample = Sample(name, tensors, rows.labels, f"{self._source.name}: ", count, deep)
        return replace(sample, kind=f"{sample.kind}{sample.shapes}{'' if deep else FREE}")


def _take(blocks: list[Block], count: int) -> tuple[Block, list[Block]]:
    """Take the first ``count`` rows of blocks as one block; return it and the remaining blocks."""
    taken: list[Block] = []
    rest = list(blocks)
    while count:
        block = rest.pop(0)
        taken.append(block[:count])
        if len(block) > count:
            rest.insert(0, block[count:])
        count -= len(taken[-1])
    return Block.joined(taken), rest


def _smallest_batch(signature: Signature, batch: int) -> int:
    """Smallest batch size that every input allows."""
    minima = dict.fromkeys(signature.names, batch)
    for axis in signature.dynamic:
        if axis.axis == 0:
            minima |= {name: axis.minimum for name in signature.names if axis.input in (None, name)}
    return max(minima.values())


def load_samples(
    source: str,
    signature: Signature,
    preprocessing: Preprocessing,
    deep: int | None = None,
    checkpoint: YoloCheckpoint | None = None,
) -> Samples:
    """Open ``--data``: images, an ultralytics or COCO data set, an ``.npz``, or ``file.py:loader``; see :mod:`.data`.

    Args:
        deep: see :class:`Samples`.
        checkpoint: what an ultralytics checkpoint says of the model; None for any other.

    Raises:
        UsageError: the source does not exist or is empty, or (also while reading) its data do not fit the inputs.
        IntegrityError: a file is damaged; also while reading.
        ModelError: the loader's code raises.
        MissingRuntimeError: Pillow or scikit-learn is missing.
    """
    examples = {name: tensor.numpy() for name, tensor in signature.tensors.items()}
    task = None
    if checkpoint is not None:
        task = Task(checkpoint.task, checkpoint.names, checkpoint.end_to_end, checkpoint.head)
    return Samples(open_source(source, examples, preprocessing.affine, task), signature, deep)


def counted(samples: Iterable[Sample]) -> tuple[Iterable[Sample], int | None]:
    """Samples, and their number if it is known."""
    if isinstance(samples, Samples):
        return samples, samples.total
    kept = list(samples)
    return kept, len(kept)


def with_progress(sources: Sequence[Iterable[Sample]], progress: Callable[[str], None]) -> Iterator[Sample]:
    """Yield the samples of all sources in order; report each one's name, number and the time left to ``progress``."""
    known = [counted(source) for source in sources]
    total = sum(count or 0 for _, count in known) if all(count is not None for _, count in known) else None
    start, done = time.monotonic(), 0
    for samples, _ in known:
        for sample in samples:
            progress(f"verifying on {sample}{_where(done, total, time.monotonic() - start)}")
            yield sample
            done += 1


def _where(done: int, total: int | None, seconds: float) -> str:
    """Progress as ``(3 of 20, 10%, 0:51 left)``; shorter for the first sample or an unknown total."""
    if total is None:
        return f" ({done + 1})"
    if not done:
        return f" (1 of {total})"
    left = round(seconds / done * (total - done))
    return f" ({done + 1} of {total}, {done / total:.0%}, {left // 60}:{left % 60:02d} left)"
