"""``rewrite_onnx`` and the command: whole files, strictness, the guard, robust input."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from typer.testing import CliRunner

from scconv_deploy import RewriteOptions, rewrite_onnx
from scconv_deploy.cli import app
from scconv_deploy.errors import IntegrityError, ModelError, ParityError, UsageError
from scconv_deploy.rewrite.apply import Applied
from scconv_deploy.verification.rewrite_guard import compare_graphs
from scconv_deploy.workflows import rewrite as rewriting
from tests import wild
from tests.conftest import tiny_net
from tests.rewrite import naive
from tests.tolerances import NETWORK


def saved(folder, proto, name="in.onnx"):
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture(scope="module")
def script_net():
    """(module, naive TorchScript export): a small net with two SRUs, opset 17."""
    net = naive.small_net("groupbn-hard")
    return net, naive.export(net, naive.noise(2, 3, 16, 16), False, 17)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("variant", naive.VARIANTS)
def test_every_sru_of_a_naive_export_is_fused(tmp_path, variant, dynamic):
    """TorchScript's."""
    fused(tmp_path, naive.small_net(variant), {"layer.0.0": variant, "layer.1.1": variant}, False, dynamic)


def test_every_sru_of_an_export_of_any_size_by_torch_export_is_fused(tmp_path):
    """One of each variant in one net, which takes seconds to export; static ones: tests/rewrite/rules/test_sru.py."""
    srus = [sru(16) for sru in naive.VARIANTS.values()]
    torch.manual_seed(0)
    net = wild.randomize(
        nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), srus[0], nn.AvgPool2d(2, 2), srus[1], srus[2], nn.Conv2d(16, 16, 1))
    )
    fused(tmp_path, net, dict(zip("134", naive.VARIANTS, strict=True)), True, True)


def fused(folder, net, sites, dynamo, dynamic):
    """A naive export is rewritten at these sites, with the variants that they name, and computes what the net does."""
    source = saved(folder, naive.export(net, naive.noise(2, 3, 16, 16), dynamo, 18, dynamic))
    result = rewrite_onnx(source, folder / "out.onnx", options=RewriteOptions(expect=len(sites)))
    found = {site: label.removesuffix(" (torch.sum)") for site, label in result.sites.items()}  # as the module adds
    assert found == sites
    assert result.outcome == "rewritten"
    assert result.guard
    assert [(g.rewritten.flips, g.rewritten.unexplained) for g in result.guard.gates] == [(0, 0)] * len(sites)
    x = naive.noise(4, 3, 24, 32, seed=1) if dynamic else naive.noise(2, 3, 16, 16, seed=1)
    y = naive.run(onnx.load(result.path), x)
    np.testing.assert_allclose(y, net(x).detach().numpy(), **NETWORK)


def test_parity_against_the_reference_names_sites_after_its_modules(tmp_path):
    names = {"opset_version": 17, "input_names": ["image"], "output_names": ["logits", "features"]}
    torch.onnx.export(tiny_net(), (naive.noise(2, 3, 16, 16),), str(tmp_path / "in.onnx"), dynamo=False, **names)
    command = ["rewrite", "in.onnx", "-o", "out.onnx", "--expect", "4", "--json"]
    reference = ["--reference", "tests/conftest.py:tiny_net", "--input", "2x3x16x16"]
    command[1], command[3] = str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")
    run = CliRunner().invoke(app, command + reference)
    assert run.exit_code == 0, run.stderr
    document = json.loads(run.stdout)
    assert document["parity"]["verdict"] == "passed"
    assert list(document["sites"]) == ["a.SRU", "b.SRU", "c", "a.SRU#2"]
    assert [s["static"]["status"] for s in document["parity"]["srus"]] == ["passed"] * 4
    assert "| a.SRU#2 | groupbn-hard | 4,096 | 0 | 0 |" in document["markdown"]
    assert "changed 0 gates on this input; the rewritten file 0." in document["markdown"]


def test_the_sentence_counts_what_the_file_changed(tmp_path):
    """Gates that sit on the threshold: the naive file rounds them, the rewritten one does not."""
    module = wild.OriginalSRU(64, 16).eval()
    with torch.no_grad():
        module.gn.gamma.fill_(0.01)
    x = naive.noise(1, 64, 32, 32) * 1e-2
    x[:, :, ::2] *= 1e-5
    source = saved(tmp_path, naive.export(module, x, False))
    np.savez(tmp_path / "data.npz", x=x.numpy())
    result = rewrite_onnx(source, tmp_path / "out.onnx", data=str(tmp_path / "data.npz"))
    (gate,) = result.guard.gates
    assert gate.file.flips > 0
    assert gate.rewritten.flips == 0
    assert result.guard.sentence == f"your file changed {gate.file.flips:,} gates on this input; the rewritten file 0"


def test_names_order_metadata_and_determinism(tmp_path, script_net):
    proto = onnx.ModelProto()
    proto.CopyFrom(script_net[1])
    helper.set_model_props(proto, {"stride": "32", "names": "{0: 'person'}", "task": "detect"})
    proto.doc_string = "by somebody"
    source = saved(tmp_path, proto)
    first = rewrite_onnx(source, tmp_path / "a.onnx")
    second = rewrite_onnx(source, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    out = onnx.load(first.path)
    props = {p.key: p.value for p in out.metadata_props}
    assert (props["stride"], props["names"], props["task"]) == ("32", "{0: 'person'}", "detect")
    assert json.loads(props["scconv_deploy.sites"]) == dict(second.sites)
    assert (out.doc_string, out.ir_version, out.opset_import[0].version) == ("by somebody", 10, 18)
    assert [v.name for v in (*out.graph.input, *out.graph.output)] == ["x", "y"]
    assert not any(p.key.startswith("onnxsim") for p in out.metadata_props)


def test_rewriting_twice_copies_the_bytes(tmp_path, script_net):
    first = rewrite_onnx(saved(tmp_path, script_net[1]), tmp_path / "a.onnx")
    again = rewrite_onnx(first.path, tmp_path / "b.onnx", options=RewriteOptions(expect=2))
    assert again.outcome == "unchanged"
    assert again.sha256 == first.sha256
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()


def test_a_file_without_gates_is_refused_and_copied_where_none_is_expected(tmp_path):
    source, out = saved(tmp_path, naive.parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")), tmp_path / "out.onnx"
    run = CliRunner().invoke(app, ["rewrite", str(source), "-o", str(out)])
    assert run.exit_code == 4
    assert run.stderr.strip().splitlines()[-1] == (
        f"scconv-deploy: {source} holds no gate to rewrite, expected at least one: no candidate was found. "
        "Use --expect 0 to accept this."
    )
    assert not out.exists()
    with pytest.raises(ModelError, match="holds no gate to rewrite"):  # another opset is no gate
        rewrite_onnx(source, out, options=RewriteOptions(opset=20))
    assert CliRunner().invoke(app, ["rewrite", str(source), "-o", str(out), "--expect", "0"]).exit_code == 0
    assert out.read_bytes() == source.read_bytes()


def test_a_file_that_holds_its_srus_is_nothing_to_do(tmp_path, script_net):
    first = rewrite_onnx(saved(tmp_path, script_net[1]), tmp_path / "a.onnx")
    run = CliRunner().invoke(app, ["rewrite", str(first.path), "-o", str(tmp_path / "b.onnx")])
    assert (run.exit_code, "nothing to do" in run.stdout) == (0, True)


def test_a_gate_that_is_no_sru_is_something_to_rewrite(tmp_path):
    text = "g (float[4] x) => (bool[4] y) <float t = {0.5}> { s = Sigmoid(x) y = GreaterOrEqual(s, t) }"
    result = rewrite_onnx(saved(tmp_path, naive.parse(text)), tmp_path / "out.onnx")
    assert (result.outcome, dict(result.sites)) == ("partial", {})  # the comparison is moved, an SRU was not read
    assert [node.op_type for node in onnx.load(result.path).graph.node] == ["GreaterOrEqual"]


def test_expect_fails_with_each_near_miss(tmp_path):
    net = wild.randomize(torch.nn.Sequential(wild.OriginalSRU(8, 4), wild.InvertedSRU(8, 4)))
    source = saved(tmp_path, naive.export(net, naive.noise(2, 8, 4, 6), False))
    partial = rewrite_onnx(source, tmp_path / "partial.onnx")
    assert partial.outcome == "partial"
    assert list(partial.sites) == ["0"]
    run = CliRunner().invoke(app, ["rewrite", str(source), "-o", str(tmp_path / "out.onnx"), "--expect", "2"])
    assert run.exit_code == 4
    assert (
        "1 of 2 expected SRUs were fused: 1 (sru): its Concat puts the halves together in another order" in run.stderr
    )
    assert not (tmp_path / "out.onnx").exists()


def test_mask_form_inline_and_adapted_files(tmp_path, script_net):
    proto = script_net[1]
    x = naive.noise(2, 3, 16, 16, seed=3)
    expected = naive.run(proto, x)
    first = rewrite_onnx(saved(tmp_path, proto), tmp_path / "a.onnx", options=RewriteOptions(adapted=True))
    assert [p.name for p in first.adapted] == ["a.plugin.onnx", "a.inlined.onnx"]
    plugin, inlined = (onnx.load(p) for p in first.adapted)
    assert not plugin.functions
    assert sum(n.domain == "scconv" for n in plugin.graph.node) == 2
    assert not inlined.functions
    assert {o.domain for o in inlined.opset_import} == {""}
    np.testing.assert_allclose(naive.run(inlined, x), expected, rtol=1e-5)
    where = rewrite_onnx(first.path, tmp_path / "w.onnx", options=RewriteOptions(mask_form="where"))
    assert where.outcome == "rewritten"
    body = [n.op_type for n in onnx.load(where.path).functions[0].node]
    assert "Where" in body
    assert "Where" not in [n.op_type for n in onnx.load(first.path).functions[0].node]
    back = rewrite_onnx(where.path, tmp_path / "m.onnx", options=RewriteOptions(mask_form="multiply"))
    assert "Where" not in [n.op_type for n in onnx.load(back.path).functions[0].node]
    np.testing.assert_array_equal(naive.run(onnx.load(back.path), x), naive.run(onnx.load(where.path), x))
    flat = rewrite_onnx(first.path, tmp_path / "i.onnx", options=RewriteOptions(inline=True))
    assert not onnx.load(flat.path).functions


@pytest.mark.parametrize(("opset", "wanted"), [(13, None), (17, 21), (18, 20)])
def test_opsets_are_converted_before_functions_are_added(tmp_path, opset, wanted):
    net = naive.small_net("groupnorm-soft")
    x = naive.noise(2, 3, 16, 16)
    source = saved(tmp_path, naive.export(net, x, False, opset))
    result = rewrite_onnx(source, tmp_path / "out.onnx", options=RewriteOptions(opset=wanted, expect=2))
    assert onnx.load(result.path).opset_import[0].version == (wanted or 18)
    np.testing.assert_allclose(naive.run(onnx.load(result.path), x), net(x).detach().numpy(), **NETWORK)


def test_a_wrong_fusion_is_caught_by_the_guard(tmp_path, script_net):
    """What the guard is for: move one cut, and cross the halves otherwise."""
    from scconv_deploy.records.stage import StageLog
    from scconv_deploy.workflows.rewrite import rewrite_graph

    original = script_net[1]
    with StageLog().stage("rewrite") as stage:
        proto, applied = rewrite_graph(original, RewriteOptions(), stage)
    feeds = {"noise": {"x": naive.noise(2, 3, 16, 16).numpy()}}
    assert compare_graphs(original, proto, applied, {}, feeds)
    moved = onnx.ModelProto()
    moved.CopyFrom(proto)
    cut = next(t for t in moved.graph.initializer if t.name.endswith(".cut"))
    cut.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(cut) + np.float32(0.2), cut.name))
    assert (
        "gates differ from PyTorch beyond rounding" in compare_graphs(original, moved, applied, {}, feeds).failures[0]
    )
    crossed = onnx.ModelProto()
    crossed.CopyFrom(proto)
    swap = next(n for n in crossed.functions[0].node if n.output[0] == "sru__other_half")
    swap.attribute[0].ints[:] = [0, 1]
    assert "with the same gates" in compare_graphs(original, crossed, applied, {}, feeds).failures[0]


@pytest.mark.parametrize(("variant", "finite"), [("groupbn-hard", True), ("groupbn-hard-normalized", False)])
def test_a_file_that_lost_its_eps_and_has_a_group_without_spread(tmp_path, variant, finite):
    """torch.export's optimiser drops ``+ 1e-10``: the file divides 0 by 0 there, and PyTorch and the result do not."""
    net = naive.small_net(variant)
    with torch.no_grad():
        net.stem.bias[:4] = -100.0  # behind the ReLU a whole group is zero
    x = naive.noise(2, 3, 16, 16)
    proto = naive.export(net, x, True)
    result = rewrite_onnx(saved(tmp_path, proto), tmp_path / "out.onnx", options=RewriteOptions(expect=2))
    assert result.guard is not None
    assert result.guard.gates[0].undefined > 0
    assert result.guard.gates[0].rewritten.flips == 0
    assert bool(result.guard.outputs) == finite  # behind NaN there is nothing to hold them against
    assert "it divides 0 by 0" in result.guard.sentence
    np.testing.assert_allclose(naive.run(onnx.load(result.path), x), net(x).detach().numpy(), **NETWORK)


def test_half_precision_subgraphs_and_foreign_domains_are_left_alone_with_a_reason(tmp_path):
    branch = "c = Greater(r, t) m = Cast<to = 1>(c)"
    text = (
        "g (float[4] x, bool b) => (float[4] y) <float t = {0.5}> { y = If (b) <"
        f"then_branch = a () => (float[4] p) {{ r = Sigmoid(x) {branch} p = Mul(m, x) }},"
        "else_branch = e () => (float[4] q) { q = Identity(x) }> }"
    )
    source = saved(tmp_path, naive.parse(text))
    with pytest.raises(ModelError, match=r"expected at least one: .*: it is inside a subgraph; rules are applied to"):
        rewrite_onnx(source, tmp_path / "out.onnx")
    result = rewrite_onnx(source, tmp_path / "out.onnx", options=RewriteOptions(expect=0))
    assert result.outcome == "unchanged"
    assert [miss.reason for miss in result.near_misses] == [
        "it is inside a subgraph; rules are applied to the main graph"
    ]
    custom = naive.parse("g (float[4] x) => (float[4] y) { y = mine.Op(x) }")
    custom.opset_import.append(helper.make_opsetid("mine", 1))
    source = saved(tmp_path, custom, "custom.onnx")
    assert rewrite_onnx(source, tmp_path / "custom_out.onnx", options=RewriteOptions(expect=0)).outcome == "unchanged"


@pytest.mark.parametrize("form", ["inlined", "without_functions"])
def test_adapted_files_are_checked_before_anything_is_written(tmp_path, monkeypatch, script_net, form):
    def broken(proto):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        copy.graph.node[0].input[0] = "nobody gives it"
        return copy

    monkeypatch.setattr(rewriting, form, broken)
    name = {"inlined": "out.inlined.onnx", "without_functions": "out.plugin.onnx"}[form]
    with pytest.raises(ModelError, match=f"in the graph of {name} is invalid|The graph of {name} is invalid"):
        rewrite_onnx(saved(tmp_path, script_net[1]), tmp_path / "out.onnx", options=RewriteOptions(adapted=True))
    if form == "inlined":
        with pytest.raises(ModelError, match="inlined graph is invalid"):
            rewrite_onnx(saved(tmp_path, script_net[1]), tmp_path / "out.onnx", options=RewriteOptions(inline=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx"]


def test_functions_of_others_are_looked_into(tmp_path, script_net):
    """An SRU inside somebody's function is found: it is inlined first."""
    module = wild.randomize(wild.OriginalSRU(8, 4))
    inner = naive.export(module, naive.noise(2, 8, 4, 6), True)
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in inner.graph.initializer]
    function = helper.make_function("mine", "SRU", ["x"], ["y"], [*constants, *inner.graph.node], inner.opset_import)
    graph = helper.make_graph(
        [helper.make_node("SRU", ["a"], ["b"], domain="mine")], "g",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [2, 8, 4, 6])],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [2, 8, 4, 6])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    source = saved(tmp_path, helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10))
    result = rewrite_onnx(source, tmp_path / "out.onnx", options=RewriteOptions(expect=1))
    assert list(result.sites.values()) == ["groupbn-hard"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (RewriteOptions(opset=24), UsageError, "Opset 24 is not supported"),
        (RewriteOptions(expect=3), ModelError, "2 of 3 expected SRUs were fused: no candidate was found"),
    ],
)
def test_options_that_cannot_be_met(tmp_path, script_net, options, error, message):
    with pytest.raises(error, match=message):
        rewrite_onnx(saved(tmp_path, script_net[1]), tmp_path / "out.onnx", options=options)
    assert not (tmp_path / "out.onnx").exists()


def test_files_that_are_not_what_they_claim(tmp_path, script_net):
    data = script_net[1].SerializeToString()
    (tmp_path / "cut.onnx").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.onnx").write_bytes(b"not a model at all")
    for name in ("cut.onnx", "text.onnx"):
        with pytest.raises(IntegrityError):
            rewrite_onnx(tmp_path / name, tmp_path / "out.onnx")
    evil = onnx.ModelProto()
    evil.CopyFrom(script_net[1])
    tensor = evil.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    with pytest.raises(IntegrityError, match="outside the model's folder"):
        rewrite_onnx(saved(tmp_path, evil), tmp_path / "out.onnx")
    with pytest.raises(UsageError, match="is the input itself"):
        rewrite_onnx(tmp_path / "in.onnx", tmp_path / "in.onnx", force=True)


def test_external_data_goes_into_the_file(tmp_path, script_net):
    proto = onnx.ModelProto()
    proto.CopyFrom(script_net[1])
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, size_threshold=0, location="weights.bin")
    result = rewrite_onnx(tmp_path / "in.onnx", tmp_path / "sub" / "out.onnx", options=RewriteOptions(expect=2))
    x = naive.noise(2, 3, 16, 16)
    np.testing.assert_allclose(naive.run(onnx.load(result.path), x), naive.run(script_net[1], x), rtol=1e-5)


def test_a_reference_with_other_weights_fails_parity(tmp_path):
    """The bytes are written, and the verdict says that they are not that model's."""
    names = {"opset_version": 17, "input_names": ["image"], "output_names": ["logits", "features"]}
    other = tiny_net()
    with torch.no_grad():
        other.a.SRU.gn.beta.add_(0.5)
    torch.onnx.export(other, (naive.noise(2, 3, 16, 16),), str(tmp_path / "in.onnx"), dynamo=False, **names)
    command = ["rewrite", str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.onnx"), "--quiet", "--adapted"]
    run = CliRunner().invoke(app, [*command, "--reference", "tests/conftest.py:tiny_net", "--input", "2x3x16x16"])
    assert run.exit_code == ParityError.exit_code
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["in.onnx", *(f"out.{form}onnx.rejected" for form in ("inlined.", "", "plugin."))]


def test_a_result_that_does_not_run_is_no_result():
    """Where the original does not run either, nothing can be compared, which is said; that is another case."""
    original = naive.parse("g (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }")
    text = "g (float[2, 4] x) => (float[2, 4] y) <int64[1] five = {5}> { z = Reshape(x, five) y = Relu(z) }"
    broken, feeds = naive.parse(text), {"noise": {"x": np.ones((2, 4), np.float32)}}
    with pytest.raises(ModelError, match="The rewritten file does not run, and the original does") as refused:
        compare_graphs(original, broken, Applied(), {}, feeds)
    assert refused.value.exit_code == 4
    assert compare_graphs(broken, broken, Applied(), {}, feeds).not_run
