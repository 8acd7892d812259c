"""Error metrics of one output: absolute, relative L2, cosine, signal to noise, top-k."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class OutputMetrics:
    """Distances of one output from the reference output.

    Attributes:
        max_abs, mean_abs: absolute differences, in the output's units.
        relative_l2: ``|y - reference| / |reference|``.
        cosine: cosine similarity of the flattened outputs; 1.0 for two zero vectors.
        snr_db: signal-to-noise ratio, ``-20 log10(relative_l2)``; None if the outputs are equal.
        top1_agreement: share of rows with the same largest entry; None unless the output looks like logits ``[N, K]``.
        psnr_db: peak signal-to-noise ratio, ``20 log10((max - min of the reference) / rms error)``; None if equal.
        quantiles_abs: quantiles ``p50``, ``p90``, ``p99`` and ``p99.9`` of the absolute differences.
        top5_agreement: share of rows with the same set of five largest entries, for logits with K > 5.
    """

    max_abs: float
    mean_abs: float
    relative_l2: float
    cosine: float
    snr_db: float | None
    top1_agreement: float | None
    psnr_db: float | None = None
    quantiles_abs: dict[str, float] = field(default_factory=dict)
    top5_agreement: float | None = None
