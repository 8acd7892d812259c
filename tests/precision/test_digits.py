"""A trained network in half precision: as many digits right as in float32, image by image."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import scconv_deploy
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.precision.half import HalfOptions
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from scconv_deploy.runtimes.stand_in import stand_in
from scconv_deploy.verification.accuracy import PairedCounts
from scconv_deploy.workflows.convert import convert_onnx
from tests.digits import train

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

OPSET = {"fp16": 18, "bf16": 22}  # bfloat16 convolutions exist since 22


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """(folder with float32 files by precision, test images, labels)."""
    net, images, labels = train()
    folder = tmp_path_factory.mktemp("digits")
    for precision, opset in OPSET.items():
        scconv_deploy.export(
            net,
            images[:16],
            folder / f"for_{precision}.onnx",
            dynamic=(DynamicAxis(1, 16, 397),),
            options=scconv_deploy.ExportOptions(opset=opset),
        )
    return folder, images.numpy(), labels.numpy()


def logits(model, images):
    return OnnxRuntimeRunner(model).run({"image": images})[model.graph.output[0].name]


def paired(digits, precision, model):
    """Accuracy of a model beside the float32 file's, on the same images."""
    folder, images, labels = digits
    counts = PairedCounts()
    expected = logits(onnx.load(folder / f"for_{precision}.onnx"), images)
    counts.add(expected, logits(model, images), labels)
    return counts.accuracy()


@pytest.mark.parametrize("precision", OPSET)
def test_accuracy_is_within_the_interval_of_float32s(digits, precision, tmp_path):
    folder = digits[0]
    np.savez(tmp_path / "digits.npz", image=digits[1][:16])
    source, output = folder / f"for_{precision}.onnx", tmp_path / "half.onnx"
    result = convert_onnx(source, output, HalfOptions(precision), data=str(tmp_path / "digits.npz"))
    assert result.report, result.report.failures
    half = onnx.load(output)
    found = paired(digits, precision, stand_in(half))  # rounds every value, in either type
    assert found.reference > 0.9
    assert found.low <= 0 <= found.high
    assert found.high - found.low < 0.05  # narrow enough to see a network that lost something
    if precision == "fp16":
        direct = paired(digits, precision, half)
        assert direct.low <= 0 <= direct.high


def test_a_gate_turned_round_is_outside_it(digits, tmp_path):
    """So that the test above can fail: the same conversion, one comparison inverted."""
    convert_onnx(digits[0] / "for_fp16.onnx", tmp_path / "half.onnx", HalfOptions("fp16"))
    half = onnx.load(tmp_path / "half.onnx")
    for function in half.functions:
        next(node for node in function.node if node.op_type == "GreaterOrEqual").op_type = "Less"
    found = paired(digits, "fp16", stand_in(half))
    assert found.high < 0
