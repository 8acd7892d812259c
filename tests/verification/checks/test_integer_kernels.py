"""int8 files in float arithmetic and in ONNX Runtime's integer kernels: two things, and only one is the verdict."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from scconv_deploy.graph.types import described_precision, has_unsigned_codes, quantization_of
from scconv_deploy.records.quantization import REDUCED_CODE
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes import half, onnxruntime
from scconv_deploy.runtimes.half import runner_of
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from scconv_deploy.system.cpu import int8_instructions
from scconv_deploy.verification.onnx.chain import Artifact, Judging, verify_artifact
from scconv_deploy.verification.reference import onnx_file
from scconv_deploy.verification.reference.onnx_file import NamedArrays, OnnxReference
from tests.verification.judging import check_of

CHANNELS, LARGE, OUT = 16, 255.0, 8192.0


def layer(code: int | None, unsigned: bool = True) -> onnx.ModelProto:
    """A 1x1 Conv between quantisers, all weights the same; None leaves quantisers out. Scales are 1, of y 8192."""
    zero = np.uint8(0) if unsigned else np.int8(0)
    weight = np.full((CHANNELS, CHANNELS, 1, 1), 127 if code is None else code)
    scale = np.float32(127 / (code or 127))
    stored = {"s": np.float32(1), "z": zero, "ws": scale, "wz": np.int8(0), "os": np.float32(OUT), "oz": zero}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
        helper.make_node("Conv", ["d", "wd"], ["c"], kernel_shape=[1, 1]),
        helper.make_node("QuantizeLinear", ["c", "os", "oz"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "os", "oz"], ["y"]),
    ]
    stored["w"] = weight.astype(np.int8)
    if code is None:
        nodes, stored = [helper.make_node("Conv", ["x", "w"], ["y"])], {"w": weight.astype(np.float32)}
    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, CHANNELS, 1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, CHANNELS, 1, 8])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def x(value: float = LARGE) -> np.ndarray:
    return np.full((1, CHANNELS, 1, 8), value, np.float32)


def kernels(model: onnx.ModelProto, value: float) -> float:
    """First output in ONNX Runtime with all optimisations."""
    return float(OnnxRuntimeRunner(model).run({"x": x(value)})["y"].flat[0])


def exact(code: int, value: float) -> float:
    """The same in integers, rounded to the output's levels."""
    return round(code * (127 / code) * value * CHANNELS / OUT) * OUT


@pytest.mark.parametrize(("unsigned", "value"), [(True, 255.0), (False, 127.0)])
def test_the_largest_products_of_a_reduced_range_do_not_saturate_on_this_cpu(unsigned, value):
    assert kernels(layer(REDUCED_CODE, unsigned), value) == exact(REDUCED_CODE, value)
    model = layer(127, unsigned)
    assert runner_of(model).run({"x": x(value)})["y"].flat[0] == exact(127, value), "float arithmetic is exact"
    if int8_instructions().saturating:
        assert kernels(model, value) < 0.6 * exact(127, value)
    assert 2 * 255 * REDUCED_CODE < 2**15 <= 2 * 255 * 127


def judged(model: onnx.ModelProto, value: float = LARGE, **overrides: float):
    """The check of a file against the float one on noise below a value."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(0.8 * value, value, (1, CHANNELS, 1, 8)).astype(np.float32)
    source = OnnxReference("layer.onnx", layer(None), measured=False)
    report = verify_artifact(
        source, Artifact(model, "q.onnx", b""), [NamedArrays("rows", {"x": rows})], StageLog(),
        judging=Judging(overrides),
    )  # fmt: skip
    return check_of(report, "integer kernels")


def sums(monkeypatch, factor: float) -> None:
    """Kernels whose outputs are so many times too large, whatever this CPU does."""
    plain = OnnxRuntimeRunner.run
    monkeypatch.setattr(
        "scconv_deploy.verification.checks.integer_kernels.OnnxRuntimeRunner",
        type("Kernels", (OnnxRuntimeRunner,), {
            "run": lambda self, feeds: {n: factor * y for n, y in plain(self, feeds).items()}
        }),
    )  # fmt: skip


def test_kernels_that_compute_what_the_file_says_pass():
    check = judged(layer(REDUCED_CODE))
    assert check.status == "passed"
    assert "y: the same, 0x what quantising costs (limit 1.5x)" in check.reason
    assert (check.quantities[0].tolerance, check.quantities[0].value) == ("integer_kernels", 0)


def test_kernels_that_saturate_fail_with_the_remedy_where_the_codes_are_for_cpus(monkeypatch):
    sums(monkeypatch, 0.5)
    check = judged(layer(REDUCED_CODE))
    assert check.status == "failed"
    assert check.reason.endswith("quantise with --target cpu --reduce-range, whose products cannot saturate")
    assert "y: SNR 6.0 dB" in check.reason
    assert check.quantities[0].value > 10
    of_gpus = judged(layer(REDUCED_CODE, unsigned=False), 127.0)
    assert of_gpus.status == "not run"
    assert "--reduce-range" in of_gpus.reason
    assert of_gpus.reason.endswith("its codes are for GPUs, so this was not judged")
    assert judged(layer(REDUCED_CODE, unsigned=False), 127.0, integer_kernels=1.0).status == "failed"


@pytest.mark.skipif(not int8_instructions().saturating, reason="this CPU's int8 sums do not saturate")
def test_a_file_of_eight_bits_fails_on_this_cpu_where_its_products_are_large():
    check = judged(layer(127))
    assert check.status == "failed"
    assert "they saturate without VNNI" in check.reason


def test_no_other_session_of_a_verification_optimises_a_quantised_file(monkeypatch):
    made = []
    plain = OnnxRuntimeRunner.__init__

    def spy(self, model, options=onnxruntime.RuntimeOptions()):
        if quantization_of(model):
            made.append((type(self).__name__, options.optimization))
        plain(self, model, options)

    class Kernels(OnnxRuntimeRunner):
        pass

    monkeypatch.setattr(OnnxRuntimeRunner, "__init__", spy)
    monkeypatch.setattr("scconv_deploy.verification.checks.integer_kernels.OnnxRuntimeRunner", Kernels)
    judged(layer(127))
    OnnxReference("q.onnx", layer(127), measured=False)
    half.runner_of(layer(127))
    assert onnx_file.float_arithmetic is half.float_arithmetic
    assert [one for one in made if one[0] == "Kernels"] == [("Kernels", "all")]
    others = {level for name, level in made if name != "Kernels"}
    assert others == {"none"}
    assert len(made) >= 4


def test_a_file_with_unsigned_codes_is_said_to_be_for_cpus():
    assert has_unsigned_codes(layer(127))
    assert not has_unsigned_codes(layer(127, unsigned=False))
    assert described_precision(layer(127)) == "int8 (Q/DQ, for CPUs)"
    assert described_precision(layer(127, unsigned=False)) == "int8 (Q/DQ)"
    assert described_precision(layer(None)) == "fp32"
