"""What is kept over the samples."""

from __future__ import annotations

import numpy as np
import pytest

from scconv_deploy.records import tolerances
from scconv_deploy.records.parity import LayerError
from scconv_deploy.verification.checks import parity as judge
from scconv_deploy.verification.measure import AgainstNoise, Measured
from scconv_deploy.verification.metrics import compare
from scconv_deploy.verification.reference.run import ReferenceRun


def test_metrics_are_the_worst_of_each_and_agreement_counts_all_rows():
    measured = Measured(tolerances.table())
    reference = np.array([[1.0, 0.0], [1.0, 0.999999]], np.float32)
    far = reference * np.float32(1.001)  # the farthest in relative L2, every row agrees
    near = np.array([[1.0, 0.0], [0.999999, 1.0]], np.float32)  # one row of two does not
    for y in (far, near, reference):
        measured.keep_metrics("y", compare(y, reference), len(y))
    found = measured.end_to_end["y"]
    assert found.relative_l2 == compare(far, reference).relative_l2
    assert found.snr_db == compare(far, reference).snr_db
    assert found.top1_agreement == pytest.approx(5 / 6)
    assert found.top5_agreement is None
    assert found.quantiles_abs == compare(far, reference).quantiles_abs


def test_non_finite_tensors_are_named_and_do_not_grow_with_the_data():
    measured = Measured(tolerances.table())
    for number in range(300):
        run = ReferenceRun(f"d.npz {number}", {}, {}, {}, {}, {}, {}, kind="d.npz")
        measured.note_non_finite("output y", run)
    assert list(measured.non_finite)[:2] == ["output y on d.npz 0", "output y on d.npz 1"]
    assert len(measured.non_finite) == 9
    assert measured.non_finite["output y on d.npz"] == 292


def judged(*pairs):
    """The check of an output that several samples gave, each (error, floor)."""
    measured = Measured(tolerances.table())
    run = ReferenceRun("d", {}, {}, {}, {}, {}, {})
    for error, floor in pairs:
        measured.keep_replay("y", AgainstNoise(error, floor, "largest_floor.float32", 3e-5), run)
    (check,) = judge.replay_checks(measured)
    return check


@pytest.mark.parametrize("last", [False, True])
def test_a_sample_whose_floor_is_too_high_is_not_hidden_by_others(last):
    """Its ratio is small whatever the artifact does: an error of 4e-4 is 0.4 of a floor of 1e-3."""
    samples = [(2e-7, 1e-7), (4e-4, 1e-3)]
    check = judged(*(samples if last else samples[::-1]))
    assert check.status == "failed"
    assert "own noise is 1.0e-03 (limit 3e-05)" in check.reason
    assert judged((2e-7, 1e-7), (4e-7, 1e-7)).status == "passed"
    assert "4.0x" in judged((4e-7, 1e-7), (2e-7, 1e-7)).reason


@pytest.mark.parametrize("odd", [(np.nan, 1e-7), (1e-7, np.nan), (np.inf, 1e-7), (1e-7, np.inf)])
def test_what_is_no_number_stays_the_worst(odd):
    assert judged(odd, (1e-7, 1e-7)).status == "failed"
    assert judged((1e-7, 1e-7), odd).status == "failed"


def layers(*found):
    measured = Measured(tolerances.table())
    for number, (error, floor) in enumerate(found):
        measured.keep_layer(LayerError(f"x{number}", "m", error, floor))
    (check,) = judge.layers_check(measured)
    return check


def test_layers_whose_floor_is_too_high_are_counted_apart():
    check = layers((2e-7, 1e-7), (1e-3, 1e-3))
    assert (check.status, check.quantities[0].value) == ("passed", pytest.approx(2))
    assert check.reason == (
        "1 inputs of SRUs stay within 5.2x their noise; 1 not judged, for their own noise is above 3e-05"
    )
    assert layers((1e-3, 1e-3)).status == "not run"
    assert layers((1e-6, 1e-7), (1e-3, 1e-3)).status == "failed"


def test_a_noisy_sample_does_not_hide_a_layer_that_failed_on_another():
    fails = (1e-6, 1e-7)
    for noisy in ((5e-4, 4e-5), (1e-3, float("inf")), (float("nan"), float("nan"))):
        for order in ((fails, noisy), (noisy, fails)):
            measured = Measured(tolerances.table())
            for error, floor in order:
                measured.keep_layer(LayerError("x", "m", error, floor))
            (check,) = judge.layers_check(measured)
            assert (check.status, check.quantities[0].value) == ("failed", pytest.approx(10)), (noisy, order)


@pytest.mark.parametrize(("data", "status"), [(np.float16, "not run"), (np.float32, "failed")])
def test_an_index_that_half_does_not_tell_is_not_judged(data, status):
    """An argmax over near scores; in float32 it is a reference that proves nothing."""
    measured = Measured(tolerances.table(), np.dtype(data))
    index = np.arange(100)
    floor = 2 * tolerances.ALL["largest_floor.index"].value
    run = ReferenceRun("d", {}, {}, {}, {}, {}, {})
    measured.keep_replay("y", measured.against_noise(index, index, floor), run)
    assert [check.status for check in judge.replay_checks(measured)] == [status]
    measured.swapped_error["y"] = measured.replay["y"]
    assert [c.status for c in judge.swapped_checks(True, measured) if c.name == "whole model"] == ["failed"]
