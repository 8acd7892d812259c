"""What the usual converters break, held against what this one writes: types, order, casts, a second conversion."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper
from typer.testing import CliRunner

from scconv_deploy import cli
from scconv_deploy.errors import ModelError
from scconv_deploy.graph import instrument
from scconv_deploy.graph.file import check
from scconv_deploy.precision.half import HalfOptions, to_half
from scconv_deploy.records.stage import StageLog
from scconv_deploy.workflows.export import ExportOptions, export_to_ir

FLOAT, HALVES = TensorProto.FLOAT, (TensorProto.FLOAT16, TensorProto.BFLOAT16)
CASES = [("fp16", "float32"), ("fp16", "half"), ("bf16", "float32")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def half(request, tiny_bytes, tiny_reference):
    """TinyNet converted: four SRUs of three operators, one of them behind another."""
    precision, io = request.param
    model = ir.from_proto(onnx.load_model_from_string(tiny_bytes[0]))
    if precision == "bf16":
        model = export_to_ir(tiny_reference[0], ExportOptions(opset=22), StageLog())
    return ir.to_proto(to_half(model, HalfOptions(precision, io)).model)


def types(model):
    """Every value's type, as the full checker's shape inference finds it."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def test_it_is_valid(half):
    check(half)


def test_nodes_come_after_what_they_read(half):
    known = {value.name for value in half.graph.input} | {tensor.name for tensor in half.graph.initializer} | {""}
    for node in half.graph.node:
        assert set(node.input) <= known, node.name
        known |= set(node.output)
    assert {value.name for value in half.graph.output} <= known


def test_an_sru_takes_half_data_and_float32_parameters(half):
    kinds = types(half)
    sites = instrument.sites(half)
    assert len(sites) == 4
    for site, node in sites.items():
        assert kinds[node.input[0]] in HALVES, site
        assert kinds[node.output[0]] == kinds[node.input[0]], site
        assert [kinds[name] for name in node.input[1:]] == [FLOAT] * (len(node.input) - 1), site
        assert len(node.input) > 2, site


def test_no_casts_around_an_sru(half):
    """Data comes from a half node and goes to one: a plugin then reads and writes half as many bytes."""
    producers = {name: node for node in half.graph.node for name in node.output}
    for site, node in instrument.sites(half).items():
        assert producers[node.input[0]].op_type != "Cast", site
        readers = [reader.op_type for reader in half.graph.node if node.output[0] in reader.input]
        assert readers, site
        assert "Cast" not in readers, site


def test_a_value_is_cast_once_and_never_back_and_forth(half):
    casts = [node for node in half.graph.node if node.op_type == "Cast"]
    made = {node.output[0] for node in casts}
    assert len({(node.input[0], node.attribute[0].i) for node in casts}) == len(casts)
    assert not [node.name for node in casts if node.input[0] in made]
    kinds = types(half)
    assert not [node.name for node in casts if kinds[node.input[0]] == kinds[node.output[0]]]


def test_a_cut_in_half_would_be_invalid(half):
    """The trap itself: the test of the types and the checker both see it."""
    broken = onnx.ModelProto()
    broken.CopyFrom(half)
    name = next(iter(instrument.sites(broken).values())).input[1]
    tensor = next(t for t in broken.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name))
    with pytest.raises(ModelError, match="invalid"):
        check(broken)


def test_a_half_model_without_weights_is_refused_too(half):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[n] x) => (float[n] y) { h = Relu (x)  y = Sqrt (h) }'
    )
    once = to_half(ir.from_proto(model), HalfOptions("fp16")).model
    with pytest.raises(ModelError, match="x_half is FLOAT16: this model is in half precision already"):
        to_half(once, HalfOptions("fp16"))


def test_converting_twice_is_exit_4_and_harms_no_file(tiny_bytes, tmp_path):
    source, output, other = (tmp_path / name for name in ("model.onnx", "half.onnx", "other.onnx"))
    source.write_bytes(tiny_bytes[0])
    other.write_bytes(b"something of the user's")

    def convert(origin, target, *options):
        command = ["convert", str(origin), "-o", str(target), "--precision", "fp16", *options]
        return CliRunner().invoke(cli.app, command)

    assert convert(source, output).exit_code == 0
    content = output.read_bytes()
    for target, options, code, words in (
        (other, ("--force",), 4, "in half precision already"),
        (output, ("--force",), 2, "is the input itself"),
        (output, (), 2, "exists"),
    ):
        result = convert(output, target, *options)
        assert (result.exit_code, words in result.output) == (code, True), result.output
    assert convert(source, source, "--force").exit_code == 2
    assert source.read_bytes() == tiny_bytes[0]
    assert output.read_bytes() == content
    assert other.read_bytes() == b"something of the user's"


def test_keep_holds_a_layer_of_a_network_in_float32(tiny_bytes):
    model = ir.from_proto(onnx.load_model_from_string(tiny_bytes[0]))
    conversion = to_half(model, HalfOptions("fp16", keep=("head.*",)))
    proto = ir.to_proto(conversion.model)
    check(proto)
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    assert kinds["head.weight"] == kinds["head.bias"] == FLOAT
    assert kinds["stem.weight"] == TensorProto.FLOAT16
    head = next(node for node in proto.graph.node if "head.weight" in node.input)
    assert (head.name, "Gemm: kept by 'head.*'") in conversion.kept
