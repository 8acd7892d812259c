"""Every tolerance of the table decides: just within it passes, just beyond it fails, and an override moves it.

One measurement for each, held against the limit by what judges artifacts and engines; no runtime in it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from scconv_deploy.errors import UsageError
from scconv_deploy.gate.other_gates import Found, OtherGateMeasured
from scconv_deploy.graph.types import NUMPY
from scconv_deploy.records import tolerances
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.stage import StageLog
from scconv_deploy.records.tolerances import ALL, FIXED, REWRITE
from scconv_deploy.verification.checks import weights
from scconv_deploy.verification.checks.budget import Budget
from scconv_deploy.verification.checks.gates import SiteGates
from scconv_deploy.verification.checks.integer_kernels import IntegerKernels
from scconv_deploy.verification.checks.rounding import Rounding
from scconv_deploy.verification.checks.second_opinion import SecondOpinion
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.checks.teacher_forced import TeacherForced
from scconv_deploy.verification.detections import align_rows
from scconv_deploy.verification.engine.outputs import EndToEnd
from scconv_deploy.verification.engine.readings import Readings, readings_values
from scconv_deploy.verification.metrics import compare
from scconv_deploy.verification.onnx.parity import Artifact, Judging, verify_onnx
from scconv_deploy.verification.reference import pytorch as torch_reference
from scconv_deploy.verification.reference.run import ReferenceRun, Site
from scconv_deploy.verification.ruler import AgainstNoise
from scconv_deploy.verification.samples import noise_samples
from tests import wild
from tests.verification.judging import checks_by_hand, export_of

RUN = ReferenceRun("sample", {}, {}, {}, {}, {}, {})
SITE = Site("a", "a", "groupbn-hard", "SRU", {}, {}, False, None)
MULTIPLE, ENGINE_MULTIPLE = ALL["replay_multiple"].value, ALL["engine_multiple"].value
MULTIPLES = dict.fromkeys(("float32", "index"), MULTIPLE) | dict.fromkeys(
    ("float16", "bfloat16"), ALL["half_multiple"].value
)


def type_of(data):
    return NUMPY["bf16"] if data == "bfloat16" else np.dtype(data)


def shared_by(limits, data="float32"):
    """What checks of an artifact of this type share, with one SRU."""
    shared = Shared(limits, type_of(data))
    shared.sites.gates["a"] = SiteGates(SITE)
    return shared


def pair(data, size):
    """(y, reference), this far apart: relative L2, or for indices the share of entries."""
    if data == "index":
        reference = np.zeros(200_000, np.int64)
        y = reference.copy()
        y[: round(size * reference.size)] = 1
        return y, reference
    return np.array([1, size, 0], np.float32), np.array([1, 0, 0], np.float32)


def failed(checks):
    return any(check.status == "failed" for check in checks)


def replayed(limits, data, size, floor):
    """Whether the replay of an output fails that is this far off, with PyTorch's own noise beside it."""
    checks = checks_by_hand(limits, type_of("float32" if data == "index" else data))
    checks.replay.keep("y", checks.shared.ruler.measure(*pair(data, size), floor), RUN)
    return failed(checks.replay.checks())


def flipped(limits, unexplained):
    """Whether gates fail of which this many changed that nothing explains."""
    check = TeacherForced(shared_by(limits), None)
    check.flips.counts["a"] = FlipCount(9, 3, unexplained)
    return failed(check.checks())


def swapped(limits, apart):
    """Whether SRUs fail whose values are this far from the given ones'."""
    check = checks_by_hand(limits).swapped
    check.distance = apart
    return failed(check.checks())


def run_on_an_engine(limits, kind, size, noise):
    data = "float32" if kind in ("tf32", "index") else kind
    manifest = SimpleNamespace(flags=("TF32",) if kind == "tf32" else (), data_type=data)
    outputs = EndToEnd(manifest, Shared(limits))
    y, reference = pair(kind, size)
    run = ReferenceRun("sample", {}, {"y": reference}, {}, {}, {}, {})
    outputs.add(run, {"y": y}, noise)
    return failed(outputs.checks())


def alone_in_an_engine(limits, data, size):
    readings = Readings(data, "alone", shared_by(limits))
    readings.apart["a"], readings.foreign["a"] = size, 0
    return failed([readings_values("values of SRUs", readings)])


def off_by_ulps(limits, ulps):
    weight = np.full((1, 64), 1, np.float32)
    stored = weight * np.float32(1.5)
    stored[0, 5] += np.float32(ulps * 1.5 * 2.0**-23)
    tensor = numpy_helper.from_array(stored, "w")
    model = helper.make_model(helper.make_graph([], "g", [], [], initializer=[tensor]))
    return failed([weights.check(model, {"w": weight}, limits["weight_ulps"].value)])


def out_of_order(limits, apart):
    """Whether two detections stay in the wrong order whose scores are this far apart."""
    reference = {
        "boxes": np.float64([[[0, 0, 1, 1], [5, 5, 6, 6]]]),
        "scores": np.float64([[0.5 + apart, 0.5]]),
        "labels": np.int64([[1, 1]]),
    }
    swapped = {name: values[:, ::-1] for name, values in reference.items()}
    aligned = align_rows(swapped, reference, limits["equal_scores"].value)
    return not np.array_equal(aligned["boxes"], reference["boxes"])


CASES = {
    "unexplained_flips": flipped,
    "swapped_values": swapped,
    "weight_ulps": off_by_ulps,
    "replay_multiple": lambda t, x: replayed(t, "float32", x * 1e-6, 1e-6),
    "half_multiple": lambda t, x: replayed(t, "float16", x * 1e-2, 1e-2),
    "equal_scores": out_of_order,
    "engine_multiple": lambda t, x: run_on_an_engine(t, "float32", x * 1e-3, {"y": 1e-3}),
    "engine_noise.unmeasured": lambda t, x: run_on_an_engine(t, "float32", ENGINE_MULTIPLE * x, {}),
    "assumed_floor": lambda t, x: replayed(t, "float32", MULTIPLE * x, None),
}


def other_gates(limits, ratio, data="float32"):
    """Whether a gate of no SRU fails whose operands are this many times their noise away."""
    others = checks_by_hand(limits, type_of(data)).others
    site = OtherGateMeasured(Found("a::ge", "v", ("a", "b"), "GreaterOrEqual v", "ge"), FlipCount(9))
    site.error, site.floor, site.compared = ratio * 1e-7, 1e-7, True
    others.sites["a::ge"] = site
    return failed(others.checks())


def jumping(limits, multiple):
    """Whether an output fails that is this many times the reference's own jumps away, in a graph with an argmax."""
    source = SimpleNamespace(jumps=lambda run, free, data: {"y": 1e-3})
    checks = checks_by_hand(limits, source=source, nodes=[helper.make_node("ArgMax", ["x"], ["i"])])
    found = checks.shared.ruler.measure(*pair("float32", multiple * 1e-3), 1e-7)
    checks.jumps.excuse(RUN, "y", found)
    checks.replay.keep("y", found, RUN)
    return failed(checks.replay.checks())


CASES["other_gates"], CASES["jump_multiple"] = other_gates, jumping
CASES["other_gates_half"] = lambda t, x: other_gates(t, x, "float16")


def second_opinion(limits, apart):
    check = SecondOpinion(None, shared_by(limits), None)
    check.opinions["a"] = FlipCount(9), apart
    return failed(check.checks())


CASES["second_opinion"] = second_opinion


def in_kernels(limits, ratio):
    """Whether a file with uint8 codes fails that integer kernels move by so many times the cost of quantising."""
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    zero = numpy_helper.from_array(np.uint8(0), "z")
    runs = SimpleNamespace(proto=helper.make_model(helper.make_graph([node], "g", [], [], [zero])))
    return failed([IntegerKernels(runs, limits).judged(ratio, "apart")])


CASES["integer_kernels"] = in_kernels
CASES["max_drop"] = lambda t, x: failed([Budget(t).judged(x, "costs")])


def rounded(limits, data, cost):
    """Whether rounding that costs an output this much fails."""
    rounding = Rounding(shared_by(limits, "float16" if data == "index" else data))
    expected, y = (np.zeros(2, np.float32), np.zeros(2, np.float32))
    expected[0] = y[0] = 1
    y[1] = cost
    rounding.keep("y", compare(y, expected))
    return failed(rounding.checks())


def scattered(limits, noise):
    """The same of a float32 output whose reference is continuous and this noisy."""
    checks = checks_by_hand(limits)
    checks.shared.ruler.add(replace(RUN, floors={"y": noise}, continuous=True))
    checks.replay.keep("y", checks.shared.ruler.measure(*pair("float32", 0.0), noise), RUN)
    return failed(checks.replay.checks())


CASES["largest_scatter.float32"] = scattered
for _data in ("float16", "bfloat16"):
    CASES[f"half_budget.{_data}"] = lambda t, x, data=_data: rounded(t, data, x)
for _data in ("float32", "float16", "bfloat16", "index"):
    CASES[f"smallest_floor.{_data}"] = lambda t, x, data=_data: replayed(t, data, MULTIPLES[data] * x, 0.0)
    CASES[f"largest_floor.{_data}"] = lambda t, x, data=_data: replayed(t, data, 0.0, x)
for _kind in ("float32", "tf32", "float16", "bfloat16", "index"):
    CASES[f"engine_noise.{_kind}"] = lambda t, x, kind=_kind: run_on_an_engine(t, kind, ENGINE_MULTIPLE * x, {"y": 0.0})
for _data in ("float32", "float16", "bfloat16"):
    CASES[f"engine_sru.{_data}"] = lambda t, x, data=_data: alone_in_an_engine(t, data, x)


def test_every_tolerance_has_its_case():
    assert CASES.keys() == ALL.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_tolerance_decides_and_an_override_moves_it(name):
    value = ALL[name].value
    counted = name in ("unexplained_flips", "weight_ulps")
    within, beyond = (value, value + 1) if counted else (0.99 * value, 1.01 * value)
    usual = tolerances.table()
    assert not CASES[name](usual, within)
    assert CASES[name](usual, beyond)
    wider = tolerances.table({name: value + 2 if counted else 1.02 * value})
    assert not CASES[name](wider, beyond)
    if within:
        narrower = tolerances.table({name: value - 1 if counted else 0.98 * value})
        assert CASES[name](narrower, within)


def test_a_definition_is_printed_and_not_changed():
    assert all(tolerance.reason and tolerance.limits for tolerance in (ALL | FIXED | REWRITE).values())
    assert len(ALL | FIXED | REWRITE) == len(ALL) + len(FIXED) + len(REWRITE)
    with pytest.raises(UsageError, match="ill_conditioned defines what is counted and cannot be changed"):
        tolerances.parse_overrides(["ill_conditioned=1e-3"])


# --- through a whole report --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """(reference, artifact)."""
    torch.manual_seed(0)
    return export_of(nn.Sequential(nn.Conv2d(3, 16, 3), wild.randomize(wild.SoftSRU(16), 2)).eval())


@pytest.mark.parametrize(
    ("name", "value"),
    [("second_opinion", 1e-9), ("smallest_floor.float32", 1e-3), ("largest_floor.float32", 1e-9)],
)
def test_an_override_moves_the_verdict_of_a_report(small, name, value):
    reference, model = small
    samples = noise_samples(reference.signature, 0)[:1]

    def report(overrides):
        artifact = Artifact(model, "model.onnx", b"")
        return verify_onnx(reference, artifact, samples, StageLog(), judging=Judging(overrides))

    usual, changed = report({}), report({name: value})
    assert usual, usual.failures
    assert not changed
    assert changed.overrides == {name: value}
    assert usual.tolerances == ALL | FIXED
    assert usual.outputs[0].floor_measured


def test_values_of_swapped_srus_are_held_against_their_tolerance(small, monkeypatch):
    """The small network's are equal to the bit, so one is moved a little."""
    reference, model = small
    module = reference.model[1]
    forward = type(module).forward
    monkeypatch.setattr(type(module), "forward", lambda self, x: forward(self, x) * (1 + 5e-7))
    samples = noise_samples(reference.signature, 0)[:1]

    def values(overrides):
        artifact = Artifact(model, "model.onnx", b"")
        report = verify_onnx(reference, artifact, samples, StageLog(), judging=Judging(overrides))
        return next(check for check in report.links[0].checks if check.name == "values")

    assert values({}).status == "passed"
    assert values({}).quantities[0].value == pytest.approx(5e-7, rel=0.3)
    assert values({"swapped_values": 1e-7}).status == "failed"
    monkeypatch.setattr(torch_reference, "_compare_call", lambda *_: (FlipCount(1), math.nan, None))
    assert values({}).status == "failed"


def test_the_noise_floor_that_is_too_high_is_named():
    limits = tolerances.table()
    found = AgainstNoise(0.0, 1e-4, "largest_floor.float32", limits["largest_floor.float32"].value)
    replay = checks_by_hand(limits).replay
    replay.keep("y", found, RUN)
    assert "y: the reference's own noise is 1.0e-04 (limit 3e-05)" in replay.checks()[0].reason
