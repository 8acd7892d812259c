"""An ultralytics checkpoint on labelled images, end to end: mAP, its interval, and pictures in the report."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from scconv_deploy.model.prepare import reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records.accuracy import Accuracy
from scconv_deploy.records.codec import decode
from scconv_deploy.records.stage import StageLog
from scconv_deploy.report.html import html_page
from scconv_deploy.report.markdown import to_markdown
from scconv_deploy.report.render import to_text
from scconv_deploy.verification.costs import CostMeter
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from scconv_deploy.verification.options import Checks
from scconv_deploy.verification.vision.decoding import detections_in
from scconv_deploy.verification.vision.targets import Task
from scconv_deploy.workflows.calibrate import CalibrationOptions, Rows
from scconv_deploy.workflows.export import ExportOptions, export_spec
from tests import data_sets, yolo
from tests.command_line import failed, run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, its ONNX file, and a data set whose labels are the model's own best detections."""
    folder = tmp_path_factory.mktemp("detection")
    torch.save(yolo.checkpoint(), folder / "best.pt")
    spec = ModelSpec(str(folder / "best.pt"), trust_checkpoint=True)
    export_spec(spec, folder / "model.onnx", ExportOptions())
    data_sets.ultralytics(folder / "set")
    reference, _ = reference_from_spec(spec)
    task = Task("detect", reference.checkpoint.names)
    for number, sample in enumerate(Checks(data=str(folder / "set")).samples(reference, 0)[1]):
        found = reference.signature.call(reference.model, sample.tensors)
        best = detections_in({n: v.numpy() for n, v in found.items()}, 0, task, (32, 32))[:4]
        boxes = sample.labels[0].placement.in_image(best.boxes) / np.tile(data_sets.SIZES[number], 2)
        rows = np.concatenate(
            [best.classes[:, None], (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1
        )
        text = "".join(f"{int(row[0])} " + " ".join(f"{v:.6f}" for v in row[1:]) + "\n" for row in rows)
        (folder / "set" / "labels" / "val" / f"{number}.txt").write_text(text)
    (folder / "set" / "labels" / "val" / "1.txt").unlink()
    return folder


@pytest.fixture(autouse=True)
def _workplace(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])


def damaged(model):
    """A copy with the centres of all boxes off by 8 pixels."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    last = [node for node in copy.graph.node if node.op_type == "Conv"][-1]
    bias = next(one for one in copy.graph.initializer if one.name == last.input[2])
    values = numpy_helper.to_array(bias).copy()
    values[:2] += 2.0
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    return copy


def judged(place, artifact):
    reference, _ = reference_from_spec(ModelSpec("best.pt", trust_checkpoint=True))
    samples = Checks(data="set/data.yaml").samples(reference, 0)[1]
    return verify_onnx(reference, Artifact(artifact, "model.onnx", b""), samples, StageLog())


def test_a_healthy_artifact_detects_the_same(place):
    report = judged(place, onnx.load("model.onnx"))
    found = report.accuracy
    assert report, report.failures
    assert (found.metric, found.samples, found.difference, found.background) == ("mAP50-95", 3, 0, 1)
    assert found.reference > 0.2
    assert (found.low, found.high, found.examples) == (0, 0, ())


def test_a_damaged_artifact_is_seen_in_number_and_picture(place, drawn_pictures):
    report = judged(place, damaged(onnx.load("model.onnx")))
    found = report.accuracy
    assert not report
    assert found.difference < -0.2
    assert found.low <= found.difference <= found.high
    assert found.examples[0].reference != found.examples[0].artifact
    line = f"mAP50-95 on 3 samples: reference {found.reference:.2%}, artifact {found.artifact:.2%}"
    assert line in to_text(report)
    assert "1 image has no label file and count as background" in to_text(report)
    assert line in to_markdown(report)
    page = html_page(report)
    assert "<h2>mAP50-95</h2>" in page
    assert page.count("data:image/png;base64") == len(found.examples)
    assert decode(Accuracy, json.loads(report.as_bytes())["accuracy"]) == found


def test_costs_of_a_file_alone_are_in_map(place):
    model = onnx.load("model.onnx")
    rows = Rows(model, CalibrationOptions("set"))
    reference, _ = reference_from_spec(ModelSpec("best.pt", trust_checkpoint=True))
    samples = Checks(data="set").samples(reference, 0)[1]
    for batch, sample in zip(rows.batches(None), samples, strict=True):  # letterboxed as the file's metadata say
        np.testing.assert_array_equal(batch.inputs["images"], sample.tensors["images"].numpy())
    meter = CostMeter(model, lambda: rows.batches(None), lambda _: None)
    costs = meter.measure({"same": lambda: model, "damaged": lambda: damaged(model)})
    assert costs["same"].drop == 0
    assert costs["damaged"].drop > 0.2


def test_the_command_line_names_what_is_wrong(place):
    data_sets.coco(place / "coco", names=("red", "green", "cat"))
    path = "coco/annotations/instances_val.json"
    result = run("inspect", "best.pt", "--trust-checkpoint", "--data", path)
    failed(result, 2, "class 2 is 'cat'; the model's is 'blue'")
