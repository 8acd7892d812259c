"""Rows of data, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of data: one array per input, all of one length, and labels.

    Labels are class numbers (int64, -1 for a row without), targets (objects of :mod:`.vision.targets`, None for a row
    without), or None where the data have none.
    """

    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, rows: slice) -> Block:
        return Block(
            {name: array[rows] for name, array in self.arrays.items()},
            None if self.labels is None else self.labels[rows],
        )

    def without_labels(self) -> Block:
        """The same rows without labels, so that they do not count in the accuracy."""
        if self.labels is None:
            return self
        none = None if self.labels.dtype == object else -1
        return Block(self.arrays, np.full(len(self), none, dtype=self.labels.dtype))

    @classmethod
    def joined(cls, blocks: Sequence[Block]) -> Block:
        """Join blocks into one, which has labels if all of them have."""
        if len(blocks) == 1:
            return blocks[0]
        arrays = {name: np.concatenate([b.arrays[name] for b in blocks]) for name in blocks[0].arrays}
        labels = [b.labels for b in blocks if b.labels is not None]
        return cls(arrays, np.concatenate(labels) if len(labels) == len(blocks) else None)


@dataclass(frozen=True, eq=False)
class DataSource:
    """Source of data.

    Attributes:
        name: name in the report.
        rows: number of rows; None if unknown before reading.
        blocks: reader of its blocks.
        part: (first row, row after the last) -> a source of these rows alone; None if the source can only be read from
            its start.
        carried: makes the same source with the content of its files in memory, for another machine; None if it reads no
            files.
    """

    name: str
    rows: int | None
    blocks: Callable[[], Iterator[Block]]
    part: Callable[[int, int], DataSource] | None = None
    carried: Callable[[], DataSource] | None = None
