"""What of a file belongs to what of its model: names by position, and what folding took from it."""

import json

import numpy as np
import onnx
import onnxsim
import pytest
import torch
from onnx import helper
from typer.testing import CliRunner

from scconv_deploy import rewrite_onnx
from scconv_deploy.cli import app
from scconv_deploy.errors import ParityError, UsageError
from scconv_deploy.spec import InputSpec, ModelSpec
from tests import wild
from tests.rewrite import naive

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
    return ModelSpec("tests/test_rewriting_reference.py:new_net", inputs=SHAPE)


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
    np.testing.assert_allclose(y, net(naive.noise(2, 3, 16, 16, seed=2)).detach().numpy(), rtol=1e-4, atol=1e-5)
    if not with_reference:
        assert set(result.sites.values()) == {"groupbn-hard-unweighted"}
        assert "--reference MODEL restores gamma" in result.stages[0].applied[-1]
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


def plain_net():
    """A factory: two 3x3 convolutions, into which ScConv can be embedded."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.Conv2d(16, 16, 3, 1, 1)).eval()


def test_the_command_takes_embed(tmp_path):
    model = ["tests/test_rewriting_reference.py:plain_net", "--input", "2x3x16x16", "--embed", '{"rule": "1"}']
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
