"""Checkpoints of ultralytics: recognised, fused, with the outputs of their own exporter, and no trace in the heads."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.model.inputs import DynamicAxis, InputSpec
from scconv_deploy.model.load import load, load_with_record
from scconv_deploy.model.prepare import reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.model.yolo import checkpoint_of, heads_of, is_yolo
from scconv_deploy.workflows.export import ExportOptions, export_spec
from tests import yolo
from tests.command_line import failed, run

IMAGE = (1, 3, 32, 32)


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def spec(value, **options):
    torch.save(value, "best.pt")
    return ModelSpec("best.pt", trust_checkpoint=True, **options)


def image(batch=1, seed=1):
    return torch.rand((batch, *IMAGE[1:]), generator=torch.Generator().manual_seed(seed))


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def first(found):
    return found if isinstance(found, torch.Tensor) else first(found[0])


def trained(head=yolo.Detect, kind=yolo.DetectionModel, **options):
    """A model as its checkpoint gives it back: rounded to half."""
    return yolo.model(kind, head=head, **options).half().float()


# --- recognition ------------------------------------------------------------------------------------------------


def test_what_a_checkpoint_says():
    _, record = load_with_record(spec(yolo.checkpoint(imgsz=33)))
    said = record.checkpoint
    assert (said.task, said.head, said.stride, said.channels) == ("detect", "Detect", 4, 3)
    assert said.image_size == (36, 36)  # whole strides
    assert record.inputs == (InputSpec((1, 3, 36, 36)),)
    assert said.names == {0: "red", 1: "green", 2: "blue"}
    assert (said.end_to_end, said.letterboxed, said.keypoints) == (False, True, ())


@pytest.mark.parametrize(
    ("file", "size"),
    [
        ({"train_args": {"imgsz": [64, 96]}}, (64, 96)),
        ({"opt": {"imgsz": 128}}, (128, 128)),  # YOLOv5
        ({"train_args": {"imgsz": "large"}, "opt": {"img_size": 96}}, (96, 96)),
        ({}, (640, 640)),
    ],
)
def test_the_image_size_of_training(file, size):
    assert checkpoint_of(yolo.model(), file).image_size == size


def test_the_image_size_of_a_module_that_was_pickled_alone():
    model = yolo.model()
    model.args = {"imgsz": 64}
    assert load_with_record(spec(model))[1].checkpoint.image_size == (64, 64)


@pytest.mark.parametrize(
    ("head", "task"),
    [
        (yolo.Detect, "detect"), (yolo.Segment, "segment"), (yolo.Pose, "pose"), (yolo.Classify, "classify"),
        (yolo.Gridded, "detect"),
    ],
)  # fmt: skip
def test_the_task_by_the_head_where_the_model_does_not_say_it(head, task):
    assert checkpoint_of(yolo.model(head=head, task=None), {}).task == task


def test_names_in_a_list_and_none():
    model = yolo.model()
    model.names = ["a", "b", "c"]
    assert checkpoint_of(model, {}).names == {0: "a", 1: "b", 2: "c"}
    model.names = None
    assert checkpoint_of(model, {}).names == {0: "class0", 1: "class1", 2: "class2"}


def test_other_modules_are_none_of_theirs():
    other = yolo.model()
    del other.model[1].f
    for module in (nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 3, 1)), other, None):
        assert not is_yolo(module)
    assert checkpoint_of(yolo.model(task="depth"), {}) is None


def test_the_moving_average_is_taken_as_theirs_does():
    average, last = yolo.model(seed=3).half(), yolo.model(seed=4).half()
    model, _ = load_with_record(spec(yolo.checkpoint(ema=average, model=last)))
    chosen, _ = load_with_record(spec(yolo.checkpoint(ema=average, model=last), weights_key="model"))
    for found, wanted in ((model, average), (chosen, last)):
        assert torch.equal(found.model[-1].cv.weight, wanted.model[-1].cv.weight.float())


# --- preparation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "task"),
    [
        (yolo.Detect, "detect"), (yolo.Segment, "segment"), (yolo.Pose, "pose"), (yolo.Classify, "classify"),
        (yolo.Selecting, "detect"), (yolo.Gridded, "detect"),
    ],
)  # fmt: skip
def test_outputs_are_those_of_their_exporter(head, task):
    plain = trained(head, task=task)
    expected = outputs(plain, image(2))
    model, record = load_with_record(spec(yolo.checkpoint(plain)))
    found = outputs(model, images := image(2))
    assert list(found) == (["output0", "output1"] if task == "segment" else ["output0"])
    torch.testing.assert_close(found["output0"], first(expected), rtol=1e-4, atol=1e-4)
    if task == "segment":
        torch.testing.assert_close(found["output1"], expected[0][1], rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert record.skipped == ()
    assert "batch norms folded by its own fuse()" in record.applied
    assert torch.equal(outputs(model, images)["output0"], found["output0"])


def test_paths_and_class_are_the_checkpoints_own():
    plain, (model, _) = trained(), load_with_record(spec(yolo.checkpoint()))
    names = {name for name, _ in plain.named_modules() if not name.endswith(".bn")}
    assert {name for name, _ in model.named_modules()} == names
    assert isinstance(model, yolo.DetectionModel)
    assert type(model).__name__ == "DetectionModel"


def test_a_call_leaves_nothing_in_the_heads():
    for head in (yolo.Detect, yolo.Gridded):
        model = load(spec(yolo.checkpoint(yolo.model(head=head))))
        (found,) = heads_of(model)
        before = copy.deepcopy(vars(found))
        outputs(model, torch.rand(3, 3, 64, 64))
        assert before.keys() == vars(found).keys()
        assert vars(found).get("shape") is None
        assert torch.equal(found.anchors, before.get("anchors", found.anchors))
        assert [grid.shape for grid in before.get("grid", [])] == [grid.shape for grid in vars(found).get("grid", [])]


def test_sizes_that_a_head_kept_from_its_training_do_not_count():
    plain = yolo.model()
    outputs(plain, image(2))  # the last batch of its validation
    assert plain.model[-1].shape is not None
    model = load(spec(yolo.checkpoint(plain)))
    assert model.model[-1].shape is None


def test_raw_outputs_are_all_that_the_model_returns():
    expected = outputs(trained(), image())
    model, record = load_with_record(spec(yolo.checkpoint(), raw_outputs=True))
    y, maps = outputs(model, image())
    torch.testing.assert_close(y, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps[0], expected[1][0], rtol=1e-4, atol=1e-4)
    assert record.skipped == ()


@pytest.mark.parametrize("head", [yolo.RawMaps, yolo.BrokenExport])
def test_a_flag_that_means_something_else_is_not_set(head):
    expected = outputs(trained(head), image())
    model, record = load_with_record(spec(yolo.checkpoint(yolo.model(head=head))))
    found = outputs(model, image())
    assert list(found) == ["output0"]
    torch.testing.assert_close(found["output0"], expected[0], rtol=1e-4, atol=1e-4)
    assert record.skipped == (
        (
            "export flag",
            "the head has none that works; the second of its two outputs, which training needs, was left out",
        ),
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (yolo.UnfusableModel, "it raised AttributeError: 'ScConv' object has no attribute 'bn'"),
        (yolo.WronglyFusedModel, "what it makes computes something else"),
    ],
)
def test_a_fork_whose_fuse_fails_is_exported_as_it_is(kind, words):
    expected = outputs(trained(kind=kind), image())
    model, record = load_with_record(spec(yolo.checkpoint(yolo.model(kind))))
    assert torch.equal(outputs(model, image())["output0"], expected[0])
    ((what, why),) = record.skipped
    assert what == "fuse()"
    assert why.startswith(words)
    assert why.endswith("the model was exported as it is")


# --- what does not fit ------------------------------------------------------------------------------------------


def test_raw_outputs_of_another_model():
    with pytest.raises(UsageError, match=r"--raw-outputs: scconv_resnet20 is no ultralytics checkpoint.*Leave it out"):
        load(ModelSpec("scconv_resnet20", raw_outputs=True))


@pytest.mark.parametrize("inputs", [[(1, 3, 32)], [IMAGE, IMAGE]])
def test_inputs_that_are_no_image(inputs):
    with pytest.raises(UsageError, match=r"takes one image, found --input 1x3x32.*for example --input 1x3x32x32"):
        load(spec(yolo.checkpoint(), inputs=tuple(map(InputSpec, inputs))))


def test_an_image_that_the_model_refuses():
    with pytest.raises(
        ModelError, match=r"best.pt refuses its input \(1x4x32x32\).*trained on 1x3x32x32; sizes are mult"
    ):
        load(spec(yolo.checkpoint(), inputs=(InputSpec((1, 4, 32, 32)),)))


def test_the_fork_that_trained_it_is_found_by_path(monkeypatch):
    Path("fork").mkdir()
    source = Path(yolo.__file__).read_text()
    Path("fork/forked_yolo.py").write_text(source)
    monkeypatch.syspath_prepend("fork")
    import forked_yolo

    best = spec(forked_yolo.checkpoint())
    monkeypatch.delitem(sys.modules, "forked_yolo")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "fork" not in p])
    with pytest.raises(
        ModelError, match=r"needs the module forked_yolo, which cannot be imported\. Give .*--path FOLDER; or"
    ):
        load(best)
    model = load(ModelSpec("best.pt", trust_checkpoint=True, paths=(Path("fork").resolve(),)))
    assert type(model).__module__ == "forked_yolo"
    monkeypatch.delitem(sys.modules, "forked_yolo")
    Path("fork/forked_yolo.py").write_text(source.replace("class Bottleneck", "class Renamed"))
    shutil.rmtree("fork/__pycache__", ignore_errors=True)
    with pytest.raises(ModelError, match=r"needs the class Bottleneck of forked_yolo, and the one that was imported"):
        load(ModelSpec("best.pt", trust_checkpoint=True, paths=(Path("fork").resolve(),)))


# --- in ONNX ----------------------------------------------------------------------------------------------------


def test_an_export_with_open_batch_and_sizes():
    """The graph holds for other sizes than those that a head has seen, and the file has their metadata."""
    opened = (DynamicAxis.parse_batch("1:2:3"), DynamicAxis.parse("images:2=32:32:36:4"))
    best = spec(yolo.checkpoint(), dynamic=opened)
    export_spec(best, Path("model.onnx"), ExportOptions())
    proto = onnx.load("model.onnx")
    assert [i.name for i in proto.graph.input] == ["images"]
    assert [o.name for o in proto.graph.output] == ["output0"]
    session = onnxruntime.InferenceSession("model.onnx")
    reference, _ = reference_from_spec(best)
    for batch, height in ((1, 32), (3, 36)):
        x = torch.rand((batch, 3, height, 32), generator=torch.Generator().manual_seed(5))
        expected = outputs(reference.model, x)["output0"]
        (found,) = session.run(None, {"images": x.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert metadata["names"] == "{0: 'red', 1: 'green', 2: 'blue'}"
    assert metadata["args"] == "{'batch': 2, 'half': False, 'dynamic': True, 'simplify': True, 'nms': False}"
    wanted = {
        "task": "detect", "stride": "4", "imgsz": "[32, 32]", "batch": "2", "channels": "3", "head": "Detect",
        "end2end": "False", "date": "2026-01-02T03:04:05", "version": "8.4.0", "license": "AGPL-3.0 License",
        "docs": "https://docs.ultralytics.com",
        "description": "Ultralytics YOLOv8n-scconv model trained on coco8.yaml",
    }  # fmt: skip
    assert wanted.items() <= metadata.items()
    assert not any("somebody" in value for value in metadata.values())


def test_keypoints_are_in_the_metadata():
    said = checkpoint_of(yolo.model(head=yolo.Pose, task="pose"), {})
    assert said.metadata((1, 3, 64, 64), False)["kpt_shape"] == "[2, 3]"


# --- on the command line ----------------------------------------------------------------------------------------


def test_the_command_line_needs_no_input():
    torch.save(yolo.checkpoint(), "best.pt")
    failed(run("inspect", "best.pt"), 7, "reading it would execute code")
    shown = run("inspect", "best.pt", "--trust-checkpoint", "--json")
    assert shown.exit_code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["inputs"] == ["1x3x32x32"]
    assert [sru["site"] for sru in found["srus"]] == ["model.2.cv2.SRU"]
    assert "an ultralytics checkpoint: task detect, head Detect" in found["stages"][0]["applied"]
    failed(run("inspect", "scconv_resnet20", "--raw-outputs"), 2, "--raw-outputs: scconv_resnet20 is no ultralytics")
    failed(run("inspect", "best.pt", "--path", "nowhere"), 2, "--path nowhere does not exist")
