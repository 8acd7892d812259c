"""An ONNX file against another."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from scconv_deploy.errors import UsageError
from scconv_deploy.precision.half import HalfOptions
from scconv_deploy.verification.reference.onnx_file import NamedArrays, OnnxReference
from scconv_deploy.workflows.convert import convert_onnx
from scconv_deploy.workflows.subject import OnnxFile
from scconv_deploy.workflows.verify import verify_subject
from tests.verification.judging import check_of, damage_weight, edit_body


@pytest.fixture
def files(tiny_bytes, tmp_path):
    for name in ("reference.onnx", "artifact.onnx"):
        (tmp_path / name).write_bytes(tiny_bytes[0])
    return tmp_path / "artifact.onnx", tmp_path / "reference.onnx"


def damaged(path, damage):
    model = onnx.load(path)
    damage(model)
    onnx.save(model, path)


def test_equal_files_pass(files):
    report = verify_subject(*map(OnnxFile, files))
    assert report, report.failures
    assert report.links[0].status == "not run"
    assert [sru.free_running.flips for sru in report.srus] == [0] * 4
    assert [sru.teacher_forced.gates for sru in report.srus] == [(2 + 67) * 16 * 8 * 8] * 4  # batches of 2 and 67
    assert all(output.floor_measured for output in report.outputs)
    assert all(2**-24 <= output.noise_floor < 1e-6 for output in report.outputs)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: damage_weight(m, 1e-3), "replay error"),
        (lambda m: edit_body(m, "GreaterOrEqual (", "Less ("), "unexplained"),
    ],
)
def test_damage_is_caught(files, damage, words):
    damaged(files[0], damage)
    report = verify_subject(*map(OnnxFile, files))
    assert not report
    assert words in " ".join(report.failures)


def test_a_missing_reference(files, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        verify_subject(OnnxFile(files[0]), OnnxFile(tmp_path / "none.onnx"))


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_file_is_the_users(files, missing):
    files[missing].unlink()
    with pytest.raises(UsageError, match=f"{files[missing].name} does not exist"):
        verify_subject(*map(OnnxFile, files))


def saved(path, nodes, inputs, constants, output="y"):
    """A file of opset 18 with one float output of any shape."""
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def scaled(path, name, factor):
    """The file with a constant scaled, under another name."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name.startswith(name))
    value = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((value * factor).astype(value.dtype), tensor.name))
    found = path.with_name(f"scaled_{path.name}")
    onnx.save(model, found)
    return found


IMAGE = {"x": (TensorProto.FLOAT, [2, 3, 16, 16])}


def thresholded(path):
    """Convolution, what of it is above 0.1 (with a jump of one), convolution."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        helper.make_node("Greater", ["a", "t"], ["above"]),
        helper.make_node("Cast", ["above"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a", "mask"], ["kept"]),
        helper.make_node("Add", ["kept", "mask"], ["jumped"]),
        helper.make_node("Conv", ["jumped", "v"], ["y"], pads=[1] * 4),
    ]
    constants = {
        "w": rng.normal(size=(8, 3, 3, 3)), "v": rng.normal(size=(4, 8, 3, 3)), "t": np.float64(0.1),
    }  # fmt: skip
    return saved(path, nodes, IMAGE, {name: value.astype(np.float32) for name, value in constants.items()})


def test_the_noise_is_measured_with_the_gates_of_no_sru_fixed_too(tmp_path):
    """Left free they flip in half, and the floor is their jumps': 2% of a convolution's weights would be within it."""
    reference = thresholded(tmp_path / "single.onnx")
    convert_onnx(reference, tmp_path / "half.onnx", HalfOptions("fp16"))
    healthy = verify_subject(OnnxFile(tmp_path / "half.onnx"), OnnxFile(reference))
    assert healthy, healthy.failures
    assert all(2**-11 <= output.noise_floor < 4 * 2**-11 for output in healthy.outputs)
    damaged_report = verify_subject(OnnxFile(scaled(tmp_path / "half.onnx", "v", 1.02)), OnnxFile(reference))
    assert "replay error" in " ".join(damaged_report.failures)


def renamed(path):
    """The file with other names inside."""
    model = onnx.load(path)
    outside = {value.name for value in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name if name in outside or not name else f"other_{name}" for name in names]
    for tensor in model.graph.initializer:
        tensor.name = f"other_{tensor.name}"
    del model.graph.value_info[:]
    found = path.with_name(f"renamed_{path.name}")
    onnx.save(model, found)
    return found


def test_a_half_file_with_other_names_inside_is_judged_by_what_rounding_costs(tmp_path):
    """Which values it rounds cannot be told; float32's noise, and a unit of half, would be a false alarm."""
    rng, shapes = np.random.default_rng(0), {"w0": (8, 3, 3, 3)} | {f"w{i}": (8, 8, 3, 3) for i in range(1, 8)}
    nodes = [
        helper.make_node("Conv", ["x" if i == 0 else f"a{i}", f"w{i}"], ["y" if i == 7 else f"a{i + 1}"], pads=[1] * 4)
        for i in range(8)
    ]
    weights = {name: rng.normal(size=shape).astype(np.float32) * np.float32(0.1) for name, shape in shapes.items()}
    reference = saved(tmp_path / "single.onnx", nodes, IMAGE, weights)
    convert_onnx(reference, tmp_path / "half.onnx", HalfOptions("fp16"))
    other = renamed(tmp_path / "half.onnx")
    report = verify_subject(OnnxFile(other), OnnxFile(reference))
    assert report, report.failures
    assert {check_of(report, name).status for name in ("replay", "rounding")} == {"not run", "passed"}
    assert [output.name for output in report.outputs] == ["y"]
    assert "rounding costs" in " ".join(
        verify_subject(OnnxFile(scaled(other, "other_w7", 1.2)), OnnxFile(reference)).failures
    )


def in_branches(value):
    """If, with a constant condition: a product of a value from outside, or the value."""
    done, other = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("done", "other"))
    then = helper.make_graph([helper.make_node("MatMul", [value, "w"], ["done"])], "then", [], [done])
    otherwise = helper.make_graph([helper.make_node("Identity", [value], ["other"])], "else", [], [other])
    return helper.make_node("If", ["true"], ["chosen"], then_branch=then, else_branch=otherwise)


@pytest.mark.parametrize(
    ("nodes", "measured"),
    [
        ([helper.make_node("Gather", ["words", "index"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])], True),
        (
            [
                helper.make_node("Gather", ["words", "index"], ["a"]),
                in_branches("a"),
                helper.make_node("MatMul", ["chosen", "w"], ["y"]),
            ],
            True,
        ),
        ([helper.make_node("Gather", ["words", "index"], ["y"])], False),
    ],
    ids=["words", "captured by If", "nothing moved"],
)
def test_the_noise_of_numbers_of_words(tmp_path, nodes, measured):
    rng = np.random.default_rng(0)
    constants = {name: rng.normal(size=(9, 9)).astype(np.float32) for name in ("words", "w")} | {"true": np.array(True)}
    path = saved(tmp_path / "m.onnx", nodes, {"index": (TensorProto.INT64, [5])}, constants)
    source = OnnxReference("m", onnx.load(path))
    floor = source.run(NamedArrays("x", {"index": np.arange(5)})).floors["y"]
    assert (2.0**-27 < floor < 1e-6) if measured else floor is None
