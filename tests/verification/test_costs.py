"""Costs of a model against its float model: sums over batches, padded rows, what is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.records.stage import silent
from scconv_deploy.verification import costs
from scconv_deploy.verification.costs import CostMeter
from scconv_deploy.verification.reference.onnx_file import NamedArrays
from tests import costly
from tests.precision.made import parsed


def scaling(factors) -> object:
    """Logits ``[N, 3]`` from x ``[N, 3]``, times these factors."""
    text = "g (float[N, 3] x) => (float[N, 3] y) { y = Mul(x, k) }"
    return parsed(text, k=np.asarray(factors, np.float32))


X = np.array([[1, 2, 3], [6, 5, 4], [1, 9, 8], [7, 7, 7.5]], np.float32)
LABELS = np.array([2, 0, 1, -1])


def batches(values=X, labels=LABELS, count=None):
    return lambda: iter([NamedArrays("first", {"x": values[:2]}, labels[:2]),
                         NamedArrays("rest", {"x": values[2:]}, labels[2:], count)])  # fmt: skip


def measured(factors, read=None, base=(1, 1, 1)):
    meter = CostMeter(scaling(base), read or batches(), silent)
    return meter.measure({"it": lambda: scaling(factors)})["it"]


def test_errors_and_signals_are_summed_over_all_rows():
    found = measured((1, 1, 1.5))
    assert found.snr_db == pytest.approx(costly.snr_db(X * [1, 1, 1.5], X), abs=1e-9)
    # answers: 2, then 0 (6 and 6: the first), then 2 for 1, then 2
    assert (found.rows, found.changed, found.answers) == (4, 1, 4)
    assert found.drop == pytest.approx(1 / 3), "the row without a label does not count"
    assert (found.gates, found.gates_changed) == (0, 0)


def test_a_gain_is_a_negative_drop_and_nothing_changed_is_exact():
    wrong = lambda: batches(labels=np.array([2, 0, 2, 2]))()  # noqa: E731
    assert measured((1, 1, 1.5), wrong).drop == pytest.approx(-1 / 4)
    same = measured((1, 1, 1))
    assert (same.snr_db, same.noise, same.drop, same.changed) == (math.inf, 0.0, 0.0, 0)


def test_rows_that_fill_a_batch_do_not_count():
    found = measured((1, 1, 1.5), batches(count=1))
    assert found.rows == found.answers == 3
    assert found.snr_db == pytest.approx(costly.snr_db((X * [1, 1, 1.5])[:3], X[:3]), abs=1e-9)


def test_a_model_that_is_not_finite_costs_everything():
    found = measured((1, 1, np.inf))
    assert (found.snr_db, found.noise) == (-math.inf, math.inf)


def test_an_infinity_that_both_have_is_no_error():
    assert measured((1, 1.25, np.inf), base=(1, 1, np.inf)).snr_db == pytest.approx(
        costly.snr_db(X[:, :2] * [1, 1.25], X[:, :2]), abs=1e-9
    )


def test_a_float_model_that_gives_nan_is_refused():
    with pytest.raises(ModelError, match="y holds NaN on first in float, so there is nothing to compare with"):
        measured((1, 1, 1), base=(1, 1, np.nan))


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(UsageError, match="Label 3 of row 1 in first is outside 0 to 2"):
        measured((1, 1, 1), batches(labels=np.array([0, 3, 0, 0])))


def test_outputs_that_are_no_floats_have_no_cost():
    indices = parsed("g (float[N, 3] x) => (int64[N, 1] y) { y = ArgMax<axis = 1>(x) }")
    with pytest.raises(UsageError, match="No output of the model is floating"):
        CostMeter(indices, batches(), silent).measure({"it": lambda: indices})


def test_data_beyond_a_chunk_give_the_same_and_the_float_model_runs_once_otherwise(monkeypatch):
    reads = []

    def counted():
        reads.append(1)
        return batches()()

    meter = CostMeter(scaling((1, 1, 1)), counted, silent)
    first = meter.measure({"it": lambda: scaling((1, 1, 1.5))})
    assert meter.measure({"it": lambda: scaling((1, 1, 1.5))}) == first
    assert len(reads) == 1
    monkeypatch.setattr(costs, "_CHUNK_BYTES", 1)
    small = CostMeter(scaling((1, 1, 1)), counted, silent)
    assert small.measure({"it": lambda: scaling((1, 1, 1.5))}) == first
    assert small.measure({"it": lambda: scaling((1, 1, 1.5))}) == first
    assert len(reads) == 3
