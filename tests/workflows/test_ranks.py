"""Networks of volumes ``[N, C, D, H, W]`` and signals ``[N, C, L]``, from PyTorch to a verdict."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from scconv_deploy import RewriteOptions, rewrite_onnx
from scconv_deploy.errors import ModelError
from scconv_deploy.gate.probes import near_threshold
from scconv_deploy.gate.recognize import recognize
from scconv_deploy.graph import instrument, nodes
from scconv_deploy.graph.contract import FunctionKey
from scconv_deploy.graph.file import serialize
from scconv_deploy.graph.functions import fingerprint, function_proto
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records.stage import StageLog
from scconv_deploy.trt_plugins.library import FusedSRU, fuse
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from scconv_deploy.verification.samples import Sample, noise_samples
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests import wild, wild_ranks
from tests.conftest import in_half
from tests.rewrite import naive
from tests.tolerances import NETWORK, ONE_SRU, SAME_ARITHMETIC
from tests.verification.judging import check_of

SIZES = {1: (40,), 3: (4, 6, 8)}
_LAYERS = {1: (nn.Conv1d, nn.AvgPool1d), 3: (nn.Conv3d, nn.AvgPool3d)}


class Net(nn.Module):
    """A stem, an SRU at full and one at half size, and a head; what a 3-D or 1-D ScConv network has at least."""

    def __init__(self, dims, block, channels=16):
        super().__init__()
        conv, pool = _LAYERS[dims]
        self.stem = conv(1, channels, 3, padding=1)
        self.a, self.b = block(channels), block(channels)
        self.pool, self.head = pool(2, 2), conv(channels, 4, 1)

    def forward(self, x):
        return self.head(self.b(self.pool(self.a(torch.tanh(self.stem(x))))))


def net(dims, block, channels=16):
    torch.manual_seed(0)
    return wild.randomize(Net(dims, block, channels))


def volume():
    return net(3, lambda c: wild_ranks.ScConv3d(c, 4))


def signal():
    return net(1, lambda c: wild_ranks.ScConv1d(c, 4))


def noise(dims, batch=2, seed=0):
    return naive.noise(batch, 1, *SIZES[dims], seed=seed)


def exported(model, x, axes=(), **options):
    reference, log = reference_from_module(model, x, axes)
    return reference, onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(**options), log)))


def judged(reference, model):
    samples = noise_samples(reference.signature, 0)
    return verify_onnx(reference, Artifact(model, "model.onnx", model.SerializeToString()), samples, StageLog())


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


BLOCKS = {
    "3-D, ScConv3d": (3, lambda c: wild_ranks.ScConv3d(c, 4), "SRU", ["a.SRU", "b.SRU"]),
    "3-D, normalized": (3, lambda c: wild_ranks.NormalizedSRU(c, 3), "SRUNorm", ["a", "b"]),
    "3-D, soft": (3, wild_ranks.SoftSRU, "SRUSoft", ["a", "b"]),
    "3-D, a Conv3d inside": (3, lambda c: wild_ranks.ProjectingSRU(c, c, 3), "SRU", ["a", "b"]),
    "1-D, ScConv1d": (1, lambda c: wild_ranks.ScConv1d(c, 4), "SRU", ["a.SRU", "b.SRU"]),
    "1-D, normalized": (1, lambda c: wild_ranks.NormalizedSRU(c, 1), "SRUNorm", ["a", "b"]),
    "1-D, soft": (1, wild_ranks.SoftSRU, "SRUSoft", ["a", "b"]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_each_sru_is_a_node_that_is_proven(name):
    dims, block, operator, sites = BLOCKS[name]
    reference, model = exported(net(dims, block), noise(dims))
    found = instrument.sites(model)
    assert {site: (node.op_type, node.overload) for site, node in found.items()} == dict.fromkeys(sites, (operator, ""))
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    rows, last = int(np.prod(SIZES[dims][:-1])), SIZES[dims][-1]
    assert shapes[found[sites[0]].output[0]] == [2, 16, rows, last]  # the operator's own [N, C, H, W]
    report = judged(reference, model)
    assert report, report.failures
    for sru in report.srus:
        assert sru.static.status == "passed"
        counts = (sru.teacher_forced, sru.free_running)
        assert all(count.gates > 0 and count.unexplained == 0 for count in counts)
    opinion = check_of(report, "second opinion")
    assert opinion.status == "passed"
    assert opinion.reason.startswith("onnx.reference, gates changed: 0 of ")


@pytest.mark.parametrize(("dims", "precision"), [(3, "fp16"), (1, "bf16")])
def test_in_half_too(dims, precision):
    reference, _ = reference_from_module(net(dims, wild_ranks.SoftSRU), noise(dims))
    _, half, _ = in_half(reference, ExportOptions(precision=precision))
    report = judged(reference, half)
    assert report, report.failures
    assert [sru.teacher_forced.unexplained for sru in report.srus] == [0, 0]


@pytest.mark.parametrize(("channels", "overload", "form"), [(16, "", "multiply"), (24, "straddle", "where")])
def test_open_axes_in_both_mask_forms(form, channels, overload):
    model = net(3, lambda c: wild_ranks.SRU3d(c, 16), channels)
    axes = (DynamicAxis(1, 2, 3), DynamicAxis(2, 4, 8, axis=2, input="x"), DynamicAxis(4, 8, 12, axis=4, input="x"))
    reference, artifact = exported(model, noise(3), axes, mask_form=form)
    assert {node.overload for node in instrument.sites(artifact).values()} == {overload}
    report = judged(reference, artifact)
    assert report, report.failures
    x = naive.noise(3, 1, 8, 6, 12, seed=2)
    np.testing.assert_allclose(run(artifact, x), model(x).detach().numpy(), **NETWORK)


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_a_bare_sru_at_every_opset(opset):
    model = wild.randomize(wild_ranks.SRU3d(16, 4))
    x = naive.noise(1, 16, 4, 6, 5)
    reference, artifact = exported(model, x, opset=opset)
    assert judged(reference, artifact)
    np.testing.assert_allclose(run(artifact, x), model(x).detach().numpy(), **SAME_ARITHMETIC)


def test_an_image_has_no_reshape():
    _, artifact = exported(nn.Sequential(nn.Conv2d(3, 16, 3), wild.randomize(wild.OriginalSRU(16, 4))).eval(),
                           naive.noise(2, 3, 8, 8))  # fmt: skip
    assert [node.op_type for node in artifact.graph.node] == ["Conv", "SRU"]


def damaged_body(model):
    text = function_proto(FunctionKey("SRU", False, "multiply", 18))
    for node in text.node:
        if node.op_type == "GreaterOrEqual":
            node.op_type = "Greater"
    del model.functions[:]
    model.functions.append(text)


def damaged_cut(model):
    name = instrument.sites(model)["b.SRU"].input[1]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.3), name))


def damaged_shape(model):
    """The rows and the columns of the planes change places: each sample keeps its elements, so its gates too."""
    node = instrument.sites(model)["a.SRU"]
    back = next(n for n in model.graph.node if n.input and n.input[0] == node.output[0])
    index = list(model.graph.node).index(back)
    swapped = onnx.helper.make_node("Transpose", [node.output[0]], ["swapped"], perm=[0, 1, 3, 2])
    model.graph.node.insert(index, swapped)
    back.input[0] = "swapped"


@pytest.mark.parametrize(
    ("model", "damage", "check"),
    [
        (volume, damaged_body, "static"),
        (volume, damaged_cut, "teacher-forced gates"),
        (volume, damaged_shape, "replay"),
        (signal, damaged_body, "static"),
        (signal, damaged_cut, "teacher-forced gates"),
    ],
)
def test_damage_is_caught(model, damage, check):
    dims = 3 if model is volume else 1
    reference, artifact = exported(model(), noise(dims))
    assert judged(reference, artifact)
    damage(artifact)
    report = judged(reference, artifact)
    assert not report
    assert check_of(report, check).status == "failed"


@pytest.mark.parametrize(
    ("length", "axes", "overload"),
    [
        (4096, (), ""),
        (4098, (), "straddle"),
        (64, (DynamicAxis(16, 64, 128, axis=2, input="x"),), "straddle"),
    ],
)
def test_long_rows_take_the_body_that_compensates_its_sums(length, axes, overload):
    model = wild.randomize(wild_ranks.SRU1d(16, 4))
    x = naive.noise(1, 16, length)
    reference, artifact = exported(model, x, axes)
    (node,) = instrument.sites(artifact).values()
    assert node.overload == overload
    expected = function_proto(FunctionKey("SRU", bool(overload), "multiply", 18))
    assert fingerprint(artifact.functions[0]) == fingerprint(expected)
    assert judged(reference, artifact)


def near_the_threshold(found, shape):
    """Numbers of one sign, many of them as near to the gate's boundary as 1e-6 of s."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).abs()
    return near_threshold(base, found.gate, generator)


@pytest.mark.parametrize("overload", ["", "straddle"])
def test_a_long_signal_keeps_its_gates(monkeypatch, exports_anew, overload):
    """65,536 numbers a row: summed one by one, s is off by more than the bound of a gate allows."""
    if not overload:
        monkeypatch.setattr(nodes, "LONGEST_ROW", 10**9)  # as if there were no limit
    reference, artifact = exported(wild.randomize(wild_ranks.SRU1d(4, 2)), naive.noise(1, 4, 65536))
    assert instrument.sites(artifact)["model"].overload == overload
    x = near_the_threshold(reference.recognition.srus[0], (1, 4, 65536))
    samples = [Sample("near", {"x": x})]
    report = verify_onnx(reference, Artifact(artifact, "m.onnx", artifact.SerializeToString()), samples, StageLog())
    assert bool(report) == bool(overload), report.failures
    assert (report.srus[0].teacher_forced.unexplained == 0) == bool(overload)


def test_the_fused_operator_takes_volumes_and_signals():
    for dims, block in ((3, lambda c: wild_ranks.ProjectingSRU(c, c, 3)), (1, wild_ranks.SoftSRU)):
        model, x = net(dims, block), noise(dims)
        fused = fuse(model, recognize(model, (x,), {}))
        assert sum(isinstance(module, FusedSRU) for module in fused.modules()) == 2
        torch.testing.assert_close(fused(x), model(x), **ONE_SRU)


def test_a_wrong_number_of_channels_is_told_for_volumes_too():
    with pytest.raises(ModelError) as caught:
        reference_from_module(volume(), naive.noise(2, 3, 4, 6, 8))
    assert "--input 2x1x4x6x8" in caught.value.remedy


# --- rewrite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "dynamo"),
    [
        *((name, name, False) for name in BLOCKS),
        ("3-D, ScConv3d", "3-D, soft", True),
        ("1-D, normalized", "1-D, normalized", True),
    ],
)
def test_naive_graphs_are_read(tmp_path, first, second, dynamo):
    """TorchScript's files of every block; torch.export's, which take ten times as long to make, of every operator."""
    dims, *_ = BLOCKS[first]
    blocks = iter([BLOCKS[first][1], BLOCKS[second][1]])
    model = net(dims, lambda channels: next(blocks)(channels))
    source = tmp_path / "in.onnx"
    source.write_bytes(naive.export(model, noise(dims), dynamo).SerializeToString())
    result = rewrite_onnx(source, tmp_path / "out.onnx", options=RewriteOptions(expect=2))
    operators = {BLOCKS[first][3][0]: BLOCKS[first][2], BLOCKS[second][3][1]: BLOCKS[second][2]}
    assert list(result.sites) == list(operators)
    assert result.outcome == "rewritten"
    assert [(g.rewritten.flips, g.rewritten.unexplained) for g in result.guard.gates] == [(0, 0), (0, 0)]
    written = onnx.load(result.path)
    assert {site: node.op_type for site, node in instrument.sites(written).items()} == operators
    x = noise(dims, seed=1)
    np.testing.assert_allclose(run(written, x), model(x).detach().numpy(), **NETWORK)


def open_export(model, x, dynamo):
    """With a batch and positions of any size."""
    names = {axis: f"axis{axis}" for axis in (0, *range(2, x.dim()))}
    if not dynamo:
        return naive.export(model, x, False, axes={"x": names})
    dims = {axis: torch.export.Dim(name, min=2, max=256) for axis, name in names.items()}
    return naive.export(model, x, True, shapes=(dims,))


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
@pytest.mark.parametrize("dims", [1, 3])
def test_naive_graphs_of_open_sizes_are_read(tmp_path, dims, dynamo):
    model = net(dims, lambda c: wild_ranks.NormalizedSRU(c, dims))
    source = tmp_path / "in.onnx"
    source.write_bytes(open_export(model, noise(dims), dynamo).SerializeToString())
    result = rewrite_onnx(source, tmp_path / "out.onnx", options=RewriteOptions(expect=2))
    # torch.sum where the two orders round otherwise
    assert {v.removesuffix(" (torch.sum)") for v in result.sites.values()} == {"groupbn-hard-normalized"}
    x = naive.noise(3, 1, *(size + 4 for size in SIZES[dims]), seed=1)
    np.testing.assert_allclose(run(onnx.load(result.path), x), model(x).detach().numpy(), **NETWORK)


@pytest.mark.parametrize("simplified", [False, True])
def test_a_signal_whose_groups_are_its_channels(simplified):
    """``view(N, 16, -1)`` of ``[N, 16, L]`` changes nothing, and a simplifier takes it away."""
    import onnxsim

    module, x = wild.randomize(wild_ranks.SRU1d(16, 16)), naive.noise(2, 16, 40)
    proto = naive.export(module, x, False)
    if simplified:
        proto = onnxsim.simplify(proto)[0]
        assert "Reshape" not in {node.op_type for node in proto.graph.node}
    result, applied = naive.rewritten(proto)
    (fused,) = applied.fused
    assert (fused.gate.variant.name, fused.gate.variant.num_groups, fused.x) == ("groupbn-hard", 16, "x")
    np.testing.assert_allclose(naive.run(result, x), module(x).detach().numpy(), **ONE_SRU)


def test_groups_too_large_to_tell_their_divisor():
    """Of 2**21 elements L and L - 1 are one number in float32: the original code's deviation is assumed, and said."""
    module, x = wild.randomize(wild_ranks.SRU3d(2, 1)), naive.noise(1, 2, 64, 128, 128)
    _, applied = naive.rewritten(naive.export(module, x, False))
    (fused,) = applied.fused
    assert fused.gate.variant.name == "groupbn-hard"
    assert "L and L - 1 are one number in float32; L - 1 is assumed" in fused.note
