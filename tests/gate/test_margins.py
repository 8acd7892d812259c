"""The rule for gates running free: it explains what rounding does and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scconv_deploy.gate.margins import MARGIN_EDGES, GateForm, count_flips, count_free_flips, histogram, margins

RNG = np.random.default_rng(0)


def form(channels=32, groups=4, uncentred=False, ddof=1, seed=0):
    rng = np.random.default_rng(seed)
    cut = rng.normal(size=channels).astype(np.float32)
    sign = rng.choice([-1.0, 1.0], channels).astype(np.float32)
    return GateForm(groups, ddof, 0.0, 1e-10, uncentred, cut, sign, np.abs(cut).astype(np.float64))


def drawn(shape=(2, 32, 12, 12), mean=0.0, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) + mean).astype(np.float32)


def decide(x, f):
    """The gate in float32, by NumPy's pairwise sums: one honest implementation."""
    groups = x.reshape(len(x), f.num_groups, -1)
    centred = groups - groups.mean(axis=2, keepdims=True)
    s = np.sqrt(np.square(centred).sum(axis=2, keepdims=True) / np.float32(groups.shape[2] - f.ddof))
    per_channel = np.broadcast_to(s, groups.shape).reshape(x.shape)
    return f.sign.reshape(1, -1, 1, 1) * centred.reshape(x.shape) >= per_channel * f.cut.reshape(1, -1, 1, 1)


def test_margins_by_hand():
    x = np.array([1.0, 2.0, 3.0, 6.0], dtype=np.float32).reshape(1, 2, 1, 2)
    one = GateForm(
        1, 1, 0.0, 0.5, False, np.array([0.5, -1], np.float32), np.array([1, -1], np.float32), np.array([0.5, 1.0])
    )
    found = margins(x, one)
    s = np.sqrt((4 + 1 + 0 + 9) / 3) + 0.5
    expected = np.array([-2 - 0.5 * s, -1 - 0.5 * s, 0 + s, -3 + s]).reshape(x.shape)
    np.testing.assert_allclose(found.margin, expected)
    np.testing.assert_allclose(found.spread, s)
    k = 2 + 4
    bound = k * 3 + 2 * np.abs([-2, -1, 0, 3]) + (k + 4) * s * np.array([0.5, 0.5, 1, 1])
    np.testing.assert_allclose(found.bound.ravel(), 2.0**-24 * bound)
    assert not found.ill.any()


def test_on_the_same_input_both_rules_are_one():
    f, x = form(), drawn()
    found = margins(x, f)
    for factor in (0.5, 0.99, 1.01, 3.0):
        # gates turned where the margin is this many bounds
        near = np.abs(np.abs(found.margin) / found.bound - factor) < 0.5
        reference = found.margin >= 0
        artifact = reference ^ near
        free = count_free_flips(reference, artifact, x, x, f)
        forced = count_flips(near, x, f)
        assert (free.flips, free.unexplained) == (forced.flips, forced.unexplained)


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_two_right_implementations_on_different_inputs_are_explained(size, mean):
    f, flips = form(), 0
    for seed in range(5):
        x = drawn((4, 32, 24, 24), mean, seed)
        moved = (x + size * np.random.default_rng(seed + 100).normal(size=x.shape)).astype(np.float32)
        count = count_free_flips(decide(x, f), decide(moved, f), x, moved, f)
        assert count.unexplained == 0
        flips += count.flips
    assert flips > 0 or size < 1e-3  # the test would be empty


def test_an_error_away_from_the_threshold_explains_nothing():
    """The artifact's input moved further into the open, and its gate closed: no error of the input does that."""
    f, x = form(), drawn()
    found = margins(x, f)
    reference = found.margin >= 0
    index = tuple(np.argwhere(reference & (found.margin > 0.2))[0])
    artifact = reference.copy()
    artifact[index] = False
    away = x.copy()
    away[index] += f.sign[index[1]] * 5  # |error| is far larger than the margin
    assert abs(margins(away, f).margin[index] - found.margin[index]) > found.margin[index]
    count = count_free_flips(reference, artifact, x, away, f)
    assert (count.flips, count.unexplained, count.channels) == (1, 1, 1)
    assert count.largest_margin == pytest.approx(found.margin[index] / found.spread[index])
    towards = x.copy()
    towards[index] -= f.sign[index[1]] * 5
    assert count_free_flips(reference, artifact, x, towards, f).unexplained == 0


def test_a_reference_on_the_wrong_side_is_unexplained():
    f, x = form(), drawn()
    found = margins(x, f)
    wrong = found.margin < 0  # every gate of the reference is inverted
    count = count_free_flips(wrong, ~wrong, x, x, f)
    assert count.unexplained > 0.99 * x.size


FAULTS = {
    "inverted": lambda x, f: ~decide(x, f),
    "cut moved by 1e-3": lambda x, f: decide(x, replace(f, cut=f.cut + np.float32(1e-3))),
    "biased deviation of small groups": lambda x, f: decide(x, replace(f, ddof=0)),
    "halves of the gates swapped": lambda x, f: np.roll(decide(x, f), 16, axis=1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_unexplained_however_noisy_the_input(name):
    f, unexplained = form(), 0
    for seed in range(4):
        x = drawn((4, 32, 6, 6), seed=seed)
        moved = (x * (1 + 1e-6 * RNG.normal(size=x.shape))).astype(np.float32)
        unexplained += count_free_flips(decide(x, f), FAULTS[name](moved, f), x, moved, f).unexplained
    assert unexplained > 0


def test_ill_conditioned_groups_of_either_side_are_counted_apart():
    f = form()
    flat = np.full((1, 32, 4, 4), 3.7, dtype=np.float32)
    x = drawn((1, 32, 4, 4))
    reference = np.ones(x.shape, dtype=bool)
    for one, other in ((flat, x), (x, flat)):
        count = count_free_flips(reference, ~reference, one, other, f)
        assert (count.flips, count.ill_conditioned) == (0, x.size)


def test_a_margin_that_is_no_number_is_unexplained():
    f, x = form(), drawn((1, 32, 4, 4))
    broken = x.copy()
    broken[0, 0, 0, 0] = np.nan
    reference = np.ones(x.shape, dtype=bool)
    artifact = reference.copy()
    artifact[0, 0] = False
    assert count_free_flips(reference, artifact, x, broken, f).unexplained == 16


def test_histogram_counts_every_gate_in_its_power_of_two():
    f, x = form(), drawn()
    found = margins(x, f)
    counts = histogram(x, f)
    assert counts.sum() == x.size
    expected, _ = np.histogram(np.abs(found.margin / found.spread), [0, *MARGIN_EDGES[1:-1], np.inf])
    assert np.abs(counts - expected).sum() <= 4  # float32 puts a margin on an edge into the neighbouring bin
    assert len(counts) == len(MARGIN_EDGES) - 1


def test_histogram_holds_what_is_out_of_range():
    f = form()
    closed = GateForm(4, 1, 0.0, 1e-10, False, np.full(32, np.inf, np.float32), np.zeros(32, np.float32), f.cut_scale)
    counts = histogram(drawn(), closed)
    assert counts[-1] == drawn().size
