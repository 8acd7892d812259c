"""Distances between an output and its reference, in float64; and the parts of an output that are judged apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from scconv_deploy.records.metrics import OutputMetrics


class MetricsTally:
    """Metrics of outputs over batches: the worst of each distance, and agreements over all rows.

    Agreements are kept as numbers of rows, so that the result does not depend on how the batches were split.
    """

    def __init__(self) -> None:
        self._worst: dict[str, OutputMetrics] = {}
        self._rows: dict[str, tuple[int, int, int]] = {}  # all, same largest entry, same five

    def add(self, name: str, metrics: OutputMetrics, rows: int) -> None:
        """Add the metrics of an output on a batch."""
        same = (round((one or 0.0) * rows) for one in (metrics.top1_agreement, metrics.top5_agreement))
        self._add(name, metrics, (rows, *same))

    def merge(self, other: MetricsTally) -> None:
        """Add all batches of another tally."""
        for name, metrics in other._worst.items():
            self._add(name, metrics, other._rows[name])

    def _add(self, name: str, metrics: OutputMetrics, rows: tuple[int, ...]) -> None:
        worst, before = self._worst.get(name), self._rows.get(name, (0, 0, 0))
        self._worst[name] = metrics if worst is None else _worst_of(worst, metrics)
        a, b, c = (one + other for one, other in zip(before, rows, strict=True))
        self._rows[name] = a, b, c

    @property
    def metrics(self) -> dict[str, OutputMetrics]:
        """Metrics by output."""
        return {name: _with_agreements(worst, *self._rows[name]) for name, worst in self._worst.items()}


def _with_agreements(worst: OutputMetrics, rows: int, one: int, five: int) -> OutputMetrics:
    def share(known: float | None, same: int) -> float | None:
        return None if known is None else same / max(rows, 1)

    first, fifth = worst.top1_agreement, worst.top5_agreement
    return replace(worst, top1_agreement=share(first, one), top5_agreement=share(fifth, five))


def _worst_of(a: OutputMetrics, b: OutputMetrics) -> OutputMetrics:
    """The worst of each distance; an agreement is None if one of them is."""

    def known(one: float | None, other: float | None) -> float | None:
        return None if one is None or other is None else one

    def lower(one: float | None, other: float | None) -> float | None:
        return min((v for v in (one, other) if v is not None), default=None)

    return OutputMetrics(
        max_abs=max(a.max_abs, b.max_abs),
        mean_abs=max(a.mean_abs, b.mean_abs),
        relative_l2=max(a.relative_l2, b.relative_l2),
        cosine=min(a.cosine, b.cosine),
        snr_db=lower(a.snr_db, b.snr_db),
        top1_agreement=known(a.top1_agreement, b.top1_agreement),
        psnr_db=lower(a.psnr_db, b.psnr_db),
        quantiles_abs={name: max(value, b.quantiles_abs[name]) for name, value in a.quantiles_abs.items()},
        top5_agreement=known(a.top5_agreement, b.top5_agreement),
    )


_AT_ONCE = 2**16
"""Entries converted to float64 at a time: half a megabyte, which fits into the cache."""
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


def compare(y: np.ndarray, reference: np.ndarray) -> OutputMetrics:
    """Measure an output against its reference, in float64; both must be :func:`comparable` and of one shape."""
    a, b = _without_infinities(y), _without_infinities(reference)
    difference = np.abs(a - b)
    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    relative = relative_l2(y, reference)
    logits = looks_like_logits(reference)
    rms = float(np.sqrt(np.mean(np.square(difference)))) if difference.size else 0.0
    peak = float(np.ptp(b)) if b.size else 0.0
    cosine = float(np.dot(a.ravel(), b.ravel()) / (norm_a * norm_b)) if norm_a and norm_b else float(norm_a == norm_b)
    return OutputMetrics(
        max_abs=float(difference.max(initial=0.0)),
        mean_abs=float(difference.mean()) if difference.size else 0.0,
        relative_l2=relative,
        cosine=cosine,
        snr_db=-20 * float(np.log10(relative)) if relative > 0 else None,
        top1_agreement=float(np.mean(np.argmax(y, 1) == np.argmax(reference, 1))) if logits else None,
        psnr_db=20 * float(np.log10(peak / rms)) if peak and rms else None,
        quantiles_abs=_quantiles(difference),
        top5_agreement=_same_five(a, b) if logits and b.shape[1] > 5 else None,
    )


def looks_like_logits(output: np.ndarray) -> bool:
    """Whether an output is floating and ``[N, K]`` with K of at least 2."""
    return output.ndim == 2 and output.shape[1] >= 2 and output.dtype.kind == "f"


def _quantiles(difference: np.ndarray) -> dict[str, float]:
    if not difference.size:
        return dict.fromkeys(_QUANTILES, 0.0)
    values = np.quantile(difference, list(_QUANTILES.values()))
    return dict(zip(_QUANTILES, map(float, values), strict=True))


def _same_five(a: np.ndarray, b: np.ndarray) -> float:
    """Share of rows with the same set of five largest entries, in any order."""
    five = [np.sort(np.argsort(-values, axis=1, kind="stable")[:, :5], axis=1) for values in (a, b)]
    return float(np.mean(np.all(five[0] == five[1], axis=1)))


def comparable(y: np.ndarray, reference: np.ndarray) -> bool:
    """Whether two arrays have a distance: no NaN, and the same infinities at the same places."""
    if np.asarray(reference).dtype.kind != "f":
        return True
    infinite = np.isinf(reference)
    same = np.array_equal(infinite, np.isinf(y)) and np.array_equal(y[infinite], reference[infinite])
    return bool(same and not np.isnan(y).any() and not np.isnan(reference).any())


def distance(y: np.ndarray, reference: np.ndarray) -> float:
    """Relative L2 for floating types; for others (indices, masks), the share of entries that differ."""
    if np.asarray(reference).dtype.kind == "f":
        return relative_l2(y, reference)
    return float(np.mean(y != reference)) if reference.size else 0.0


def relative_l2(y: np.ndarray, reference: np.ndarray) -> float:
    """``|y - reference| / |reference|`` in float64; infinite if only the reference is zero, or if not comparable."""
    squares = _squares(y, reference)
    if squares is not None:
        off, size = squares
        return 0.0 if off == 0.0 else (off / size) ** 0.5 if size else float("inf")
    if not comparable(y, reference):
        return float("inf")
    a, b = _without_infinities(y), _without_infinities(reference)
    error, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    if error == 0.0:
        return 0.0
    return error / norm if norm else float("inf")


def error_and_signal(y: np.ndarray, reference: np.ndarray) -> tuple[float, float] | None:
    """``|y - reference|**2`` and ``|reference|**2`` in float64, infinities left out; None if not :func:`comparable`."""
    if np.shape(y) != np.shape(reference):
        return None
    if (squares := _squares(y, reference)) is not None:
        return squares
    if not comparable(y, reference):
        return None
    a, b = _without_infinities(y), _without_infinities(reference)
    return float(np.square(a - b).sum()), float(np.square(b).sum())


def snr_db(signal: float, error: float) -> float:
    """Signal-to-noise ratio of two sums of squares; ``inf`` without an error, ``-inf`` without a signal."""
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal and math.isfinite(error) else -math.inf


def _squares(y: np.ndarray, reference: np.ndarray) -> tuple[float, float] | None:
    """``|y - reference|**2`` and ``|reference|**2`` in float64, without float64 copies of the arrays; None if a sum is
    not finite."""
    if np.shape(y) != np.shape(reference):
        return None
    a, b = np.ravel(y), np.ravel(reference)
    off = size = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, a.size, _AT_ONCE):
            expected = b[start : start + _AT_ONCE].astype(np.float64)
            difference = a[start : start + _AT_ONCE].astype(np.float64) - expected
            off += _sum_of_products(difference, difference)
            size += _sum_of_products(expected, expected)
    return (off, size) if np.isfinite(off) and np.isfinite(size) else None


def _sum_of_products(a: np.ndarray, b: np.ndarray) -> float:
    """The inner product on one thread. np.dot wakes BLAS's threads for 65,536 numbers, which beside other load took a
    hundred times as long, and whose number decides how the sum is rounded."""
    return float(np.einsum("i,i->", a, b))


def _without_infinities(values: np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return np.where(np.isinf(array), 0.0, array)


# --- parts -----------------------------------------------------------------------------------------------------------

_OF_ONE_SIZE = 64.0
"""Largest factor between the rms of two slices of an output that are judged together. Boxes in pixels are a thousand
times as large as scores: scores that are all off by a tenth move the relative L2 of both by 1e-6."""
_MOST_NAMED = 3


@dataclass(frozen=True)
class Part:
    """Slices of an output that are much smaller than its largest ones.

    Attributes:
        indices: of the slices along ``axis``.
    """

    output: str
    axis: int
    indices: tuple[int, ...]

    @property
    def name(self) -> str:
        """The output and its slices, as ``output0[axis 1: 4-6]``."""
        edges = [n for n, index in enumerate(self.indices) if n == 0 or index != self.indices[n - 1] + 1]
        runs = [self.indices[a:b] for a, b in zip(edges, [*edges[1:], None], strict=True)]
        named = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs[:_MOST_NAMED]]
        more = ", ..." if len(runs) > _MOST_NAMED else ""
        return f"{self.output}[axis {self.axis}: {', '.join(named)}{more}]"

    def of(self, array: np.ndarray) -> np.ndarray:
        """The slices of an array of the output's shape (another number of rows is allowed)."""
        return np.take(array, self.indices, self.axis)


def parts(output: str, reference: np.ndarray) -> list[Part]:
    """Parts of an output ``[N, ...]`` of three axes or more, by the sizes of its slices; none where these are alike.

    The slices are those of the axis along which sizes differ most. The largest ones are no part: they decide the
    distance of the whole. Slices of zeros are left out.
    """
    if reference.dtype.kind != "f" or reference.ndim < 3 or not np.isfinite(reference).all():
        return []
    squares = np.square(reference, dtype=np.float64)
    sizes = {axis: _sizes(squares, axis) for axis in range(1, reference.ndim)}
    spans = {axis: float(found.max() / found[found > 0].min()) for axis, found in sizes.items() if found.any()}
    if not spans:
        return []
    axis = max(spans, key=spans.__getitem__)
    return [Part(output, axis, indices) for indices in _of_one_size(sizes[axis])][1:]


def parts_of(outputs: Mapping[str, np.ndarray], rounded: Mapping[str, np.ndarray] | None = None) -> dict[str, Part]:
    """Parts of several outputs by their names, see :func:`parts`.

    Args:
        rounded: the outputs in half. Parts that are zeros there are left out: nothing can be compared with them.
    """
    of = {n: y for n, y in outputs.items() if rounded is None or rounded[n].shape == y.shape}
    found = [part for name, y in of.items() for part in parts(name, y)]
    return {part.name: part for part in found if rounded is None or not is_lost(part, of, rounded)}


def is_lost(part: Part, outputs: Mapping[str, np.ndarray], rounded: Mapping[str, np.ndarray]) -> bool:
    """Whether a part of outputs is zeros in half."""
    y = rounded[part.output]
    return y.shape == outputs[part.output].shape and not part.of(y).any()


def _sizes(squares: np.ndarray, axis: int) -> np.ndarray:
    """The rms of each slice along an axis, of squared values."""
    others = tuple(number for number in range(squares.ndim) if number != axis)
    return np.asarray(np.sqrt(np.mean(squares, axis=others)))


def _of_one_size(sizes: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Indices of slices of one size, the largest first."""
    left = [int(index) for index in np.argsort(-sizes, kind="stable") if sizes[index] > 0]
    while left:
        alike = [index for index in left if sizes[left[0]] <= _OF_ONE_SIZE * sizes[index]]
        yield tuple(sorted(alike))
        left = left[len(alike) :]
