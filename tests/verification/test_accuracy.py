"""Accuracy in pairs: counts by hand, the interval against the published formula's properties and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from scconv_deploy.verification.accuracy import ChangedAnswers, PairedCounts


def logits(*classes):
    return np.eye(4)[list(classes)]


def test_counts_by_hand():
    counts = PairedCounts()
    counts.add(logits(0, 1, 2, 3, 0), logits(0, 2, 1, 1, 1), np.array([0, 1, 1, 2, -1]))  # the last one has no label
    assert counts == PairedCounts(both_right=1, reference_only=1, artifact_only=1, both_wrong=1)
    found = counts.accuracy()
    assert (found.samples, found.reference, found.artifact, found.difference) == (4, 0.5, 0.5, 0.0)
    assert PairedCounts().accuracy() is None


def test_a_nan_is_a_wrong_answer_unless_it_hides_the_right_one():
    counts = PairedCounts()
    broken = logits(1)
    broken[0, 2] = np.nan  # argmax takes the first NaN
    counts.add(logits(1), broken, np.array([1]))
    assert counts.reference_only == 1


def test_interval_of_equal_answers_has_a_width_and_shrinks():
    widths = []
    for n in (20, 200, 2000):
        found = PairedCounts(both_right=n * 9 // 10, both_wrong=n // 10).accuracy()
        assert found.difference == 0
        assert found.low < 0 < found.high
        assert found.low == pytest.approx(-found.high)
        widths.append(found.high - found.low)
    assert widths[0] > widths[1] > widths[2] > 0


def test_interval_turns_with_the_sides_and_stays_within_one():
    one = PairedCounts(30, 12, 4, 6).accuracy()
    other = PairedCounts(30, 4, 12, 6).accuracy()
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert one.difference == pytest.approx(-8 / 52)
    worst = PairedCounts(reference_only=10).accuracy()
    assert worst.difference == -1
    assert -1 <= worst.low <= -1 + 1e-12
    assert worst.high < 0


@pytest.mark.parametrize(("right", "lost", "won"), [(0.9, 0.02, 0.01), (0.7, 0.1, 0.05), (0.5, 0.03, 0.1)])
def test_coverage_by_simulation(right, lost, won):
    """Newcombe gives 0.94 to 0.97 for intervals of 95 % over such tables; 4,000 draws say it to within 0.01."""
    rng = np.random.default_rng(0)
    tables = rng.multinomial(150, [right, lost, won, 1 - right - lost - won], size=4000)
    covered = 0
    for table in tables:
        found = PairedCounts(*map(int, table)).accuracy()
        covered += found.low <= won - lost <= found.high
    assert 0.93 <= covered / len(tables) <= 0.995


def test_a_higher_confidence_is_wider():
    counts = PairedCounts(80, 5, 3, 12)
    narrow, wide = counts.accuracy(0.8), counts.accuracy(0.99)
    assert wide.low < narrow.low < narrow.difference < narrow.high < wide.high


def test_rows_needed_are_the_fewest_whose_interval_holds_the_budget():
    counts = PairedCounts(both_right=90, reference_only=1, artifact_only=1, both_wrong=8)
    assert -counts.accuracy().low > 0.01
    needed = counts.rows_needed(0.01)
    for rows, holds in ((needed, True), (needed - 50, False)):
        times = rows / counts.samples
        low, _ = counts._interval(0.95, times)
        assert (-low <= 0.01) == holds
    worse = PairedCounts(both_right=90, reference_only=5, artifact_only=1, both_wrong=4)
    assert worse.rows_needed(0.04) is None, "the estimate is the budget: no number of rows shows that it holds"
    assert PairedCounts(both_right=10**6).rows_needed(0.5) == 10**6


def test_changed_answers_have_wilsons_interval():
    counts = ChangedAnswers(1, 16)
    low, high = counts.interval()
    assert (round(low, 4), round(high, 4)) == (0.0111, 0.2833)  # Wilson's, by hand
    needed = counts.rows_needed(0.1)
    scale = needed / 16
    assert ChangedAnswers(round(scale), needed).interval()[1] == pytest.approx(0.1, abs=0.002)
    assert counts.rows_needed(1 / 16) is None
