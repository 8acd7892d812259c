"""Ranges of activations, observed on data, and the levels that follow.

The observers of histograms (entropy, percentile) and the formula of a scale are ONNX Runtime's quantiser's.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnxruntime.quantization.calibrate import HistogramCollector
from onnxruntime.quantization.quant_utils import compute_scale_zp

from scconv_deploy.errors import IntegrityError, ModelError, UsageError
from scconv_deploy.records.codec import DecodeError, decode, encode, parse
from scconv_deploy.records.quantization import LARGEST_CODE, Levels, QuantizationRecord, Target

DEFAULT_PERCENTILE = 99.99
_BINS = 2048
"""Bins of a percentile's histogram, as in ONNX Runtime's quantiser."""
_ENTROPY_BINS, _ENTROPY_LEVELS = 1024, 128
"""With ONNX Runtime's own 128 bins for 128 levels there is nothing to choose: its entropy is the largest magnitude."""


@dataclass(frozen=True)
class Method:
    """How a range follows from what was observed.

    Attributes:
        kind: ``max`` (the largest magnitude), ``entropy`` (least Kullback-Leibler divergence) or ``percentile``.
        percentile: share of the magnitudes that the range holds, in percent; for ``percentile`` only.
    """

    kind: str = "max"
    percentile: float = DEFAULT_PERCENTILE

    def __str__(self) -> str:
        return f"percentile:{self.percentile:.15g}" if self.kind == "percentile" else self.kind

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read ``max``, ``entropy`` or ``percentile[:P]`` (UsageError otherwise)."""
        kind, _, number = text.partition(":")
        wrong = UsageError(f"--calibration {text!r} is unknown.", "There are max, entropy and percentile[:99.99].")
        if kind not in ("max", "entropy", "percentile") or (number and kind != "percentile"):
            raise wrong
        try:
            percentile = float(number) if number else DEFAULT_PERCENTILE
        except ValueError as error:
            raise wrong from error
        if not 50 <= percentile <= 100:
            raise UsageError(f"--calibration {text!r}: the percentile is not between 50 and 100.", "Take 99.99.")
        return cls(kind, percentile)


@dataclass(frozen=True)
class Range:
    """Range of a value: it is saturated outside."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        return max(abs(self.low), abs(self.high))


class Observer:
    """Collector of the ranges of values, batch by batch."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._ends: dict[str, tuple[np.floating, np.floating]] = {}
        self._histograms = None
        if method.kind != "max":
            self._histograms = HistogramCollector(
                method.kind, symmetric=True, num_bins=_ENTROPY_BINS if method.kind == "entropy" else _BINS,
                num_quantized_bins=_ENTROPY_LEVELS, percentile=method.percentile, scenario="same",
            )  # fmt: skip

    def add(self, values: Mapping[str, np.ndarray], where: str) -> None:
        """Observe one batch.

        Args:
            values: float32 arrays by name.
            where: name of the batch, for messages.

        Raises:
            ModelError: a value is NaN or infinite.
        """
        for name, value in values.items():
            if not value.size:
                continue
            low, high = value.min(), value.max()
            if not (np.isfinite(low) and np.isfinite(high)):
                raise ModelError(
                    f"{name} holds {'NaN' if np.isnan(low) or np.isnan(high) else 'an infinity'} on {where}, so it has "
                    "no range.",
                    "Look at what the model gives for this input in float.",
                )
            before = self._ends.get(name, (low, high))
            self._ends[name] = min(before[0], low), max(before[1], high)
        if self._histograms is not None:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
                self._histograms.collect({name: value for name, value in values.items() if value.size})

    def ranges(self) -> dict[str, Range]:
        """Ranges by name; UsageError if a value is 0 throughout."""
        dead = [name for name, (low, high) in self._ends.items() if low == high == 0]
        if dead:
            more = f" (and {len(dead) - 1} more)" if len(dead) > 1 else ""
            raise UsageError(
                f"{dead[0]}{more} is 0 on all of the calibration data, so it has no scale.",
                f"Calibrate on data that move it, or leave its readers in float: --keep {dead[0]!r}.",
            )
        ends = {name: Range(float(low), float(high)) for name, (low, high) in self._ends.items()}
        if self._histograms is None or not ends:
            return ends
        with contextlib.redirect_stdout(io.StringIO()):
            found = self._histograms.compute_collection_result()
        return {name: _within(ends[name], float(np.abs(np.asarray(found[name][:2])).max())) for name in ends}


def _within(ends: Range, threshold: float) -> Range:
    """A range cut at a threshold; one that the histogram rounds to 0 stays."""
    return Range(max(ends.low, -threshold), min(ends.high, threshold)) if threshold > 0 else ends


def levels_of(found: Iterable[Range], target: Target, dtype: np.dtype) -> Levels:
    """Levels that hold all of these ranges.

    Args:
        target: ``gpu`` gives symmetric int8, ``cpu`` uint8.
        dtype: type of the value, to which the scale is rounded.
    """
    ranges = list(found)
    low, high = (np.float32(f(getattr(r, end) for r in ranges)) for f, end in ((min, "low"), (max, "high")))
    signed = target == "gpu"
    ends = (
        (np.array(-127, np.int32), np.array(127, np.int32))
        if signed
        else (np.array(0, np.int32), np.array(255, np.int32))
    )
    zero_point, scale = compute_scale_zp(np.array(low), np.array(high), *ends, symmetric=signed)
    rounded = float(np.asarray(scale).astype(dtype).astype(np.float32))
    return Levels(rounded or float(np.finfo(np.float16).tiny), int(zero_point), signed)  # half rounds a tiny one to 0


def weight_scales(weight: np.ndarray, largest_code: int = LARGEST_CODE) -> np.ndarray:
    """Scale of each channel (axis 0), float32 ``[C]``: largest magnitude over largest code; 1 where all are 0."""
    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float32)
    scales = largest / np.float32(largest_code)
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)


def rounded_scales(scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Scales as a type holds them, float32 ``[C]``; 1 where it rounds one to 0: such a channel is of zeros."""
    held = scales.astype(dtype).astype(np.float32)
    return np.where(held == 0, np.float32(1), held)


def weight_codes(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes of weights ``[C, ...]``, int8: as PyTorch computes them, which multiplies by the reciprocal of a scale."""
    inverse = (np.float32(1) / scales.astype(np.float32)).reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(np.rint(weight.astype(np.float32) * inverse), -127, 127).astype(np.int8)


@dataclass(frozen=True)
class Calibration:
    """Ranges that were observed, and on what; stored as JSON, so that nobody observes them twice.

    Attributes:
        method: text of a :class:`Method`.
        samples: number of rows.
        data, data_sha256: source of the rows, and the hash of their values.
        model_sha256: hash of the float file.
        ranges: by the name of the value.
    """

    method: str
    samples: int
    data: str
    data_sha256: str
    model_sha256: str
    ranges: dict[str, Range]

    def record(self, target: Target, largest_code: int = LARGEST_CODE) -> QuantizationRecord:
        """Origin of the scales for a file's metadata."""
        return QuantizationRecord(
            self.method, self.samples, self.data, self.data_sha256, self.model_sha256, target, largest_code=largest_code
        )

    def as_bytes(self) -> bytes:
        """Content of the cache's file."""
        return (json.dumps(encode(self), indent=2) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read a cache (IntegrityError if it is damaged)."""
        try:
            found = decode(cls, parse(path.read_bytes()))
            for name, one in found.ranges.items():
                if not (np.isfinite([one.low, one.high]).all() and one.low <= one.high) or one.low == one.high == 0:
                    raise DecodeError(f"the range of {name} is {one.low} to {one.high}")
            return found
        except (DecodeError, UnicodeDecodeError) as error:
            raise IntegrityError(
                f"{path} is damaged or no calibration cache: {error}.", "Delete it, and calibrate again."
            ) from error

    def fits(self, other: Calibration, values: Iterable[str]) -> bool:
        """Whether the ranges are those of the same method, model and data (``other``, whose ranges do not matter)."""
        same = ("method", "samples", "data_sha256", "model_sha256")
        return all(getattr(self, n) == getattr(other, n) for n in same) and set(values) <= set(self.ranges)
