"""ONNX files of strangers: read, or refused with the reason; nothing outside the model's folder is touched."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from scconv_deploy.errors import IntegrityError, ModelError, UsageError
from scconv_deploy.graph.file import read_onnx
from scconv_deploy.workflows.inspect import inspect_onnx
from scconv_deploy.workflows.subject import OnnxFile
from tests.exporters.tensorrt.engines import conv_model, sru_model

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """The current folder is not the model's; a secret lies outside of it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    return folder


def tensor(name="w"):
    return numpy_helper.from_array(WEIGHT, name)


def external(*entries, name="w"):
    """A tensor whose data lies elsewhere."""
    found = tensor(name)
    found.ClearField("raw_data")
    found.data_location = TensorProto.EXTERNAL
    for key, value in entries:
        found.external_data.add(key=key, value=value)
    return found


def add_model(weight, **options):
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "add",
        [info("x", TensorProto.FLOAT, [2, 3])],
        [info("y", TensorProto.FLOAT, [2, 3])],
        initializer=[weight],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)], **options)


def save(folder, model, name="model.onnx"):
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def refuses(path, *words, kind=IntegrityError):
    with pytest.raises(kind) as caught:
        read_onnx(path)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.rejected", "model.json", "model.txt", "model.onnxtxt"])
def test_a_good_file_whatever_it_is_called(workplace, name):
    model = add_model(tensor())
    assert read_onnx(save(workplace, model, name)) == model


def test_no_file(workplace):
    refuses(workplace / "model.onnx", "does not exist", kind=UsageError)
    refuses(workplace, "is not a file", kind=UsageError)


def test_every_truncation(workplace):
    data = add_model(tensor()).SerializeToString()
    path = workplace / "model.onnx"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refuses(path, "empty" if length == 0 else "")


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 64,
        b"a text file\n",
        b"{}",
        b"PK\x03\x04" + bytes(60),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        np.random.default_rng(0).bytes(1000),
        WEIGHT.tobytes(),
        tensor().SerializeToString(),
    ],
)
def test_what_is_not_onnx(workplace, data):
    path = workplace / "model.onnx"
    path.write_bytes(data)
    refuses(path, "truncated or not ONNX")


def text_model(body, opsets='"" : 18', **changes):
    model = onnx.parser.parse_model(
        f"<ir_version: 9, opset_import: [{opsets}]> g (float[2, 3] x) => (float[2, 3] y) {body}"
    )
    for name, value in changes.items():
        setattr(model, name, value)
    return model


def test_only_damage_is_called_damage(workplace):
    short = tensor()
    short.raw_data = short.raw_data[:-1]
    refuses(save(workplace, add_model(short)), "is damaged", "(tensor name: w)", "raw_data size")
    model = add_model(tensor())
    del model.opset_import[:]  # it comes after the graph
    refuses(save(workplace, model), "is damaged", "opset_import")


TWO_INITIALIZERS = add_model(tensor())
TWO_INITIALIZERS.graph.initializer.append(tensor())
INVALID = {
    "two nodes produce 'y'": text_model("{ y = Relu(x) y = Abs(x) }"),
    "two initializers are called 'w'": TWO_INITIALIZERS,
    "node y (Relu) reads 'nowhere', which nothing produces": text_model("{ y = Relu(nowhere) }"),
    "node y (Abs) produces 'y', which is an input or a constant": text_model(
        "<float[2, 3] y = {1, 2, 3, 4, 5, 6}> { y = Abs(x) }"
    ),
    "node y (Relu) depends on its own result": text_model("{ y = Relu(m) m = Abs(y) }"),
    "'y' is not an output of any node": text_model("{ z = Relu(x) }"),
    "Unrecognized attribute: foo": text_model("{ y = Relu <foo = 1> (x) }"),
    "input size 2": text_model("{ y = Relu(x, x) }"),
    "it imports no opset for its Relu": text_model("{ y = Relu(x) }", '"my" : 1'),
    "IR version 99, written by a newer ONNX": text_model("{ y = Relu(x) }", ir_version=99),
}


@pytest.mark.parametrize("reason", INVALID)
def test_an_invalid_graph_is_no_damage(workplace, reason):
    refuses(save(workplace, INVALID[reason]), reason, kind=ModelError)


def test_a_graph_without_outputs(workplace):
    model = text_model("{ y = Relu(x) }")
    del model.graph.output[:]
    refuses(save(workplace, model), "it has no outputs", kind=ModelError)


FOREIGN = {
    "in the standard domain": text_model("{ m = EfficientNMS_TRT <max = 10> (x, x) y = Relu (m) }"),
    "of another opset": text_model("{ y = Gelu(x) }"),
    "taken out of the standard": text_model("<float[2] s = {1, 1}> { y = Upsample(x, s) }"),
    "of a domain that is not imported": text_model("{ y = my.Op(x) }"),
    "inside a branch": text_model(
        "<bool b = {1}> { y = If (b) <then_branch = t () => (float[2, 3] p) { p = Mine(x) },"
        " else_branch = e () => (float[2, 3] q) { q = Relu(x) }> }"
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_operators_are_read(workplace, what):
    """And nothing of them is changed; a domain gets its version."""
    found = read_onnx(save(workplace, FOREIGN[what]))
    assert found.graph == FOREIGN[what].graph
    imported = {entry.domain: entry.version for entry in found.opset_import}
    assert imported == {"": 18} | ({"my": 1} if "imported" in what else {})


@pytest.mark.parametrize("what", FOREIGN)
def test_inspect_names_foreign_operators(workplace, what):
    names = ("EfficientNMS_TRT", "Gelu", "Upsample", "my::Op", "Mine")
    expected = dict(zip(FOREIGN, names, strict=True))[what]
    (note,) = inspect_onnx(OnnxFile(save(workplace, FOREIGN[what]))).notes
    assert note.startswith(f"{expected}: no operator of ONNX or ONNX Runtime")


def test_a_domain_of_onnx_that_is_not_imported_gets_the_newest_version_as_in_runtimes(workplace):
    found = read_onnx(save(workplace, text_model('{ y = ai.onnx.ml.Normalizer <norm = "L2"> (x) }')))
    assert {e.domain: e.version for e in found.opset_import} == {"": 18, "ai.onnx.ml": 5}


def test_an_unsorted_graph_is_sorted_and_nothing_else_is_moved(workplace):
    """Branches, which read tensors of the graph around them, and functions too."""
    branch = "(float[2, 3] {0}) {{ {0} = Relu({0}0) {0}0 = Add(x, k) }}"
    model = text_model(
        f"{{ y = Add(d, i) a = Abs(x) i = If (b) <then_branch = t () => {branch.format('p')},"
        f" else_branch = e () => {branch.format('q')}> k = Neg(a) c = my.F(a) d = Neg(c)"
        " b = Constant <value = bool {1}> () }",
        '"" : 18, "my" : 1',
    )
    body = onnx.parser.parse_function('<domain: "my", opset_import: ["" : 18]> F (a) => (b) { b = Neg(c) c = Abs(a) }')
    model.functions.append(body)
    found = read_onnx(save(workplace, model))
    assert [n.output[0] for n in found.graph.node] == ["a", "k", "c", "d", "b", "i", "y"]
    inner = next(n for n in found.graph.node if n.op_type == "If").attribute
    assert [[n.output[0] for n in a.g.node] for a in inner] == [["p0", "p"], ["q0", "q"]]
    assert [n.output[0] for n in found.functions[0].node] == ["c", "b"]
    x = np.arange(-3, 3, dtype=np.float32).reshape(2, 3)
    (y,) = onnxruntime.InferenceSession(found.SerializeToString()).run(None, {"x": x})
    np.testing.assert_array_equal(y, np.abs(x) + np.maximum(x - np.abs(x), 0))


def test_a_graph_without_nodes_or_inputs_is_a_graph(workplace):
    identity = text_model("{ y = Relu(x) }")
    del identity.graph.node[:]
    identity.graph.output[0].name = "x"
    assert read_onnx(save(workplace, identity)) == identity
    constant = text_model("{ y = Constant <value = float[2, 3] {1, 2, 3, 4, 5, 6}> () }")
    del constant.graph.input[:]
    assert read_onnx(save(workplace, constant)) == constant


@pytest.mark.parametrize(
    ("start", "remedy"), [(b"\x1f\x8b\x08", "gunzip"), (b"PK\x03\x04", "Unpack"), (b"version https://git-lfs", "lfs")]
)
def test_what_a_file_is_instead(workplace, start, remedy):
    path = workplace / "model.onnx"
    path.write_bytes(start + bytes(60))
    with pytest.raises(IntegrityError, match="truncated or not ONNX: it is") as refused:
        read_onnx(path)
    assert remedy in refused.value.remedy


# --- external data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["data.bin", "sub/data.bin", "./data.bin", "sub/../data.bin"])
def test_external_data_inside_the_folder(workplace, location):
    place = workplace / location
    (workplace / "sub").mkdir()
    place.write_bytes(bytes(4) + WEIGHT.tobytes())
    path = save(workplace, add_model(external(("location", location), ("offset", "4"), ("length", "24"))))
    if ".." in location:
        refuses(path, "outside the model's folder")
    else:
        assert numpy_helper.to_array(read_onnx(path).graph.initializer[0]).tolist() == WEIGHT.tolist()


def outside(folder):
    return [
        str(folder.parent / "secret"),
        "../secret",
        "sub/../../secret",
        "..\\secret",
        "C:\\secret",
        "",
        ".",
        "file:///etc/passwd",
    ]


@pytest.mark.parametrize("index", range(8))
def test_external_data_outside_the_folder(workplace, index):
    (workplace / "sub").mkdir()
    location = outside(workplace)[index]
    refuses(save(workplace, add_model(external(("location", location)))), "'w'", "outside the model's folder")


def test_the_last_location_counts(workplace):
    (workplace / "data.bin").write_bytes(WEIGHT.tobytes())
    weight = external(("location", "data.bin"), ("location", "../secret"))
    refuses(save(workplace, add_model(weight)), "outside the model's folder")


def test_links_are_not_followed(workplace):
    secret = workplace.parent / "secret"
    (workplace / "symlink.bin").symlink_to(secret)
    os.link(secret, workplace / "hardlink.bin")
    (workplace / "folder").symlink_to(workplace.parent)
    for location, words in (
        ("symlink.bin", "is a symbolic link"),
        ("hardlink.bin", "is a hard link"),
        ("folder/secret", "is a symbolic link"),
    ):
        refuses(save(workplace, add_model(external(("location", location)))), repr(location), words)


def test_external_data_that_is_missing_or_short(workplace):
    path = save(workplace, add_model(external(("location", "data.bin"))))
    refuses(path, "'data.bin' of 'w' is missing")
    (workplace / "data.bin").mkdir()
    refuses(path, "is missing")
    (workplace / "data.bin").rmdir()
    (workplace / "data.bin").write_bytes(WEIGHT.tobytes()[:-1])
    refuses(path, "is damaged")


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "-1"), ("offset", "99999"), ("length", "x"), ("length", "99999")]
)
def test_external_data_with_wrong_numbers(workplace, key, value):
    (workplace / "data.bin").write_bytes(WEIGHT.tobytes())
    refuses(save(workplace, add_model(external(("location", "data.bin"), (key, value)))), "is damaged")


def in_attribute(place):
    return helper.make_node("Constant", [], ["c"], value=place)


def hidden(kind, location="../secret"):
    """A model with external data where readers seldom look."""
    weight = external(("location", location))
    if kind == "attribute":
        model = add_model(tensor())
        model.graph.node.append(in_attribute(weight))
    elif kind == "function":
        body = helper.make_function(
            "d", "F", [], ["c"], [in_attribute(weight)], [helper.make_opsetid("", 18)]
        )  # fmt: skip
        model = add_model(tensor(), functions=[body])
    elif kind == "subgraph":
        model = add_model(tensor())
        branch = helper.make_graph([in_attribute(weight)], "branch", [], [])
        model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch))
    elif kind == "training":
        model = add_model(tensor())
        model.training_info.add().algorithm.initializer.append(weight)
    else:
        model = add_model(tensor())
        sparse = TensorProto(data_type=TensorProto.INT64, dims=[6], name="i")
        model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=weight, indices=sparse, dims=[2, 3]))
    return model


@pytest.mark.parametrize("kind", ["attribute", "function", "subgraph", "sparse", "training"])
def test_external_data_wherever_it_hides(workplace, kind):
    refuses(save(workplace, hidden(kind)), "outside the model's folder")


def test_external_data_that_onnx_would_not_load(workplace):
    (workplace / "data.bin").write_bytes(WEIGHT.tobytes())
    refuses(save(workplace, hidden("training", "data.bin")), "'w' cannot have external data")


def test_data_from_the_current_folder_is_not_taken_for_the_models(workplace):
    Path("data.bin").write_bytes(WEIGHT.tobytes())
    refuses(save(workplace, add_model(external(("location", "data.bin")))), "is missing")


def undescribed(value, what):
    """As some exporters write it."""
    (value if what == "type" else value.type.tensor_type).ClearField(what)
    return value


@pytest.mark.parametrize("what", ["type", "shape"])
@pytest.mark.parametrize("make", [conv_model, sru_model])
def test_an_output_without_type_or_shape_gets_what_follows_from_the_graph(make, what):
    model = make()
    expected = onnx.ValueInfoProto()
    expected.CopyFrom(model.graph.output[0])
    undescribed(model.graph.output[0], what)
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(model)
    found = read_onnx(save(Path(), model, "m.onnx")).graph.output[0].type.tensor_type
    assert found.elem_type == TensorProto.FLOAT
    sizes = [d.dim_value for d in expected.type.tensor_type.shape.dim]
    assert [d.dim_value for d in found.shape.dim] == sizes  # 0 is the open axis
    onnx.checker.check_model(read_onnx(Path("m.onnx")))


@pytest.mark.parametrize("what", ["type", "shape"])
def test_what_nobody_can_know_is_exit_4_and_not_damage(what):
    model = conv_model("Foo", "my.ops")
    undescribed(model.graph.output[0], what)
    with pytest.raises(ModelError, match=r"m\.onnx: the output 'y' has no type or shape, and none follows") as refused:
        read_onnx(save(Path(), model, "m.onnx"))
    assert refused.value.exit_code == 4
    model = conv_model()
    undescribed(model.graph.input[0], what)
    with pytest.raises(ModelError, match=r"m\.onnx: the input 'x' has no type or shape"):
        read_onnx(save(Path(), model, "m.onnx"))
