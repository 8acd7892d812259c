"""Metrics by hand."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from scconv_deploy.verification.metrics import Part, comparable, compare, distance, parts, relative_l2


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


def test_infinities_at_the_same_places_are_equal():
    masked = np.array([1.0, -np.inf, 3.0])
    assert comparable(masked, masked)
    assert distance(np.array([1.0, -np.inf, 3.0 + 1e-3]), masked) == pytest.approx(1e-3 / math.sqrt(10))
    for other in ([1.0, np.inf, 3.0], [1.0, 0.0, 3.0], [1.0, -np.inf, np.nan], [-np.inf, -np.inf, 3.0]):
        assert not comparable(np.array(other), masked)
        assert distance(np.array(other), masked) == math.inf
    assert not comparable(np.array([np.nan]), np.array([np.nan]))


def test_indices_are_counted_not_averaged():
    assert distance(np.array([1, 2, 3, 900]), np.array([1, 2, 3, 4])) == 0.25
    assert distance(np.array([True, False]), np.array([True, True])) == 0.5


def test_psnr_quantiles_and_top5_by_hand():
    reference = np.array([[0.0, 1.0, 2.0, 3.0, 4.0, 10.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    y = reference.copy()
    y[0, 0], y[1, 0] = 3.0, 0.5  # 0 enters the first row's five for 1, and stays out of the second's
    metrics = compare(y, reference)
    assert metrics.psnr_db == pytest.approx(20 * math.log10(10 / math.sqrt((9 + 0.25) / 12)))
    assert metrics.top5_agreement == 0.5
    assert metrics.quantiles_abs["p50"] == 0.0
    assert metrics.quantiles_abs["p99"] == pytest.approx(np.quantile(np.abs(y - reference), 0.99))
    assert list(metrics.quantiles_abs) == ["p50", "p90", "p99", "p99.9"]
    same = compare(reference[:, :5], reference[:, :5])
    assert (same.psnr_db, same.top5_agreement) == (None, None)  # equal, and no more than five


def test_relative_l2_adds_up_over_what_is_compared_at_a_time():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(3, 50_000)).astype(np.float32)  # two blocks and a part of one
    y = reference + rng.normal(size=reference.shape).astype(np.float32) * 1e-3
    a, b = y.astype(np.float64), reference.astype(np.float64)
    assert math.isclose(relative_l2(y, reference), np.linalg.norm(a - b) / np.linalg.norm(b), rel_tol=1e-12)
    y[2, -1] = np.nan
    assert relative_l2(y, reference) == math.inf
    y[2, -1] = reference[2, -1] = np.inf
    a[2, -1] = b[2, -1] = 0  # the same infinity on both sides says nothing of the others
    assert math.isclose(relative_l2(y, reference), np.linalg.norm(a - b) / np.linalg.norm(b), rel_tol=1e-12)


def test_a_distance_does_not_depend_on_the_threads_of_blas():
    """Reports of several machines are merged, and compared by their bytes."""
    code = (
        "import numpy as np; from scconv_deploy.verification.metrics import relative_l2; "
        "y = np.random.default_rng(0).standard_normal(300_000); print(relative_l2(y + 1e-3, y).hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"OPENBLAS_NUM_THREADS": threads},
            capture_output=True, text=True, check=True,
        ).stdout
        for threads in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1
    assert 0.9e-3 < float.fromhex(found.pop()) < 1.1e-3


def sized(*sizes, axis=1):
    """An array of three axes whose slices along an axis have these sizes."""
    return np.moveaxis(np.multiply.outer(np.array(sizes), np.array([[1.0, -1.0], [1.0, 1.0]])), 0, axis)


def test_parts_are_slices_much_smaller_than_the_largest():
    scores = (0.0, 80.0, 30.0, 1e-3, 0.02, 80.0, 0.03, 1e-6)
    assert parts("y", sized(*scores)) == [Part("y", 1, (3, 4, 6)), Part("y", 1, (7,))]
    assert parts("y", sized(*scores, axis=2)) == [Part("y", 2, (3, 4, 6)), Part("y", 2, (7,))]


def test_a_part_has_the_name_of_its_slices_and_takes_them():
    (part,) = parts("y", sized(100.0, 1.0, 1.0, 100.0, 1.0))
    assert part.name == "y[axis 1: 1-2, 4]"
    assert np.array_equal(part.of(sized(5.0, 6.0, 7.0, 8.0, 9.0)), sized(6.0, 7.0, 9.0))
    assert Part("y", 1, (0, 2, 4, 6, 7)).name == "y[axis 1: 0, 2, 4, ...]"


def test_outputs_of_one_size_have_no_parts():
    infinite = sized(1.0, 100.0)
    infinite[0, 0, 0] = np.inf
    for whole in (
        sized(1.0, 50.0), sized(0.0, 0.0), np.array([[1.0, 100.0]]), sized(1.0, 100.0).astype(np.int64), infinite
    ):  # fmt: skip
        assert parts("y", whole) == []
