"""Paired bootstrap over images: how often each image is drawn, and the interval of a difference."""

from __future__ import annotations

import math

import numpy as np

RESAMPLES = 500
METHOD = f"paired bootstrap over images, {RESAMPLES} resamples, 2.5 to 97.5 percentile"
_SEED = 0
_MOST_ROWS = 2**30


def draws(images: int) -> np.ndarray:
    """How often each image is in a resample, of as many images: int64 ``[RESAMPLES, images]``; seeded."""
    return np.random.default_rng(_SEED).multinomial(images, np.full(images, 1 / images), size=RESAMPLES)


def interval(differences: np.ndarray, confidence: float) -> tuple[float, float]:
    """Percentiles of the differences of the resamples; NaN (a resample without objects) is left out."""
    known = differences[np.isfinite(differences)]
    if not len(known):
        return 0.0, 0.0
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def images_needed(images: int, difference: float, low: float, drop: float) -> int | None:
    """Images at which the interval would hold no larger loss than ``drop``, as its width falls with their root.

    None if no number does.
    """
    room = drop + difference
    if room <= 0:
        return None
    needed = math.ceil(images * max((difference - low) / room, 1.0) ** 2)
    return needed if needed <= _MOST_ROWS else None
