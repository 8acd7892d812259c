"""Quantised weights that a file must hold. No torch: the checks of a file run where it is not installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scconv_deploy.graph.quantization import Quantization


@dataclass(frozen=True, eq=False)
class ExpectedWeights:
    """Weights of a layer as PyTorch quantises them.

    Attributes:
        weight: float32 ``[C, ...]``, with its BatchNorm folded in.
        scales: by the rule of the largest magnitude, float32 ``[C]``.
        codes: with the file's scales, integers in float32.
        folded: whether a BatchNorm was folded in.
    """

    weight: np.ndarray
    scales: np.ndarray
    codes: np.ndarray
    folded: bool


@dataclass(frozen=True, eq=False)
class ExpectedQuantization:
    """Quantisers of a file that have their places in the reference.

    Attributes:
        found: the quantisers.
        weights: weights of the quantised layers by path.
    """

    found: Quantization
    weights: Mapping[str, ExpectedWeights]
