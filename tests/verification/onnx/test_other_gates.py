"""Gates of no known SRU: found, compared on the same input and replayed; a healthy file passes, a damaged one fails."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from scconv_deploy.bundle.reference import read_reference, write_reference
from scconv_deploy.gate.other_gates import (
    STEPS,
    UNIT_ROUNDOFF,
    Found,
    OtherGate,
    OtherGateMeasured,
    View,
    count_flips,
    margin_error,
    mean_error,
)
from scconv_deploy.graph import instrument
from scconv_deploy.graph.file import serialize
from scconv_deploy.model import steps
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, Link
from scconv_deploy.report.verdict import parity_error
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.reference.run import ReferenceRun
from scconv_deploy.verification.samples import Sample, noise_samples
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests import wild
from tests.other_gates import DAMAGE, GATES, AbsoluteSRU, Lambda, all_gates, around, gated, two_masks
from tests.verification.judging import check_of, checks_by_hand, judge
from tests.verification.onnx.test_half import halved
from tests.verified import verify_bundle
from tests.workflows.test_verify import make_bundle

FLOAT32 = np.dtype(np.float32)


def exported(model, shape=(2, 3, 16, 16)):
    image = torch.randn(shape, generator=torch.manual_seed(0))
    reference, log = reference_from_module(model, image)
    return reference, serialize(export_to_ir(reference, ExportOptions(), log))


@pytest.fixture(scope="module")
def two():
    return exported(two_masks())


@pytest.fixture(scope="module")
def many():
    return exported(gated("many flips"))


def load(content):
    return onnx.load_model_from_string(content)


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_every_form_of_a_gate_is_found_and_a_healthy_file_passes():
    reference, content = exported(all_gates())
    report = judge(reference, load(content))
    assert report, report.failures
    assert [gate.site for gate in report.other_gates if gate.reason] == []
    assert {gate.site.split("::")[0] for gate in report.other_gates} == {f"2.gates.{i}" for i in range(len(GATES))}
    assert [gate.unexplained for gate in report.other_gates] == [0] * len(report.other_gates)
    assert max(gate.operand_ratio for gate in report.other_gates) < 8


def test_gates_that_flip_are_explained_and_the_replay_is_as_sharp_as_without(many):
    report = judge(many[0], load(many[1]))
    (gate,) = report.other_gates
    assert gate.site == "2::gt"
    assert gate.flips
    assert gate.unexplained == 0
    (output,) = report.outputs
    assert output.noise_floor < 1e-6
    assert output.replay_ratio < 8
    assert output.end_to_end.relative_l2 > 1e-3  # running free it jumps


def test_three_axes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 16, 3, padding=1), AbsoluteSRU(axes=3), nn.Conv3d(16, 4, 1)).eval()
    with torch.no_grad():
        net[1].gamma[:, 5] = 1e-3  # its sigmoid is at 0.5, but for rounding
    reference, content = exported(net, (1, 1, 6, 8, 8))
    report = judge(reference, load(content))
    assert report, report.failures
    assert [gate.site for gate in report.other_gates] == ["1::ge", "1::lt"]


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_fails(two, name):
    reference, content = two
    model = load(content)
    DAMAGE[name].damage(model)
    report = judge(reference, model)
    assert report.verdict == "failed"
    assert check_of(report, DAMAGE[name].check).status == "failed"


def test_beside_a_known_sru_each_is_judged_its_own_way():
    torch.manual_seed(0)
    gate = Lambda(lambda x: torch.where(torch.sin(x * 3e4) > 0, x, -x))
    net = around(nn.Sequential(wild.randomize(wild.OriginalSRU(16, 4)), gate))
    reference, content = exported(net)
    report = judge(reference, load(content))
    assert report, report.failures
    (sru,), (other,) = report.srus, report.other_gates
    assert (sru.teacher_forced.unexplained, other.unexplained) == (0, 0)
    assert other.flips
    assert check_of(report, "whole model").status == "passed"
    assert report.outputs[0].noise_floor < 1e-6


def test_the_reference_that_travels_judges_alike(two, tmp_path):
    reference, content = two
    bundle = make_bundle(tmp_path / "good", reference, content)
    report = verify_bundle(bundle)
    assert report, report.failures
    assert [(g.site, g.gates) for g in report.other_gates] == [("model::ge", 8192), ("model::gt", 8192)]
    for name in ("threshold moved by 1e-3", "comparison inverted", "mask dropped"):
        model = load(content)
        DAMAGE[name].damage(model)
        (bundle / "model.onnx").write_bytes(model.SerializeToString())
        report = verify_bundle(bundle)
        assert check_of(report, DAMAGE[name].check).status == "failed", name


def test_gates_whose_operands_were_not_kept_are_not_called_compared(two, tmp_path):
    reference, content = two
    bundle = make_bundle(tmp_path / "small", reference, content, largest_bytes=1)
    report = verify_bundle(bundle)
    assert check_of(report, "other gates").status == "not run"
    assert any("kept no operands" in caveat for caveat in report.caveats)


def test_a_gate_that_is_not_compared_beside_others_is_named():
    others = checks_by_hand().others
    for name, gates in (("a::ge", 9), ("b::ge", 0)):
        others.sites[name] = OtherGateMeasured(replace(FOUND, name=name), FlipCount(gates))
    one, other = others.checks()
    assert one.status == "passed"
    assert "at 1 of 2 places" in one.reason
    assert (other.status, other.reason) == ("not run", "not compared: b::ge: the reference kept no operands")


def test_a_gate_that_only_some_samples_come_to():
    """As a loop or an if in Python gives them; the file holds what its example came to."""

    def function(x):
        y = torch.where(x > 0.2, x, -x)
        return torch.where(y < -0.3, y, y + 1) if x.shape[0] == 2 else y

    torch.manual_seed(0)
    reference, content = exported(around(Lambda(function)))
    two_rows = noise_samples(reference.signature, 0)[0].tensors["input"][:2]
    images = [two_rows[:1], two_rows, two_rows[:1], two_rows]
    samples = [Sample(f"{n}", {"input": image}) for n, image in enumerate(images)]
    model = load(content)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "rows"
    report = judge(reference, model, samples)
    assert [gate.site for gate in report.other_gates] == ["2::gt", "2::lt"]
    gates = {gate.site: gate.gates for gate in report.other_gates}
    assert gates["2::gt"] * 2 == gates["2::lt"] * 3
    assert [gate.unexplained for gate in report.other_gates] == [0, 0]


# --- half ------------------------------------------------------------------------------------------------------------


def halved_gates(network, precision):
    image = torch.randn((2, 3, 16, 16), generator=torch.manual_seed(0))
    reference, _ = reference_from_module(network, image)
    return reference, halved(reference, ExportOptions(precision=precision))[1]


class Gates(nn.Module):
    """All of them that half can decide: "many flips" looks at digits that half has not."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(gate() for name, gate in GATES.items() if name != "many flips")

    def forward(self, x):
        return sum(gate(x) for gate in self.gates)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_gates_of_a_healthy_half_file_are_within_rounding(precision):
    torch.manual_seed(0)
    reference, model = halved_gates(around(Gates()), precision)
    report = judge(reference, model)
    assert check_of(report, "other gates").status == "passed", check_of(report, "other gates").reason
    assert [gate.site for gate in report.other_gates if gate.reason] == []
    assert sum(gate.flips for gate in report.other_gates)
    assert max(gate.operand_ratio for gate in report.other_gates) < 4


def threshold_moved(model, by):
    node = next(n for n in model.graph.node if n.op_type in ("Greater", "GreaterOrEqual"))
    stored = next(t for t in model.graph.initializer if t.name == node.input[1])
    value = onnx.numpy_helper.to_array(stored)
    model.graph.initializer.append(onnx.numpy_helper.from_array((value + by).astype(value.dtype), "moved"))
    node.input[1] = "moved"


THRESHOLDS = {
    "on a sigmoid": lambda x: torch.where(torch.sigmoid(x) > 0.5, x, -x),
    "on data": lambda x: torch.where(x > 0.2, x, -x),
}


@pytest.mark.parametrize("form", THRESHOLDS)
@pytest.mark.parametrize(("precision", "by"), [("fp16", 0.01), ("bf16", 0.05)])
def test_a_threshold_moved_in_half_is_no_noise_of_its_own(form, precision, by):
    torch.manual_seed(0)
    reference, model = halved_gates(around(Lambda(THRESHOLDS[form])), precision)
    assert judge(reference, model)
    threshold_moved(model, by)
    report = judge(reference, model)
    assert check_of(report, "other gates").status == "failed"


def test_a_moved_threshold_is_seen_without_a_rounded_reference():
    """As of an ONNX file: by the mean, which rounding leaves where it is."""
    rng = np.random.default_rng(0)
    m = rng.normal(size=(2, 8, 500)).astype(np.float32)
    view = View("ge", m, np.full((1, 8, 1), 4, np.float32), None, 1e-6)
    half = np.dtype(np.float16)
    near = m * (1 + 2.0**-10 * rng.uniform(-1, 1, m.shape)).astype(np.float32)
    assert mean_error(view, near) < 0.1 * UNIT_ROUNDOFF["float16"]
    assert mean_error(view, near + np.float32(0.02)) > 8 * UNIT_ROUNDOFF["float16"]
    gate = OtherGate("g", "ge", m >= 0, (view,))
    moved = m + np.float32(0.1)
    found = count_flips(gate, FOUND, moved >= 0, moved, 8, half, unmeasured=True)
    assert found.unexplained > found.flips / 2
    assert count_flips(gate, FOUND, near >= 0, near, 8, half, unmeasured=True).unexplained == 0


def test_the_noise_of_rounded_margins_travels(tmp_path):
    torch.manual_seed(0)
    reference, _ = halved_gates(two_masks(), "fp16")
    source, samples = TorchReference(reference), noise_samples(reference.signature, 0)[:1]
    write_reference(tmp_path, source, map(source.run, samples), [], rounded_to="float16")
    recorded = read_reference(tmp_path)
    found = recorded.rounded(recorded.run(0), None, "float16").others
    wanted = source.rounded(source.run(samples[0]), None, "float16").others
    assert list(found) == list(wanted) == ["model::ge", "model::gt"]
    assert found["model::ge"].views[0].error == wanted["model::ge"].views[0].error > 2.0**-14
    assert found["model::ge"].views[0].noise.shape == (1, 16, 1, 1)


# --- where a gate cannot be fixed ------------------------------------------------------------------------------------


def in_a_subgraph(model):
    """The gate of "many flips" inside an If that is always taken."""
    node = next(n for n in model.graph.node if n.op_type == "Greater")
    branches = []
    for number in range(2):
        inner = onnx.NodeProto()
        inner.CopyFrom(node)
        inner.output[0] = f"inner_{number}"
        value = helper.make_tensor_value_info(inner.output[0], TensorProto.BOOL, None)
        branches.append(helper.make_graph([inner], f"branch_{number}", [], [value]))
    # of the input, so that no optimiser folds it: a sum of squares is never negative
    image = model.graph.input[0].name
    number = helper.make_tensor("always_zero", TensorProto.FLOAT, [], [-1.0])
    model.graph.initializer.append(number)
    before = [
        helper.make_node("ReduceSumSquare", [image], ["always_size"], keepdims=0),
        helper.make_node("Greater", ["always_size", "always_zero"], ["always"]),
    ]
    taken = helper.make_node("If", ["always"], [node.output[0]], then_branch=branches[0], else_branch=branches[1])
    nodes = []
    for one in model.graph.node:
        nodes += [*before, taken] if one is node else [one]
    kept = [onnx.NodeProto() for _ in nodes]
    for copy, one in zip(kept, nodes, strict=True):
        copy.CopyFrom(one)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def test_what_jumps_and_cannot_be_fixed_is_not_run_and_neither_right_nor_wrong(many):
    reference, content = many
    model = load(content)
    in_a_subgraph(model)
    report = judge(reference, model)
    assert report.verdict == "not run"
    link = next(link for link in report.links if link.name == "onnxruntime")
    assert link.status == "not run"
    assert "2::gt" in link.reason
    assert "Greater in If" in link.reason
    error = parity_error("model.onnx", report, "Do not ship it.")
    assert error.exit_code == 6
    assert "was not judged" in error.message
    assert "ship it" not in str(error)
    assert json.loads(report.as_bytes())["verdict"] == "not run"


def test_damage_beyond_the_jumps_still_fails_there(many):
    reference, content = many
    model = load(content)
    in_a_subgraph(model)
    node = next(n for n in model.graph.node if n.op_type == "Where")
    node.input[1], node.input[2] = node.input[2], node.input[1]
    report = judge(reference, model)
    assert report.verdict == "failed"


def test_an_undecided_check_leaves_a_link_undecided_unless_one_failed():
    passed, undecided = Check("weights", "passed", "same"), Check("jumps", "not run", "it jumps")
    assert Link.of("l", [passed, undecided]).status == "not run"
    assert Link.of("l", [passed, undecided, Check("static", "failed", "differs")]).status == "failed"


def test_jumps_are_those_of_the_artifacts_data_type():
    """A threshold that half's rounding passes and float32's does not."""
    torch.manual_seed(0)
    net = Lambda(lambda x: x * 0.1 + (x > 1).float()).eval()
    x = torch.full((1, 2, 4, 4), 1 + 1e-4)
    source = TorchReference(reference_from_module(net, x)[0])
    run = source.run(Sample("x", {"x": x}))
    found = {data: max(source.jumps(run, ["model::gt"], data).values()) for data in ("float32", "float16", "bfloat16")}
    assert found["float32"] < 1e-5
    assert found["float16"] > 0.1
    assert found["bfloat16"] > 0.1


def test_a_jump_that_is_no_number_explains_nothing():
    net = Lambda(lambda x: x / (x > 1).float()).eval()
    x = torch.full((1, 2, 4, 4), 1 + 1e-7)
    source = TorchReference(reference_from_module(net, x)[0])
    run = source.run(Sample("x", {"x": x}))
    assert all(np.isfinite(value) for value in source.jumps(run, ["model::gt"], "float32").values())


def test_the_last_limit_decides_what_is_undecided():
    source = SimpleNamespace(jumps=lambda run, free, data: {"y": 1e-3, "z": np.inf})
    checks = checks_by_hand(source=source, nodes=[helper.make_node("ArgMax", ["x"], ["i"])])
    ruler, jumps, replay = checks.shared.ruler, checks.jumps, checks.replay
    one, ones = np.float32([1.0, 0.0]), np.ones(2, np.float32)
    run = ReferenceRun("x", {}, {}, {}, {}, {}, {})
    limit = ruler.largest_multiple("replay_multiple")
    found = ruler.measure(one + np.float32([0, 1.5e-6 * limit]), one, 1e-6)
    assert jumps.excuse(run, "y", found)
    replay.keep("y", found, run)
    assert [c.name for c in (*checks.others.checks(), *jumps.checks())] == ["jumps"]
    assert replay.checks()[0].status == "not run"
    for number in range(10**4):
        ruler.count("runtime", str(number))
    assert [*checks.others.checks(), *jumps.checks()] == []
    assert replay.checks()[0].status == "passed"
    assert not jumps.excuse(run, "z", ruler.measure(ones, one, 1e-6))  # an infinite jump explains nothing


def test_an_sru_without_a_node_jumps_and_has_its_own_line():
    """One of two SRUs written out: a gate of it that flips by rounding is neither right nor wrong."""
    torch.manual_seed(0)
    srus = [wild.randomize(wild.OriginalSRU(16, 4), seed) for seed in (1, 2)]
    net = nn.Sequential(nn.Conv2d(3, 16, 3), srus[0], nn.Conv2d(16, 16, 1), srus[1], nn.Conv2d(16, 8, 1)).eval()
    reference, content = exported(net)
    model = load(content)
    node = instrument.sites(model)["3"]
    function = instrument.function_of(model, node)
    inner = onnx.FunctionProto()
    inner.CopyFrom(function)
    inner.domain, inner.name = "written.out", "Plain"
    model.functions.append(inner)
    model.opset_import.append(helper.make_opsetid("written.out", 1))
    node.domain, node.op_type = inner.domain, inner.name
    report = judge(reference, model)
    assert report, report.failures
    assert any("3: no node" in caveat for caveat in report.caveats)
    source = TorchReference(reference)
    sample = noise_samples(reference.signature, 0)[0]
    run = source.run(sample)
    fixed, free = (max(source.jumps(run, names, "float16").values()) for names in ([], ["3"]))
    assert free > 10 * fixed


# --- what is recorded ------------------------------------------------------------------------------------------------


def recorded(function, x):
    model = Lambda(function).eval()
    with steps.recording(model, {"x": x}) as found, torch.no_grad():
        model(x)
    return found


def test_comparisons_of_constants_and_of_integers_are_no_gates():
    weight = torch.tensor([1.0, -1.0])

    def function(x):
        weight.mul_(1.0)  # in place, beside the data
        positions = torch.arange(2)
        return x * (weight > 0) * (positions < 1) * (x == x) * ((x > 0).long() > 0)

    assert list(recorded(function, torch.ones(3, 2)).decided) == ["model::gt"]


def test_memory_that_is_used_again_is_no_data():
    def function(x):
        for _ in range(20):
            y = x * 2
            del y
            constant = torch.ones(3, 2) * 0.5  # may stand where y stood
            assert bool((constant > 0.1).all())
        return x

    assert not recorded(function, torch.ones(3, 2)).decided


def test_writing_into_a_view_makes_its_tensor_data():
    def function(x):
        buffer = torch.zeros(4, 2)
        buffer[:3] = x
        return buffer > 0.5

    assert list(recorded(function, torch.ones(3, 2)).decided) == ["model::gt"]


def test_decisions_are_taken_from_outside_and_a_copy_of_them():
    model = Lambda(lambda x: (x > 0).float() * (x > 1).logical_not_()).eval()
    given = {"model::gt": torch.tensor([True, False]), "model::gt#2": torch.tensor([False, False])}
    x = torch.tensor([-1.0, 1.0])
    with steps.fixed(model, {"x": x}, given), torch.no_grad():
        y = model(x)
    assert y.tolist() == [1.0, 0.0]
    assert given["model::gt#2"].tolist() == [False, False]


@pytest.mark.parametrize(("kind", "threshold"), [("ge", 0.5), ("gt", 0.5), ("lt", 0.3), ("le", 0.7)])
def test_a_threshold_on_a_sigmoid_is_seen_in_its_argument_too(kind, threshold):
    x = torch.randn(1000, generator=torch.manual_seed(0))
    x[:100] *= 1e-7
    (operands,) = recorded(lambda x: getattr(torch, kind)(torch.sigmoid(x), threshold), x).operands.values()
    seen = [STEPS[operand.kind](operand.margin) for operand in operands]
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


# --- what is explained -----------------------------------------------------------------------------------------------


def gate(margin, noise=1e-6, kind="ge"):
    m = np.asarray(margin, np.float32).reshape(1, 1, -1)
    size = np.ones((1, 1, 1), np.float32)
    return OtherGate("g", kind, STEPS[kind](m), (View(kind, m, size, noise * size, noise),))


FOUND = Found("g", "v", ("a", "b"), "Node", "ge")


def flips(one, decided, margin, found=FOUND):
    shape = one.decided.shape
    return count_flips(
        one, found, np.reshape(decided, shape), np.asarray(margin, np.float32).reshape(shape), 8, FLOAT32
    )


def test_a_flip_within_the_noise_is_explained_and_one_beyond_is_not():
    one = gate([5e-6, 1e-4, 1.0])
    assert flips(one, [False, True, True], [-1e-6, 1e-4, 1.0]).unexplained == 0
    found = flips(one, [True, False, True], [5e-6, -1e-6, 1.0])
    assert (found.gates, found.flips, found.unexplained) == (3, 1, 1)


def test_an_equal_margin_explains_nothing():
    strict = replace(FOUND, kind="gt")
    found = flips(gate([0.0, 0.0]), [False, False], [0.0, -1e-9], strict)
    assert (found.flips, found.unexplained) == (2, 1)


def test_a_margin_that_was_rounded_only_to_be_shown_is_no_equal_one():
    found = flips(gate([0.0, 0.0]), [False, True], [0.0, 0.0])  # >= of 0 would be true
    assert (found.flips, found.unexplained) == (1, 0)


def test_a_rounding_may_be_the_neighbour_where_the_boundary_is_near():
    one = gate([0.4999999, 0.2, 2.3], kind="round")
    rounding = replace(FOUND, kind="round")
    near = flips(one, [1.0, 0.0, 2.0], [0.5000001, 0.2, 2.3], rounding)
    assert (near.flips, near.unexplained) == (1, 0)
    far = flips(one, [0.0, 1.0, 3.0], [0.4999999, 0.21, 2.31], rounding)
    assert (far.flips, far.unexplained) == (2, 2)


def test_operands_that_are_not_numbers_are_infinitely_far():
    view = gate([1.0, -1.0]).views[0]
    assert margin_error(view, np.full((1, 1, 2), np.nan, np.float32)) == np.inf
