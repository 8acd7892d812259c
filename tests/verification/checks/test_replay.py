"""The worst of an output and of a layer over the samples."""

from __future__ import annotations

import numpy as np
import pytest

from scconv_deploy.records import tolerances
from scconv_deploy.verification.reference.run import ReferenceRun
from scconv_deploy.verification.ruler import AgainstNoise
from tests.verification.judging import checks_by_hand


def against(error, floor):
    return AgainstNoise(error, floor, "largest_floor.float32", 3e-5)


def judged(*pairs):
    """The check of an output that several samples gave, each (error, floor)."""
    replay = checks_by_hand().replay
    run = ReferenceRun("d", {}, {}, {}, {}, {}, {})
    for pair in pairs:
        replay.keep("y", against(*pair), run)
    (check,) = replay.checks()
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


def layers_of(*found):
    layers = checks_by_hand().replay.layers
    for number, pair in enumerate(found):
        layers.keep(f"x{number}", "m", against(*pair))
    (check,) = layers.checks()
    return check


def test_layers_whose_floor_is_too_high_are_counted_apart():
    check = layers_of((2e-7, 1e-7), (1e-3, 1e-3))
    assert (check.status, check.quantities[0].value) == ("passed", pytest.approx(2))
    assert check.reason == (
        "1 inputs of SRUs stay within 5.2x their noise; 1 not judged, for their own noise is above 3e-05"
    )
    assert layers_of((1e-3, 1e-3)).status == "not run"
    assert layers_of((1e-6, 1e-7), (1e-3, 1e-3)).status == "failed"


def test_a_noisy_sample_does_not_hide_a_layer_that_failed_on_another():
    fails = (1e-6, 1e-7)
    for noisy in ((5e-4, 4e-5), (1e-3, float("inf")), (float("nan"), float("nan"))):
        for order in ((fails, noisy), (noisy, fails)):
            layers = checks_by_hand().replay.layers
            for pair in order:
                layers.keep("x", "m", against(*pair))
            (check,) = layers.checks()
            assert (check.status, check.quantities[0].value) == ("failed", pytest.approx(10)), (noisy, order)


@pytest.mark.parametrize(("data", "status"), [(np.float16, "not run"), (np.float32, "failed")])
def test_an_index_that_half_does_not_tell_is_not_judged(data, status):
    """An argmax over near scores; in float32 it is a reference that proves nothing."""
    checks = checks_by_hand(data=data)
    measure = checks.shared.ruler.measure
    index = np.arange(100)
    floor = 2 * tolerances.ALL["largest_floor.index"].value
    run = ReferenceRun("d", {}, {}, {}, {}, {}, {})
    checks.replay.keep("y", measure(index, index, floor), run)
    assert [check.status for check in checks.replay.checks()] == [status]
    checks.swapped.outputs["y"] = checks.replay.outputs["y"]
    assert [c.status for c in checks.swapped.checks() if c.name == "whole model"] == ["failed"]
