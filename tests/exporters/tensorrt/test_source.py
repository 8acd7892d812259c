"""What a builder knows of a model without reading it."""

import hashlib
import json

import onnx
import pytest

from scconv_deploy.errors import IntegrityError, ModelError
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource, graph_facts
from scconv_deploy.exporters.tensorrt.source import FileSource, GraphFacts, GraphInput, SRUNode
from scconv_deploy.graph.contract import FunctionKey
from scconv_deploy.graph.functions import function_proto
from scconv_deploy.records.codec import decode, encode
from tests.command_line import run
from tests.exporters.tensorrt.engines import conv_model, sru_model


def test_facts_of_a_graph_and_back_from_json():
    facts = graph_facts(sru_model(("a", "b")))
    assert facts.inputs == (GraphInput("x", (-1, 8, 8, 8)),)  # no initializer
    assert facts.shapes == {"x": (-1, 8, 8, 8)}
    assert facts.srus == (SRUNode("a", "SRU", "x", "x1"), SRUNode("b", "SRU", "x1", "x2"))
    assert ("scconv", "SRU") in facts.operators
    assert ("", "GreaterOrEqual") in facts.operators  # of the function
    assert decode(GraphFacts, json.loads(json.dumps(encode(facts)))) == facts
    unnamed = sru_model(("",))
    assert graph_facts(unnamed).srus == (SRUNode("x1", "SRU", "x", "x1"),)  # by its output, as the parser has it


def test_the_forms_of_a_model_and_what_the_engine_depends_on():
    model = sru_model()
    source = OnnxSource(model)
    assert onnx.load_model_from_string(source.read("whole")) == model
    assert source.content_sha256 == hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    assert OnnxSource(conv_model()).content_sha256 != source.content_sha256
    stripped = sru_model()
    del stripped.functions[:]
    with pytest.raises(ModelError, match="have no function"):
        OnnxSource(stripped).read("inlined")


def structure(change=lambda model: None):
    """Of a convolution with a bias, its output added to a constant and resized."""
    text = """<ir_version: 10, opset_import: ["" : 18]> g (float[N, 2, 8, 8] x) => (float[N, 2, 16, 16] y)
    <float[2, 2, 1, 1] w = {1, 2, 3, 4}, float eps = {0.5}, float[4] scales = {1, 1, 2, 2}, int64[1] axis = {1}> {
        a = Conv <pads = [0, 0, 0, 0]> (x, w)  b = Add(a, eps)  c = ReduceMean(b, axis)  d = Mul(b, c)
        y = Resize(d, , scales)
    }"""
    model = onnx.parser.parse_model(text)
    change(model)
    return OnnxSource(model).structure_sha256


def value(name, *values):
    def change(model):
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        field = tensor.int64_data if tensor.data_type == onnx.TensorProto.INT64 else tensor.float_data
        field[:] = values

    return change


def attribute(model):
    model.graph.node[0].attribute[0].ints[0] = 1


def opset(model):
    model.opset_import[0].version = 19


def shape(model):
    model.graph.initializer[0].dims[:] = [4, 1, 1, 1]


def provenance(model):
    model.metadata_props.add(key="weights", value="another file")
    model.graph.node[0].doc_string = "line 3"
    model.graph.node[0].metadata_props.add(key="stack", value="line 3")


def numbers(model):
    for node in model.graph.node:
        node.name = f"{node.op_type}_7"
        for names in (node.input, node.output):
            names[:] = [{"a": "_v_1", "d": "_v_2", "axis": "val_3", "eps": "val_4"}.get(name, name) for name in names]
    for tensor in model.graph.initializer:
        tensor.name = {"axis": "val_3", "eps": "val_4"}.get(tensor.name, tensor.name)


def wiring(model):
    model.graph.node[3].input[:] = ["c", "b"]


def weight_name(model):
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "kernel"


@pytest.mark.parametrize("change", [value("w", 5, 6, 7, 8), provenance, numbers])
def test_weights_provenance_and_numbers_are_no_part_of_the_structure(change):
    assert structure(change) == structure()


@pytest.mark.parametrize(
    "change",
    [value("eps", 0.25), value("scales", 1, 1, 4, 4), value("axis", 2), attribute, opset, shape, wiring, weight_name],
)
def test_what_a_parser_reads_when_it_builds_is_part_of_the_structure(change):
    assert structure(change) != structure()


def test_exports_of_one_network_with_other_weights_have_one_structure(tmp_path):
    """Weights, cuts and signs differ."""
    sources = []
    for seed in (0, 1):
        path, values = tmp_path / f"{seed}.onnx", f'{{"blocks_per_stage": 1, "side": 16, "seed": {seed}}}'
        net = ("tests.mutations:two_heads", "--kwargs", values, "--input", "1x3x16x16")
        made = run("export", *net, "-o", str(path), "--quiet")
        assert made.exit_code == 0, made.output
        sources.append(OnnxSource(onnx.load(path)))
    first, second = sources
    assert first.structure_sha256 == second.structure_sha256
    assert first.content_sha256 != second.content_sha256


def test_files_in_place_of_a_model(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"model")
    source = FileSource(GraphFacts((), (), ()), {"whole": tmp_path / "m.onnx", "plugin": tmp_path / "absent"})
    assert (source.read("whole"), source.content_sha256) == (b"model", hashlib.sha256(b"model").hexdigest())
    assert source.folded("whole") is None
    for form in ("plugin", "inlined"):
        with pytest.raises(IntegrityError, match=f"no file of the form '{form}'"):
            source.read(form)


def test_what_a_parser_reads_wrongly_is_put_right():
    """NVIDIA's parser takes the first function of a name, and mixes up formal names with outer ones."""
    model = sru_model()
    straddling = function_proto(FunctionKey("SRU", True, "where", 18))
    model.functions.append(straddling)
    foreign = onnx.parser.parse_function('<domain: "my", opset_import: ["" : 18]> F (a, b) => (c) { c = Sub(a, b) }')
    model.functions.append(foreign)
    model.graph.node.append(onnx.helper.make_node("F", ["x1", "x"], ["y"], domain="my"))
    model.graph.output[0].name = "y"
    model.opset_import.append(onnx.helper.make_opsetid("my", 1))
    source = OnnxSource(model)
    read = onnx.load_model_from_string(source.read("whole"))
    assert [(f.domain, f.overload) for f in read.functions] == [("scconv", "straddle"), ("scconv", "")]
    assert [list(node.input) for node in read.graph.node if node.op_type == "Sub"] == [["x1", "x"]]
    assert source.facts.undefined == ()
    assert ("my", "F") not in source.facts.operators
    assert len(model.functions) == 3  # the given model is not changed


def test_operators_of_branches_are_seen():
    text = """
    <ir_version: 10, opset_import: ["" : 18, "com.acme" : 1]>
    agraph (bool c, float[2] x) => (float[2] y) {
      y = If (c) <then_branch = yes () => (float[2] a) { a = com.acme.Relu (x) },
                  else_branch = no () => (float[2] b) { b = Neg (x) }>
    }
    """
    found = graph_facts(onnx.parser.parse_model(text))
    assert found.operators == (("", "If"), ("", "Neg"), ("com.acme", "Relu"))
    assert found.undefined == (("com.acme", "Relu"),)
