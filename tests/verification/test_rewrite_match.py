"""What of a file belongs to what of its model: names by position, and what folding took from it."""

import json

import numpy as np
import onnx
import onnxsim
import pytest
import torch
from onnx import helper
from typer.testing import CliRunner

from scconv_deploy import RewriteOptions, rewrite_onnx
from scconv_deploy.cli import app
from scconv_deploy.errors import ParityError, UsageError
from scconv_deploy.model.inputs import InputSpec
from scconv_deploy.model.spec import ModelSpec
from tests import wild
from tests.gate.plain import Choices, PlainSRU
from tests.rewrite import naive
from tests.tolerances import NETWORK

SHAPE = (InputSpec.parse("2x3x16x16"),)


def new_net():
    """A factory: SmallNet before training, beta 0."""
    net = naive.small_net("groupbn-hard")
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, wild.OriginalGroupBatchnorm2d):
                module.beta.zero_()
    return net


def saved(folder, proto):
    path = folder / "in.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def exported(model):
    return naive.export(model, naive.noise(2, 3, 16, 16), False, 17)


def _named(model, inputs, outputs):
    proto = exported(model)
    renamed = onnx.ModelProto()
    renamed.CopyFrom(proto)
    wanted = dict(zip([v.name for v in (*proto.graph.input, *proto.graph.output)], inputs + outputs, strict=True))
    for node in renamed.graph.node:
        node.input[:] = [wanted.get(name, name) for name in node.input]
        node.output[:] = [wanted.get(name, name) for name in node.output]
    for value in (*renamed.graph.input, *renamed.graph.output):
        value.name = wanted[value.name]
    return renamed


def test_a_file_with_names_of_its_own_is_matched_by_position(tmp_path):
    """The reference calls them x and output; exporters let users choose."""
    source = saved(tmp_path, _named(new_net(), ["images"], ["output0"]))
    result = rewrite_onnx(source, tmp_path / "out.onnx", reference=spec())
    assert result.parity
    match = next(stage for stage in result.stages if stage.name == "match")
    assert match.applied == ("images is the reference's x", "output0 is the reference's output")
    written = onnx.load(result.path)
    assert [v.name for v in (*written.graph.input, *written.graph.output)] == ["images", "output0"]
    model = ["--reference", "tests/verification/test_rewrite_match.py:new_net", "--input", "2x3x16x16", "--quiet"]
    assert command("verify", result.path, *model).exit_code == 0  # by the same names
    assert command("verify", result.path, "--reference", source, "--quiet").exit_code == 0  # which holds no node


def test_names_that_another_tensor_has_make_room(tmp_path):
    """A tensor inside the file is called x, as the reference's image is."""
    proto = _named(new_net(), ["images"], ["output0"])
    first = proto.graph.node[0]
    inner = first.output[0]
    for node in proto.graph.node:
        node.input[:] = ["x" if name == inner else name for name in node.input]
        node.output[:] = ["x" if name == inner else name for name in node.output]
    del proto.graph.value_info[:]
    result = rewrite_onnx(saved(tmp_path, proto), tmp_path / "out.onnx", reference=spec())
    assert result.parity
    assert [srus.teacher_forced.unexplained for srus in result.parity.srus] == [0, 0]


def test_another_number_of_outputs_is_an_error(tmp_path):
    proto = exported(new_net())
    proto.graph.node.append(helper.make_node("Identity", ["y"], ["z"]))
    proto.graph.output.append(helper.make_tensor_value_info("z", 1, [2, 16]))
    with pytest.raises(UsageError, match="The file's outputs are y, z; the reference's output"):
        rewrite_onnx(saved(tmp_path, proto), tmp_path / "out.onnx", reference=spec())


def spec():
    return ModelSpec("tests/verification/test_rewrite_match.py:new_net", inputs=SHAPE)


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_reference_restores_the_gamma_that_folding_took(tmp_path, with_reference):
    net = new_net()
    folded, same = onnxsim.simplify(exported(net))
    assert same
    reference = spec() if with_reference else None
    result = rewrite_onnx(saved(tmp_path, folded), tmp_path / "out.onnx", reference=reference)
    assert [(g.rewritten.flips, g.file_beyond) for g in result.guard.gates] == [(0, 0), (0, 0)]
    written = onnx.load(result.path)
    y = naive.run(written, naive.noise(2, 3, 16, 16, seed=2))
    np.testing.assert_allclose(y, net(naive.noise(2, 3, 16, 16, seed=2)).detach().numpy(), **NETWORK)
    if not with_reference:
        assert set(result.sites.values()) == {"groupbn-hard-unweighted"}
        assert "--reference MODEL restores gamma" in result.stages[0].applied[-1]
        model = ["--reference", "tests/verification/test_rewrite_match.py:new_net", "--input", "2x3x16x16", "--json"]
        verified = command("verify", result.path, *model)
        assert verified.exit_code == 0, verified.stderr  # the verdict of the other road, and what it could not compare
        statics = [sru["static"] for sru in json.loads(verified.stdout)["srus"]]
        assert [check["status"] for check in statics] == ["not run"] * 2
        assert "rewrite --reference restores them" in statics[0]["reason"]
        return
    assert result.parity
    assert result.sites == {"layer.0.0": "groupbn-hard", "layer.1.1": "groupbn-hard"}
    assert [s.static.status for s in result.parity.srus] == ["passed", "passed"]
    match = next(stage for stage in result.stages if stage.name == "match")
    assert "layer.1.1: parameters from the reference, for the file has lost gamma" in match.applied


def test_another_models_gamma_is_not_taken(tmp_path):
    """A file whose folded constants are not the reference's keeps its own, and parity fails."""
    net = new_net()
    with torch.no_grad():
        net.layer[0][0].gn.gamma.mul_(torch.linspace(0.5, 2, 16).reshape(-1, 1, 1))
    folded = onnxsim.simplify(exported(net))[0]
    result = rewrite_onnx(saved(tmp_path, folded), tmp_path / "out.onnx", reference=spec())
    assert not result.parity
    assert sorted(result.sites.values()) == ["groupbn-hard", "groupbn-hard-unweighted"]


# --- what one side knows and the other does not ---------------------------------------------------------------------


class Projected(wild.OriginalSRU):
    """A 1x1 convolution with BatchNorm inside the SRU, as YOLO forks have it: recognition knows no such module."""

    def __init__(self):
        super().__init__(16, 4)
        self.proj = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1, bias=False), torch.nn.BatchNorm2d(16))

    def forward(self, x):
        return super().forward(self.proj(x))


def projected():
    """A factory: beside SRUs that recognition knows, one of them called twice."""
    torch.manual_seed(0)
    twice = wild.OriginalSRU(16, 4)
    return wild.randomize(torch.nn.Sequential(Projected(), twice, torch.nn.Conv2d(16, 16, 3, padding=1), twice)).eval()


def alone():
    """A factory."""
    torch.manual_seed(0)
    return wild.randomize(Projected()).eval()


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("factory", "dynamo"), [(projected, True), (alone, False)], ids=["torch.export", "TorchScript"]
)
def test_one_verdict_by_every_road(tmp_path, factory, dynamo):
    """With a reference and without, in one go and one after the other, and from PyTorch."""
    source = saved(tmp_path, naive.export(factory(), naive.noise(2, 3, 16, 16), dynamo, 18))
    model = [f"tests/verification/test_rewrite_match.py:{factory.__name__}", "--input", "2x3x16x16"]
    roads = {
        "rewrite": command("rewrite", source, "-o", tmp_path / "a.onnx", "--quiet"),
        "with a reference": command(
            "rewrite", source, "-o", tmp_path / "b.onnx", "--json", "--reference", *model, "--expect", 1
        ),
        "verified afterwards": command("verify", tmp_path / "a.onnx", "--reference", *model, "--json"),
        "verified again": command("verify", tmp_path / "b.onnx", "--reference", *model, "--quiet"),
        "deploy": command("deploy", *model, "-o", tmp_path / "bundle", "--quiet"),
    }
    assert {road: run.exit_code for road, run in roads.items()} == dict.fromkeys(roads, 0)
    document = json.loads(roads["with a reference"].stdout)
    assert document["outcome"] == "rewritten"
    verified = json.loads(roads["verified afterwards"].stdout)
    for report in (document["parity"], verified):
        checks = next(link for link in report["links"] if link["name"] == "onnxruntime")["checks"]
        assert (
            "no SRU of the reference stands beside it" in next(c for c in checks if c["name"] == "rewritten")["reason"]
        )
        statuses = [sru["static"]["status"] for sru in report["srus"]]
        assert statuses == (["passed"] * 2 if factory is projected else [])


def unreadable(proto, sigmoid):
    """The file with a Min after one of its sigmoids, which changes nothing and which the reader does not know."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    index, node = [(i, n) for i, n in enumerate(changed.graph.node) if n.op_type == "Sigmoid"][sigmoid]
    (y,) = node.output
    node.output[0] = f"{y}_inner"
    changed.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(2), f"{y}_two"))
    changed.graph.node.insert(index + 1, helper.make_node("Min", [f"{y}_inner", f"{y}_two"], [y]))
    return changed


@pytest.mark.parametrize("sigmoid", [0, 1])
def test_an_sru_that_the_reader_does_not_know_makes_a_partial_rewrite(tmp_path, sigmoid):
    source = saved(tmp_path, unreadable(exported(new_net()), sigmoid))
    model = ["--reference", "tests/verification/test_rewrite_match.py:new_net", "--input", "2x3x16x16"]
    run = command("rewrite", source, "-o", tmp_path / "out.onnx", "--json", *model)
    assert run.exit_code == 0, run.stderr
    document = json.loads(run.stdout)
    sites = ["layer.0.0", "layer.1.1"]
    left = sites.pop(sigmoid)
    assert document["outcome"] == "partial"
    assert list(document["sites"]) == sites
    (miss,) = document["near_misses"]
    assert miss["node"] == left
    assert "PyTorch's module is groupbn-hard, but no such SRU was read from the graph" in miss["reason"]
    statuses = {sru["site"]: sru["static"]["status"] for sru in document["parity"]["srus"]}
    assert statuses == {left: "not run", sites[0]: "passed"}
    assert command("verify", tmp_path / "out.onnx", "--quiet", *model).exit_code == 0


def test_nothing_that_can_be_read_is_no_fault_either(tmp_path):
    source = saved(tmp_path, unreadable(unreadable(exported(new_net()), 0), 1))
    result = rewrite_onnx(source, tmp_path / "out.onnx", options=RewriteOptions(expect=0), reference=spec())
    assert result.parity
    assert result.outcome == "unchanged"
    assert [miss.node for miss in result.near_misses] == ["layer.0.0", "layer.1.1"]
    assert result.path.read_bytes() == source.read_bytes()


def test_a_rewritten_file_keeps_its_bytes_with_a_reference_too(tmp_path):
    source = saved(tmp_path, exported(new_net()))
    first = rewrite_onnx(source, tmp_path / "a.onnx")
    again = rewrite_onnx(first.path, tmp_path / "b.onnx", reference=spec())
    assert (again.outcome, again.near_misses, again.sha256) == ("unchanged", (), first.sha256)
    assert again.parity


def test_names_are_no_evidence(tmp_path):
    """Simplified files have none: each SRU is found by its parameters, calls of one module by what they are given."""
    proto = onnxsim.simplify(exported(projected()), skipped_optimizers=["eliminate_nop_with_unit"])[0]
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    source = saved(tmp_path, proto)
    reference = ModelSpec("tests/verification/test_rewrite_match.py:projected", inputs=SHAPE)
    result = rewrite_onnx(source, tmp_path / "out.onnx", reference=reference)
    assert result.parity
    assert len(result.sites) == 3
    assert [(s.site, s.static.status, s.free_running.unexplained) for s in result.parity.srus] == [
        ("1", "passed", 0), ("1#2", "passed", 0),
    ]  # fmt: skip


def plain_net():
    """A factory: two 3x3 convolutions, into which ScConv can be embedded."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.Conv2d(16, 16, 3, 1, 1)).eval()


def test_the_command_takes_embed(tmp_path):
    model = ["tests/verification/test_rewrite_match.py:plain_net", "--input", "2x3x16x16", "--embed", '{"rule": "1"}']
    export = ["export", *model, "-o", str(tmp_path / "in.onnx"), "--quiet"]
    assert CliRunner().invoke(app, export).exit_code == 0
    command = ["rewrite", str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.onnx"), "--json", "--reference"]
    run = CliRunner().invoke(app, [*command, *model, "--expect", "1"])
    assert run.exit_code == 0, run.stderr
    document = json.loads(run.stdout)
    assert document["parity"]["verdict"] == "passed"
    embedded = next(stage for stage in document["stages"] if stage["name"] == "embed")
    assert embedded["applied"][0].startswith("rule 1: 1 convolutions replaced")
    assert CliRunner().invoke(app, [*command, *model[:3], "--force"]).exit_code == ParityError.exit_code


# --- whose sum of gamma -----------------------------------------------------------------------------------------------


class Reordered(PlainSRU):
    """Its gamma added up backwards: as a runtime may do it that folds ``torch.sum``."""

    def __init__(self, choices, seed):
        super().__init__(choices, seed)
        self.total = float(np.add.accumulate(self.gamma.detach().numpy().reshape(-1)[::-1])[-1])

    def forward(self, x):
        r = torch.sigmoid(self.normalize(x) * (self.gamma / self.total))
        return wild.cross((r >= self.t) * x, (r < self.t) * x)


def _of_torch(kind=PlainSRU, **choices):
    """The first draw whose gamma is another number when it is added up backwards."""
    for seed in range(10_000):
        module = PlainSRU(Choices(channels=128, groups=4, threshold=0.47, weight="torch", **choices), seed)
        gamma = module.gamma.detach().reshape(-1)
        other = float(np.add.accumulate(gamma.numpy()[::-1])[-1])
        near = min(abs(float(total) / other - 1) for total in (gamma.sum(), sum(gamma)))
        if near > 2e-7 and gamma.abs().sum() < 50 * abs(other):  # beyond, a weight is lost to rounding
            return torch.nn.Sequential(kind(module.choices, seed)).eval()
    raise AssertionError("no draw has two sums")


def as_published(kind=PlainSRU):
    """A factory."""
    return _of_torch(kind, beta=0.0)


def small_eps(kind=PlainSRU):
    """A factory: an eps that an exporter drops, so that another one is assumed."""
    return _of_torch(kind, beta=0.0, eps=1e-12)


def written_out(kind=PlainSRU):
    """A factory: GroupNorm, written out."""
    return _of_torch(kind, ddof=0, eps_in_variance=True, eps=1e-5)


@pytest.mark.parametrize("factory", [as_published, small_eps, written_out])
def test_a_sum_in_a_runtimes_order_is_the_modules(tmp_path, factory):
    """The file's weight is its own rounding: no fault of the file, and the reference's own is put in its place."""
    proto = naive.export(factory(Reordered), naive.noise(2, 128, 6, 6), True, 18)
    source = saved(tmp_path, onnxsim.simplify(proto, skipped_optimizers=["eliminate_nop_with_unit"])[0])
    model = [f"tests/verification/test_rewrite_match.py:{factory.__name__}", "--input", "2x128x6x6", "--json"]
    assert command("rewrite", source, "-o", tmp_path / "a.onnx", "--quiet").exit_code == 0
    (node,) = [n for n in onnx.load(tmp_path / "a.onnx").graph.node if n.domain == "scconv"]
    assert "scconv.weight" in {entry.key for entry in node.metadata_props}
    verified = command("verify", tmp_path / "a.onnx", "--reference", *model)
    if factory is not small_eps:  # 1e-10 is assumed without the reference
        assert verified.exit_code == 0, verified.stderr
        (sru,) = json.loads(verified.stdout)["srus"]
        assert sru["static"]["status"] == "not run"
        assert "rewrite --reference restores them" in sru["static"]["reason"]
    restored = command("rewrite", source, "-o", tmp_path / "b.onnx", "--reference", *model)
    assert restored.exit_code == 0, restored.stderr
    (sru,) = json.loads(restored.stdout)["parity"]["srus"]
    assert sru["static"]["status"] == "passed", sru["static"]["reason"]


def test_a_weight_that_no_order_of_the_sum_gives_is_a_fault(tmp_path):
    result = rewrite_onnx(
        saved(tmp_path, naive.export(as_published(Reordered), naive.noise(2, 128, 6, 6), True, 18)), tmp_path / "a.onnx"
    )
    written = onnx.load(result.path)
    (node,) = [n for n in written.graph.node if n.domain == "scconv"]
    cut = next(t for t in written.graph.initializer if t.name == node.input[1])
    cut.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(cut) * np.float32(1.01), cut.name))
    onnx.save(written, tmp_path / "b.onnx")
    model = ["tests/verification/test_rewrite_match.py:as_published", "--input", "2x128x6x6"]
    run = command("verify", tmp_path / "b.onnx", "--reference", *model, "--json")
    assert run.exit_code == ParityError.exit_code
    assert "cut differs" in json.loads(run.stdout)["srus"][0]["static"]["reason"]
