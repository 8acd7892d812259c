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
from tests.exporters.tensorrt.engines import conv_model, sru_model


def test_facts_of_a_graph_and_back_from_json():
    facts = graph_facts(sru_model(("a", "b")))
    assert facts.inputs == (GraphInput("x", (-1, 8, 8, 8)),)  # no initializer
    assert facts.shapes == {"x": (-1, 8, 8, 8)}
    assert facts.srus == (SRUNode("a", "SRU"), SRUNode("b", "SRU"))
    assert ("scconv", "SRU") in facts.operators
    assert ("", "ReduceSumSquare") in facts.operators  # of the function
    assert decode(GraphFacts, json.loads(json.dumps(encode(facts)))) == facts
    unnamed = sru_model(("",))
    assert graph_facts(unnamed).srus == (SRUNode("x1", "SRU"),)  # by its output, as the parser has it


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
