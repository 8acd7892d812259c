"""Files as people's tools leave them, and files that are made to break a reader: a right result or a clear error."""

import io
import json

import numpy as np
import onnx
import onnxruntime
import onnxsim
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from scconv_deploy import RewriteOptions, rewrite_onnx
from scconv_deploy.errors import ModelError
from scconv_deploy.model.inputs import InputSpec
from scconv_deploy.model.spec import ModelSpec
from tests import wild
from tests.rewrite import naive
from tests.tolerances import NETWORK, ONE_SRU, SMALL_NETWORK

METADATA = {
    "description": "a detector", "author": "somebody", "stride": "8", "task": "detect", "batch": "1",
    "imgsz": "[32, 32]", "names": "{0: 'person', 1: 'bicycle'}", "args": "{'simplify': True}",
}  # fmt: skip


class Conv(nn.Sequential):
    def __init__(self, cin, cout, kernel=1, stride=1):
        super().__init__(nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout), nn.SiLU())


class C2fScConv(nn.Module):
    """A CSP block whose bottleneck is a ScConv, as people put it into YOLO."""

    def __init__(self, channels):
        super().__init__()
        self.cv1, self.cv2 = Conv(channels, channels), Conv(channels * 3 // 2, channels)
        self.m = wild.OriginalScConv(channels // 2, 4)

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.append(y[-1] + self.m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class Yolo(nn.Module):
    """Backbone, neck with an upsampling, and a head that decodes boxes."""

    def __init__(self):
        super().__init__()
        self.stem, self.c2f, self.down = Conv(3, 16, 3, 2), C2fScConv(16), Conv(16, 32, 3, 2)
        self.c2f_deep, self.neck = C2fScConv(32), wild.SoftSRU(48, 4)
        self.head = nn.Conv2d(48, 6, 1)

    def forward(self, images):
        shallow = self.c2f(self.stem(images))
        deep = self.c2f_deep(self.down(shallow))
        merged = self.neck(torch.cat([nn.functional.interpolate(deep, scale_factor=2.0), shallow], 1))
        boxes, scores = self.head(merged).flatten(2).split((4, 2), 1)
        return torch.cat([boxes.sigmoid() * 32, scores.sigmoid()], 1)


def yolo(trained=True):
    """A seeded detector in eval mode; also a factory for a reference."""
    torch.manual_seed(0)
    model = Yolo().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gn." in name and not name.endswith(("beta", "bias")):
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape))
            elif ".gn." in name and trained:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def as_ultralytics_writes_it(model, slim):
    """TorchScript, constants folded, simplified, and then its metadata."""
    buffer = io.BytesIO()
    torch.onnx.export(
        model, (naive.noise(1, 3, 32, 32),), buffer, dynamo=False, opset_version=17, do_constant_folding=True,
        input_names=["images"], output_names=["output0"], dynamic_axes=None,
    )  # fmt: skip
    proto = slim(onnx.load_model_from_string(buffer.getvalue()))
    for key, value in METADATA.items():
        proto.metadata_props.add(key=key, value=value)
    return proto


def saved(folder, proto):
    path = folder / "in.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def onnxslim(proto):
    return pytest.importorskip("onnxslim", reason="onnxslim is not installed").slim(proto)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "beta 0"])
@pytest.mark.parametrize("slim", [onnxslim, lambda proto: onnxsim.simplify(proto)[0]], ids=["onnxslim", "onnxsim"])
def test_a_detector_as_ultralytics_writes_it(tmp_path, slim, trained):
    proto = as_ultralytics_writes_it(yolo(trained), slim)
    reference = ModelSpec(
        "tests/workflows/test_rewrite_files.py:yolo",
        {"trained": trained},
        inputs=(InputSpec.parse("images:1x3x32x32"),),
    )
    options = RewriteOptions(expect=3)
    result = rewrite_onnx(saved(tmp_path, proto), tmp_path / "out.onnx", options=options, reference=reference)
    assert result.outcome == "rewritten"
    assert result.parity
    assert [gate.rewritten.unexplained for gate in result.guard.gates] == [0, 0, 0]
    assert result.sites == {"c2f.m.SRU": "groupbn-hard", "c2f_deep.m.SRU": "groupbn-hard", "neck": "groupnorm-soft"}
    written = onnx.load(result.path)
    props = {entry.key: entry.value for entry in written.metadata_props}
    assert {key: props[key] for key in METADATA} == METADATA
    assert [v.name for v in (*written.graph.input, *written.graph.output)] == ["images", "output0"]
    assert json.loads(props["scconv_deploy.sites"]) == dict(result.sites)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_result_survives_onnxslim(tmp_path):
    """The functions are kept, and what they compute; rewriting it again finds nothing to do."""
    proto = as_ultralytics_writes_it(yolo(), lambda proto: proto)
    result = rewrite_onnx(saved(tmp_path, proto), tmp_path / "out.onnx", options=RewriteOptions(expect=3))
    slimmed = onnxslim(onnx.load(result.path))
    assert sum(node.domain == "scconv" for node in slimmed.graph.node) == 3
    x = {"images": naive.noise(1, 3, 32, 32, seed=1).numpy()}
    expected = evaluated(onnx.load(result.path), x)
    np.testing.assert_allclose(evaluated(slimmed, x), expected, **SMALL_NETWORK)
    (tmp_path / "slim.onnx").write_bytes(slimmed.SerializeToString())
    again = rewrite_onnx(tmp_path / "slim.onnx", tmp_path / "again.onnx", options=RewriteOptions(expect=3))
    assert again.outcome == "unchanged"


def evaluated(proto, feeds):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


# --- subgraphs ---------------------------------------------------------------------------------------------------

SHAPE = [2, 8, 4, 6]


def info(name, kind=TensorProto.FLOAT, shape=SHAPE):
    return helper.make_tensor_value_info(name, kind, shape)


def sru_body(name, inputs, outputs, extra=()):
    """A graph of one naive SRU from v to y."""
    module = wild.randomize(wild.OriginalSRU(8, 4))
    proto = onnxsim.simplify(naive.export(module, naive.noise(*SHAPE), False, 17))[0]
    nodes = [helper.make_node("Identity", ["v"], ["x"]), *proto.graph.node, *extra]
    return helper.make_graph(nodes, name, inputs, outputs, proto.graph.initializer)


def with_if():
    other = helper.make_graph([helper.make_node("Identity", ["v"], ["e"])], "other", [], [info("e")])
    node = helper.make_node("If", ["b"], ["out"], then_branch=sru_body("then", [], [info("y")]), else_branch=other)
    return [node], [info("v"), info("b", TensorProto.BOOL, [])], {"b": np.array(True)}


def with_loop():
    scalars = [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, [])]
    keep = [helper.make_node("Identity", ["c"], ["d"])]
    body = sru_body("body", [*scalars, info("v")], [info("d", TensorProto.BOOL, []), info("y")], keep)
    node = helper.make_node("Loop", ["n", "b", "start"], ["out"], body=body)
    inputs = [info("start"), info("n", TensorProto.INT64, []), info("b", TensorProto.BOOL, [])]
    return [node], inputs, {"n": np.array(3), "b": np.array(True)}


def with_scan():
    body = sru_body("body", [info("v"), info("s", shape=[1])], [info("y"), info("s2", shape=[1])],
                    [helper.make_node("Identity", ["s"], ["s2"])])  # fmt: skip
    node = helper.make_node("Scan", ["start", "steps"], ["out", "unused"], body=body, num_scan_inputs=1)
    return [node], [info("start"), info("steps", shape=[2, 1])], {"steps": np.zeros((2, 1), np.float32)}


@pytest.mark.parametrize("build", [with_if, with_loop, with_scan])
def test_an_sru_inside_a_subgraph_is_left_alone_with_the_reason(tmp_path, build):
    """And one beside it in the main graph is fused: the meaning stays in both."""
    nodes, inputs, feeds = build()
    graph = helper.make_graph(nodes, "g", inputs, [info("out")])
    opsets = [helper.make_opsetid("", 17)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    outside = sru_body("outside", [], [])
    for node in outside.node:
        node.input[:] = ["out" if name == "v" else f"o_{name}" for name in node.input]
        node.output[:] = ["z" if name == "y" else f"o_{name}" for name in node.output]
    proto.graph.node.extend(outside.node)
    for tensor in outside.initializer:
        tensor.name = f"o_{tensor.name}"
        proto.graph.initializer.append(tensor)
    proto.graph.output.append(info("z"))
    onnx.checker.check_model(proto)
    result = rewrite_onnx(saved(tmp_path, proto), tmp_path / "out.onnx", options=RewriteOptions(expect=1))
    assert result.outcome == "partial"
    assert [m.reason for m in result.near_misses] == ["it is inside a subgraph; rules are applied to the main graph"]
    first = inputs[0].name
    feeds = {first: naive.noise(*SHAPE, seed=1).numpy(), **feeds}
    sessions = [onnxruntime.InferenceSession(p.SerializeToString()) for p in (proto, onnx.load(result.path))]
    for before, after in zip(*(session.run(["out", "z"], feeds) for session in sessions), strict=True):
        np.testing.assert_array_equal(after, before)


# --- operators and sizes that cannot be run or held ---------------------------------------------------------------


def test_an_operator_of_an_unknown_domain_is_carried_along(tmp_path):
    """Nothing can run it, so both files are compared up to it, and that is said."""
    proto = naive.export(naive.small_net("groupbn-hard"), naive.noise(2, 3, 16, 16), False, 17)
    attributes = {"domain": "mine", "weights": [1.0, 2.0]}
    proto.graph.node.append(helper.make_node("Op", ["y"], ["z"], name="theirs", **attributes))
    proto.graph.output.append(info("z", shape=[2, 16]))
    proto.opset_import.append(helper.make_opsetid("mine", 3))
    result = rewrite_onnx(saved(tmp_path, proto), tmp_path / "out.onnx", options=RewriteOptions(expect=2))
    assert result.guard
    assert not result.guard.not_run
    assert [gate.rewritten.flips for gate in result.guard.gates] == [0, 0]
    assert "up to what" in dict(result.guard.unread)["mine::Op"]
    assert any("mine::Op" in name for s in result.stages for name, reason in s.skipped)
    written = onnx.load(result.path)
    node = next(n for n in written.graph.node if n.domain == "mine")
    assert (node.name, list(node.input), list(node.attribute[0].floats)) == ("theirs", ["y"], [1.0, 2.0])
    assert {o.domain: o.version for o in written.opset_import} == {"": 18, "mine": 3, "scconv": 1}


@pytest.mark.parametrize("opset", [9, 11])
def test_old_opsets_are_converted(tmp_path, opset):
    net, x = naive.small_net("groupbn-hard"), naive.noise(2, 3, 16, 16)
    source = saved(tmp_path, naive.export(net, x, False, opset))
    result = rewrite_onnx(source, tmp_path / "out.onnx", options=RewriteOptions(expect=2))
    np.testing.assert_allclose(naive.run(onnx.load(result.path), x), net(x).detach().numpy(), **NETWORK)


@pytest.mark.parametrize("opset", [24, 27])
def test_newer_opsets_than_there_are_functions_for(tmp_path, opset):
    proto = naive.parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    proto.opset_import[0].version = opset
    with pytest.raises(ModelError, match=f"The file has opset {opset}; functions exist for 18 to 23"):
        rewrite_onnx(saved(tmp_path, proto), tmp_path / "out.onnx")


def test_more_than_two_gibibytes_are_refused_before_they_are_read(tmp_path):
    """The weight is a hole in its file: it takes no room on the disk, and would take 3 GiB of memory."""
    rows = 3 * 2**18
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(rows * 4096)
    proto = naive.parse("g (float[2] x) => (float[1, 1024] y) { i = Constant<value_ints = [5]>() y = Gather(big, i) }")
    weight = TensorProto(name="big", data_type=1, dims=[rows, 1024], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="big.bin")
    proto.graph.initializer.append(weight)
    with pytest.raises(ModelError, match=r"has 3\.0 GiB with its external data; .* take 2 GiB"):
        rewrite_onnx(saved(tmp_path, proto), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_unknown_shapes_are_a_reason(tmp_path):
    """Without the number of channels nothing says how long the groups are; the thresholds become exact all the same."""
    proto = onnxsim.simplify(naive.export(wild.randomize(wild.OriginalSRU(8, 4)), naive.noise(*SHAPE), False))[0]
    del proto.graph.value_info[:]
    for dim, name in zip(proto.graph.input[0].type.tensor_type.shape.dim, "nchw", strict=True):
        dim.dim_param = name
    x = naive.noise(*SHAPE, seed=4)
    np.savez(tmp_path / "data.npz", x=x.numpy())
    result = rewrite_onnx(saved(tmp_path, proto), tmp_path / "out.onnx", data=str(tmp_path / "data.npz"))
    assert result.outcome == "partial"
    assert [m.reason for m in result.near_misses] == ["the number of channels of its input x is not known"]
    assert result.guard
    assert [changed for _, _, changed in result.guard.thresholds] == [0, 0]
    np.testing.assert_allclose(naive.run(onnx.load(result.path), x), naive.run(proto, x), **ONE_SRU)


@pytest.mark.parametrize(("operator", "domain"), [("EfficientNMS_TRT", ""), ("Head", "my.ops")])
@pytest.mark.parametrize("opset", [17, 18])
def test_a_foreign_operator_is_worked_around(tmp_path, operator, domain, opset):
    """TensorRT users write plugins into the standard domain; nodes in any order, as some tools leave them."""
    net = naive.small_net("groupbn-hard")
    proto = onnx.ModelProto()
    proto.CopyFrom(naive.export(net, naive.noise(2, 3, 16, 16), False, opset))
    y = proto.graph.output[0].name
    node = helper.make_node(operator, [y, y], ["boxes"], domain=domain, max_output_boxes=10)
    nodes = [node, *reversed(proto.graph.node)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.output.append(helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 10, 4]))
    result = rewrite_onnx(saved(tmp_path, proto), tmp_path / "out.onnx", options=RewriteOptions(expect=2))
    guard = result.guard
    assert guard.not_run == ""
    assert [(gate.rewritten.flips, gate.file_beyond) for gate in guard.gates] == [(0, 0), (0, 0)]
    assert [name for name, _, _ in guard.outputs] == [y]
    name = f"{domain}::{operator}" if domain else operator
    assert guard.unread == (
        (name, "ONNX Runtime has no such operator; the files were compared up to what it is given"),
    )
    written = onnx.load(result.path)
    kept = next(n for n in written.graph.node if n.op_type == operator)
    assert (kept.domain, list(kept.input), list(kept.output)) == (domain, [y, y], ["boxes"])
    assert [entry.domain for entry in written.opset_import] == ["", *filter(None, [domain]), "scconv"]
