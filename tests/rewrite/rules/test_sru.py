"""The rule that fuses a whole SRU: what it reads, what it refuses, and that it is never wrong."""

from functools import lru_cache

import numpy as np
import onnx
import onnxsim
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from scconv_deploy.gate.gate import Gate
from scconv_deploy.graph import instrument
from tests import wild
from tests.rewrite import naive
from tests.tolerances import NETWORK, ONE_SRU

SRUS = {
    "groupbn-hard": lambda: wild.OriginalSRU(8, 4),
    "groupbn-hard-normalized": lambda: wild.NormalizedSRU(8, 4),
    "groupnorm-soft": lambda: wild.SoftSRU(8, 4),
    "groupbn-hard-softmax": lambda: wild.SoftmaxSRU(8, 4),
    "groupbn-hard-strict": lambda: wild.StrictSRU(8, 4),
    "groupstd-hard": lambda: wild.BiasedSRU(8, 4),
    "groupvar-hard": lambda: wild.manual_sru(8, 4, 1e-5, 1, True),
}


@lru_cache
def exported(name="groupbn-hard", dynamo=False, dynamic=False, opset=18, seed=0):
    module = wild.randomize(SRUS[name](), seed)
    return module, naive.export(module, naive.noise(2, 8, 4, 6), dynamo, opset, dynamic)


@pytest.fixture(scope="module")
def script():
    """The original SRU from the TorchScript exporter, constants folded: small enough to be mutated often."""
    module, proto = exported()
    return module, onnxsim.simplify(proto)[0]


def forms():
    """torch.export takes seconds with open axes; tests/workflows/test_rewrite.py has the published variants of it."""
    for name in SRUS:
        for dynamo, dynamic in ((False, False), (False, True), (True, False)):
            kind = f"{'torch.export' if dynamo else 'TorchScript'}-{'dynamic' if dynamic else 'static'}"
            yield pytest.param(name, dynamo, dynamic, id=f"{name}-{kind}")


@pytest.mark.parametrize(("name", "dynamo", "dynamic"), forms())
def test_every_variant_is_read_before_and_after_onnxsim(name, dynamo, dynamic):
    module, proto = exported(name, dynamo, dynamic)
    x = naive.noise(3, 8, 6, 10) if dynamic else naive.noise(2, 8, 4, 6)
    with torch.no_grad():
        expected = module(x).numpy()
    for form in (proto, onnxsim.simplify(proto)[0]):
        result, applied = naive.rewritten(form)
        (fused,) = applied.fused
        assert fused.gate.variant.name == name
        assert fused.gate.variant.num_groups == 4
        assert [node.domain for node in result.graph.node] == ["scconv"]
        np.testing.assert_allclose(naive.run(result, x), expected, **ONE_SRU)


@pytest.mark.parametrize("opset", [19, 23])
def test_newer_opsets_with_group_normalization(opset):
    module, proto = exported("groupnorm-soft", True, False, opset)
    assert ("GroupNormalization" in [n.op_type for n in proto.graph.node]) == (opset >= 21)
    result, applied = naive.rewritten(proto)
    assert [f.gate.variant.name for f in applied.fused] == ["groupnorm-soft"]
    assert result.functions[0].opset_import[0].version == opset
    x = naive.noise(2, 8, 4, 6)
    np.testing.assert_allclose(naive.run(result, x), module(x).detach().numpy(), **ONE_SRU)


def test_groups_that_straddle_channels_take_the_overload():
    module = wild.randomize(wild.OriginalSRU(6, 4))
    x = naive.noise(2, 6, 4, 6)
    result, _ = naive.rewritten(naive.export(module, x, True))
    assert result.graph.node[0].overload == "straddle"
    np.testing.assert_array_equal(naive.run(result, x), module(x).detach().numpy())


def test_an_eps_that_the_exporter_dropped_is_assumed_and_noted():
    _, applied = naive.rewritten(exported(dynamo=True)[1])
    assert applied.fused[0].gate.variant.eps == 1e-10
    assert applied.fused[0].note == "the graph holds no eps; 1e-10 is assumed"
    _, applied = naive.rewritten(exported(dynamo=False)[1])
    assert applied.fused[0].note == ""


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
def test_a_computed_gamma_is_refused_with_the_reason(dynamo):
    """Its sum becomes one node and its threshold exact; cut and sign must be constants."""

    class Computed(wild.OriginalSRU):
        def forward(self, x):
            gamma = self.gn.gamma * (1 + x.mean())
            r = torch.sigmoid(wild.OriginalGroupBatchnorm2d.forward(self.gn, x) * (gamma / sum(gamma)))
            return wild.cross((r >= 0.5) * x, (r < 0.5) * x)

    module, x = wild.randomize(Computed(8, 4)), naive.noise(2, 8, 4, 6)
    proto = naive.export(module, x, dynamo)
    result, applied = naive.rewritten(onnxsim.simplify(proto)[0])
    assert not applied.fused
    assert "its gamma, beta or gate weight is computed in the graph" in applied.near_misses[0].reason
    assert set(applied.changed) == {"gamma sum", "sigmoid threshold"}
    assert [n.op_type for n in result.graph.node].count("ReduceSum") >= 1
    assert "Sigmoid" not in [n.op_type for n in result.graph.node]
    np.testing.assert_allclose(naive.run(result, x), module(x).detach().numpy(), **ONE_SRU)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_threshold_and_comparison_are_read_not_guessed(threshold):
    module = wild.randomize(wild.StrictSRU(8, 4, threshold))
    _, applied = naive.rewritten(naive.export(module, naive.noise(2, 8, 4, 6), False))
    variant = applied.fused[0].gate.variant
    assert (variant.comparison, variant.threshold) == (">", threshold)


def test_parameters_are_bit_for_bit_those_of_the_exporter():
    module, proto = exported("groupnorm-soft")
    result, applied = naive.rewritten(proto)
    gamma, beta = module.gn.weight.detach(), module.gn.bias.detach()
    found = Gate(applied.fused[0].gate.variant, gamma, beta).form
    stored = [numpy_helper.to_array(t) for t in instrument.parameters(result, result.graph.node[0]).values()]
    weight = (gamma / gamma.sum()).double()
    np.testing.assert_array_equal(stored[0], found.cut)
    np.testing.assert_array_equal(stored[1], found.sign)
    np.testing.assert_array_equal(stored[2], (gamma.double() * weight).float().numpy())
    np.testing.assert_array_equal(stored[3], (beta.double() * weight).float().numpy())


def node_of(proto, operator, index=0):
    return [n for n in proto.graph.node if n.op_type == operator][index]


def copy_of(proto):
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def refusal(proto):
    result, applied = naive.rewritten(proto)
    assert not applied.fused
    (miss,) = [m for m in applied.near_misses if m.rule == "sru"]
    return result, miss.reason


def test_a_gate_that_is_an_output_is_refused(script):
    proto = copy_of(script[1])
    sigmoid = node_of(proto, "Sigmoid").output[0]
    proto.graph.output.append(helper.make_tensor_value_info(sigmoid, 1, [2, 8, 4, 6]))
    assert refusal(proto)[1] == f"its {sigmoid} is an output of the graph"


def test_a_gate_that_is_needed_elsewhere_is_refused(script):
    proto = copy_of(script[1])
    cast = node_of(proto, "Cast").output[0]
    proto.graph.node.append(helper.make_node("Neg", [cast], ["z"], "other"))
    proto.graph.output.append(helper.make_tensor_value_info("z", 1, [2, 8, 4, 6]))
    assert refusal(proto)[1] == f"its {cast} is also needed by other"


def test_normalised_data_that_is_needed_elsewhere_stays():
    module = wild.randomize(wild.OriginalSRU(8, 4))
    proto = onnxsim.simplify(naive.export(module, naive.noise(2, 8, 4, 6), False))[0]
    affine = node_of(proto, "Mul", 3).input[0]
    proto.graph.output.append(helper.make_tensor_value_info(affine, 1, [2, 8, 4, 6]))
    result, applied = naive.rewritten(proto)
    assert len(applied.fused) == 1
    assert affine in [o.name for o in result.graph.output]


def test_initializers_that_two_share_are_kept(script):
    module = wild.randomize(wild.OriginalSRU(8, 4))
    twice = torch.nn.Sequential(module, torch.nn.ReLU(), module)
    x = naive.noise(2, 8, 4, 6)
    result, applied = naive.rewritten(onnxsim.simplify(naive.export(twice, x, False))[0])
    assert len(applied.fused) == 2
    np.testing.assert_array_equal(naive.run(result, x), twice(x).detach().numpy())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (wild.InvertedSRU(8, 4), "closed gates where an SRU's are open"),
        (wild.UncrossedSRU(8, 4), "no Concat of two crossed halves"),
        (wild.ClampedSRU(8, 4), None),
    ],
    ids=["inverted", "uncrossed", "clamped"],
)
def test_what_only_looks_like_one(module, reason):
    wild.randomize(module)
    x = naive.noise(2, 8, 4, 6)
    result, applied = naive.rewritten(onnxsim.simplify(naive.export(module, x, False))[0])
    if reason is None:  # the clamp stays before the node
        assert [n.op_type for n in result.graph.node][-2:] == ["Clip", "SRU"]
    else:
        assert not applied.fused
        assert reason in applied.near_misses[0].reason
    np.testing.assert_allclose(naive.run(result, x), module(x).detach().numpy(), **ONE_SRU)


@pytest.mark.parametrize("reader", ["Mul", "Split"])
def test_quantisers_inside_are_named(reader):
    """Model Optimizer quantises the gates before a Mul, XNNPACK's quantiser what they open, too."""
    module = wild.randomize(wild.OriginalSRU(8, 4))
    model = onnxsim.simplify(naive.export(module, naive.noise(2, 8, 4, 6), False))[0]
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    ending = "Cast" if reader == "Mul" else "Mul"
    places = [(node, i) for node in model.graph.node if node.op_type == reader
              for i, name in enumerate(node.input) if made.get(name) == ending]  # fmt: skip
    assert len(places) == 2
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1 / 64), "step"))
    model.graph.initializer.append(numpy_helper.from_array(np.int8(0), "zero"))
    for number, (node, index) in enumerate(places):
        codes, levels, place = f"codes{number}", f"levels{number}", list(model.graph.node).index(node)
        quantize = helper.make_node("QuantizeLinear", [node.input[index], "step", "zero"], [codes], name="rounding")
        model.graph.node.insert(place, helper.make_node("DequantizeLinear", [codes, "step", "zero"], [levels]))
        model.graph.node.insert(place, quantize)
        node.input[index] = levels
    _, applied = naive.rewritten(model)
    assert not applied.fused
    (reason,) = [miss.reason for miss in applied.near_misses if miss.rule == "sru"]
    assert reason == "rounding quantises its gates, or what they open; rewrite the float model"


def test_rewriting_again_finds_nothing(script):
    result, _ = naive.rewritten(script[1])
    again, applied = naive.rewritten(result)
    assert not applied
    assert [n.SerializeToString() for n in again.graph.node] == [n.SerializeToString() for n in result.graph.node]


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
def test_half_precision_is_refused(dynamo):
    module = wild.randomize(wild.OriginalSRU(8, 4)).half()
    _, reason = refusal(onnxsim.simplify(naive.export(module, naive.noise(2, 8, 4, 6).half(), dynamo))[0])
    assert reason == "its data is FLOAT16, which rounds its gates; rewrite the float32 model"


def test_a_float32_gate_on_half_precision_data_is_fused():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sru = wild.randomize(wild.OriginalSRU(8, 4))

        def forward(self, x):
            return self.sru(x.half().float()).half().float()

    module, x = Mixed(), naive.noise(2, 8, 4, 6)
    result, applied = naive.rewritten(onnxsim.simplify(naive.export(module, x, False))[0])
    assert len(applied.fused) == 1
    np.testing.assert_array_equal(naive.run(result, x), module(x).detach().numpy())


def mutate(proto, rng):
    """One change of the pattern; its name."""
    operator = rng.choice(["compare", "axis", "constant", "halves", "operands", "scale", "consumer", "output"])
    nodes = proto.graph.node
    if operator == "compare":
        compared = [n for n in nodes if n.op_type in ("GreaterOrEqual", "Less", "Greater", "LessOrEqual")]
        node = compared[int(rng.integers(len(compared)))]
        node.op_type = str(rng.choice(["GreaterOrEqual", "Less", "Greater", "LessOrEqual"]))
    elif operator == "axis":
        split = node_of(proto, "Split", int(rng.integers(2)))
        next(a for a in split.attribute if a.name == "axis").i = int(rng.choice([1, -3]))
        reduce = node_of(proto, "ReduceMean", int(rng.integers(2)))
        axes = next(t for t in proto.graph.initializer if t.name == reduce.input[1])
        axes.CopyFrom(numpy_helper.from_array(np.array([rng.choice([1, 2, -1])]), axes.name))
    elif operator == "constant":
        floats = [t for t in proto.graph.initializer if t.data_type == 1]
        tensor = floats[int(rng.integers(len(floats)))]
        value = numpy_helper.to_array(tensor) * np.float32(rng.choice([0.5, 0.999, 1.001, -1.0]))
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    elif operator == "halves":
        add = node_of(proto, "Add", -int(rng.integers(1, 3)))
        other = node_of(proto, "Split", int(rng.integers(2))).output[int(rng.integers(2))]
        add.input[int(rng.integers(2))] = other
    elif operator == "operands":
        commutative = [n for n in nodes if n.op_type in ("Mul", "Add")]
        node = commutative[int(rng.integers(len(commutative)))]
        node.input[:] = list(node.input)[::-1]
    elif operator == "scale":
        node = nodes[int(rng.integers(len(nodes)))]
        same_shape = ("Sub", "Sigmoid", "Div", "Sqrt")
        if node.op_type in same_shape:
            index = list(nodes).index(node)
            old, node.output[0] = node.output[0], "scaled"
            nodes.insert(index + 1, helper.make_node("Tanh", ["scaled"], [old]))
    elif operator == "consumer":
        inner = node_of(proto, str(rng.choice(["Sigmoid", "Cast", "Div", "Sub"]))).output[0]
        nodes.append(helper.make_node("Shape", [inner], ["size"]))
        proto.graph.output.append(helper.make_tensor_value_info("size", 7, None))
    else:
        inner = node_of(proto, str(rng.choice(["Sigmoid", "Sqrt", "Sub"]))).output[0]
        proto.graph.output.append(onnx.ValueInfoProto(name=inner))
    del proto.graph.value_info[:]
    return operator


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 2))
def test_a_mutated_pattern_is_refused_or_computes_the_same(script, seed, steps):
    """Never a wrong fusion: whatever was changed, the result computes what the changed graph computes."""
    rng = np.random.default_rng(seed)
    proto = copy_of(script[1])
    for _ in range(steps):
        mutate(proto, rng)
    x = naive.noise(2, 8, 4, 6, seed=seed % 100)
    try:
        before = naive.run(proto, x)
    except Exception:  # the mutation is no valid graph: nothing to rewrite
        return
    result, applied = naive.rewritten(proto)
    after = naive.run(result, x)
    if applied.fused:
        # near 0.5 the naive graph rounds gates that the exact cut does not; 384 gates of noise hold none
        assert np.allclose(after, before, **NETWORK, equal_nan=True)
    else:
        np.testing.assert_array_equal(after, before)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    channels=st.sampled_from([4, 8, 24]),
    groups=st.sampled_from([1, 2, 4]),
    threshold=st.sampled_from([0.4, 0.5, 0.52]),
    size=st.sampled_from([(4, 4), (2, 8), (6, 4)]),
    spread=st.sampled_from([0.0, 0.1, 3.0]),
)
def test_gates_are_pytorchs_for_any_parameters(seed, channels, groups, threshold, size, spread):
    module = wild.OriginalSRU(channels, groups, threshold).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.gn.gamma.copy_(1 + torch.randn(channels, 1, 1, generator=generator) * 0.5)
        module.gn.beta.copy_(torch.randn(channels, 1, 1, generator=generator) * spread)
    x = naive.noise(2, channels, *size, seed=seed)
    result, applied = naive.rewritten(naive.export(module, x, False))
    (fused,) = applied.fused
    probe = instrument.gate_probe(result, result.graph.node[0])
    session_out = _gates(probe, x)
    gate = Gate(fused.gate.variant, module.gn.gamma, module.gn.beta)
    assert gate.variant.threshold == threshold
    assert gate.count_flips(session_out != gate.mask(x), x).unexplained == 0


def _gates(probe, x):
    from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner

    with OnnxRuntimeRunner(probe) as runner:
        return torch.from_numpy(runner.run({instrument.PROBE_X: x.numpy()})[instrument.PROBE_OPEN])
