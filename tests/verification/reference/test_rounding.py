"""Half files are judged in their own arithmetic, against a reference rounded as they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from scconv_deploy.bundle.reference import read_reference, write_reference
from scconv_deploy.errors import ParityError
from scconv_deploy.graph import instrument
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.model.rounded import Rounded
from scconv_deploy.precision.half import HalfOptions
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.runtimes.stand_in import stand_in
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.samples import Sample, noise_samples
from scconv_deploy.workflows.convert import convert_onnx


def rounded(x, data="float16"):
    return x.to(getattr(torch, data)).float()


def vanishing(path, scale=2.0**-13):
    """``(scale a)**2 / scale**2`` of a convolution's a, which float32 holds and float16 loses."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(8, 3, 3, 3)).astype(np.float32) * np.float32(0.2),
        "s": np.float32(scale), "t": np.float32(1 / scale),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        helper.make_node("Mul", ["a", "s"], ["b"]),
        helper.make_node("Mul", ["b", "b"], ["c"]),
        helper.make_node("Mul", ["c", "t"], ["d"]),
        helper.make_node("Mul", ["d", "t"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_what_vanishes_in_half_is_not_a_rounding(tmp_path):
    """ONNX Runtime's CPU provider multiplies in float32 and shows nothing of it."""
    source = vanishing(tmp_path / "m.onnx")
    with pytest.raises(ParityError, match=r"y: rounding costs \d\.\de-01 .*--keep leaves layers in float32"):
        convert_onnx(source, tmp_path / "half.onnx", HalfOptions("fp16"))
    assert not (tmp_path / "half.onnx").exists()
    kept = convert_onnx(source, tmp_path / "kept.onnx", HalfOptions("fp16", keep=("b", "c", "d", "y")))
    assert kept.report, kept.report.failures
    mild = convert_onnx(vanishing(tmp_path / "n.onnx", 0.5), tmp_path / "mild.onnx", HalfOptions("fp16"))
    assert mild.report, mild.report.failures


def test_each_result_is_rounded_once_and_a_batch_norm_is_folded_first():
    torch.manual_seed(0)
    conv, norm, x = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.randn(2, 3, 6, 6)
    nn.init.normal_(norm.weight)
    norm.running_var.fill_(0.3)
    norm.eval()
    x = rounded(x)
    with torch.no_grad(), Rounded([x], "float16"):
        y = norm(conv(x)) * 0.1
    with torch.no_grad():
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        w = rounded(conv.weight * scale.reshape(-1, 1, 1, 1))
        b = rounded(norm.bias - norm.running_mean * scale + scale * conv.bias)
        expected = rounded(rounded(torch.conv2d(x, w, b)) * rounded(torch.tensor(0.1)))
    assert torch.equal(y, expected)


def test_what_the_file_keeps_in_float32_is_rounded_where_it_is_read():
    x = rounded(300 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0)))
    with Rounded([x], "float16"):
        y = x.pow(2).mean(1) * 1.0  # squares beyond float16's range
    assert torch.isfinite(rounded(x.pow(2).mean(1))).sum() == torch.isfinite(y).sum()
    with Rounded([x], "float16"):
        z = x.softmax(1) + x
    assert torch.equal(z, rounded(rounded(x.softmax(1)) + x))


@pytest.mark.parametrize("data", ["float16", "bfloat16"])
def test_rounding_at_random_keeps_the_mean_and_what_is_exact(data):
    x = torch.full((20000,), 1 + 2.0**-12 if data == "float16" else 1 + 2.0**-9)
    mode = Rounded([], data, seed=0)
    found = mode.rounded(x)
    assert set(found.tolist()) == {1.0, 1 + (2.0**-10 if data == "float16" else 2.0**-7)}
    assert abs(float(found.mean() - x[0])) < 0.05 * float(x[0] - 1)
    assert torch.equal(mode.rounded(found), found)


def test_a_bundle_carries_the_rounded_reference(tiny_reference, tmp_path):
    source, samples = TorchReference(tiny_reference[0]), noise_samples(tiny_reference[0].signature, 0)[:1]
    write_reference(tmp_path, source, map(source.run, samples), [], rounded_to="float16")
    recorded = read_reference(tmp_path)
    found = recorded.rounded(recorded.run(0), None, "float16")
    fresh = TorchReference(tiny_reference[0])
    wanted = fresh.rounded(fresh.run(samples[0]), None, "float16")
    for name, value in wanted.outputs.items():
        np.testing.assert_array_equal(found.outputs[name], value)
        np.testing.assert_array_equal(value, value.astype(np.float16))
        assert 2.0**-13 < found.floors[name] == wanted.floors[name] < 1e-2
    assert found.input_floors == wanted.input_floors
    assert found.spread == wanted.spread > 1
    assert recorded.rounded(recorded.run(0), None, "bfloat16") is None


def test_the_runtime_keeps_the_roundings_of_the_stand_in(tiny_reference, tmp_path):
    """At its highest level it removes pairs of casts that change nothing, and these do: to the bit as without it."""
    from scconv_deploy.workflows.export import ExportOptions
    from tests.verification.onnx.test_half import halved

    _, half = halved(tiny_reference[0], ExportOptions(precision="fp16"))
    copy = stand_in(instrument.expose_gates(half, []))
    image = {"image": tiny_reference[0].signature.tensors["image"].numpy()}
    plain, optimised = (
        OnnxRuntimeRunner(copy, RuntimeOptions(threads=1, optimization=level)).run(image) for level in ("none", "all")
    )
    for name, value in plain.items():
        assert np.linalg.norm(optimised[name] - value) <= 2.0**-11 * np.linalg.norm(value)
        np.testing.assert_array_equal(value, value.astype(np.float16))
        np.testing.assert_array_equal(optimised[name], optimised[name].astype(np.float16))


def test_embedded_indices_are_data_and_positions_are_not():
    """A row of a weight is rounded; a number made of an index alone is a constant, exact beyond 2048."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(5000, 4)

        def forward(self, index):
            row = index.float() * 1.0
            return self.words(row.long()) * 0.5, row

    torch.manual_seed(0)
    index = torch.tensor([[2049, 4095]])
    reference, _ = reference_from_module(Words().eval(), index)
    source = TorchReference(reference)
    found = source.rounded(source.run(Sample("x", {"index": index})), None, "float16")
    words, row = found.outputs.values()
    np.testing.assert_array_equal(words, words.astype(np.float16))
    expected = reference.model.words.weight[index].detach().half().float() * 0.5
    np.testing.assert_array_equal(words, expected.half().float().numpy())
    assert row.tolist() in ([[2049.0, 4095.0]], [[2048.0, 4096.0]])  # an output is rounded, the row looked up was not


class Image(nn.Module):
    """An image of bytes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, image):
        return self.conv(image.float() / 255).relu()


class OneHot(nn.Module):
    """Numbers of words."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(9, 8), nn.Linear(8, 4)

    def forward(self, index):
        return self.last(self.first(nn.functional.one_hot(index, 9).float()).relu())


class Steps(nn.Module):
    """Points in time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rates", torch.tensor([0.001, 0.01, 0.1]))
        self.last = nn.Linear(3, 4)

    def forward(self, steps):
        return self.last(torch.sin(steps.float()[:, None] * self.rates))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Image, lambda g: torch.randint(0, 256, (2, 3, 8, 8), generator=g, dtype=torch.uint8)),
        (OneHot, lambda g: torch.randint(0, 9, (2, 5), generator=g)),
        (Steps, lambda g: torch.randint(0, 1000, (6,), generator=g)),
    ],
)
def test_what_is_computed_of_integers_is_rounded(model, inputs):
    torch.manual_seed(0)
    reference, _ = reference_from_module(model().eval(), inputs(torch.Generator().manual_seed(0)))
    source = TorchReference(reference)
    run = source.run(Sample("x", reference.signature.tensors))
    found = source.rounded(run, None, "float16")
    ((name, y),) = found.outputs.items()
    apart = np.linalg.norm(y - run.outputs[name]) / np.linalg.norm(run.outputs[name])
    assert apart > 2.0**-12.5  # more than the rounding of the output itself would do
    assert 2.0**-13 < found.floors[name] < 1e-1


def test_an_integer_that_half_does_not_hold_is_rounded_where_it_is_read():
    index = torch.tensor([2049, 7])
    with Rounded([index], "float16"):
        found = index.float() * 1.0
    assert found.tolist() == [2048.0, 7.0]
