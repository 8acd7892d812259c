"""Metrics by hand."""

import math

import numpy as np

from scconv_deploy.verification.compare import compare, relative_l2


def test_metrics_by_hand():
    metrics = compare(np.array([[1.0, 2.0], [4.0, 4.0]]), np.array([[1.0, 2.0], [4.0, 3.0]]))
    assert metrics.max_abs == 1.0
    assert metrics.mean_abs == 0.25
    assert math.isclose(metrics.relative_l2, 1 / math.sqrt(30))
    assert math.isclose(metrics.snr_db, 10 * math.log10(30))
    assert math.isclose(metrics.cosine, (1 + 4 + 16 + 12) / math.sqrt(37 * 30))
    assert metrics.top1_agreement == 1.0  # argmax of a tie is the first


def test_top1_counts_rows_and_only_logits_have_it():
    a, b = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    assert compare(a, b).top1_agreement == 0.5
    assert compare(a[None], b[None]).top1_agreement is None


def test_equal_zero_and_infinite():
    same = compare(np.zeros(3), np.zeros(3))
    assert (same.relative_l2, same.cosine, same.snr_db) == (0.0, 1.0, None)
    assert relative_l2(np.ones(3), np.zeros(3)) == math.inf
    assert compare(np.ones(3), np.zeros(3)).cosine == 0.0
