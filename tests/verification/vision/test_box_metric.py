"""The paired metric: identical sides, a side that lost a box, the seeded interval, and the examples."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from scconv_deploy.verification.accuracy import PairedMetric
from scconv_deploy.verification.vision.bootstrap import images_needed
from scconv_deploy.verification.vision.box_metric import BoxMetric, disagreement
from scconv_deploy.verification.vision.decoding import Detections
from scconv_deploy.verification.vision.targets import Boxes, Placement, labels_of

PLACE = Placement((20, 20), (40, 40), (2.0, 2.0), (0, 0))
BOX = [2.0, 2, 10, 10]


def target(file, boxes=(BOX,), annotated=True):
    boxes = np.array(boxes, float).reshape(-1, 4)
    return Boxes(file, PLACE, boxes, np.zeros(len(boxes), int), np.zeros(len(boxes), bool), BoxMetric, annotated)


def outputs(*scores):
    """One box exactly on the object, in the input's pixels, with this score in each image."""
    return {
        "boxes": np.array([[np.multiply(BOX, 2)] for _ in scores]),
        "scores": np.array(scores)[:, None], "labels": np.zeros((len(scores), 1), int),
    }  # fmt: skip


@pytest.fixture
def file(tmp_path):
    Image.new("RGB", (20, 20), (200, 30, 30)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def paired(reference, artifact, labels):
    metric = PairedMetric()
    for row, label in enumerate(labels):
        first, second = ({n: v[row : row + 1] for n, v in side.items()} for side in (reference, artifact))
        metric.add(first, second, labels_of(label))
    return metric


def test_the_same_detections_differ_by_nothing(file):
    sides = outputs(0.9, 0.8)
    found = paired(sides, sides, [target(file), target(file)]).with_examples()
    assert (found.metric, found.samples, found.reference, found.artifact) == ("mAP50-95", 2, 1.0, 1.0)
    assert (found.difference, found.low, found.high, found.examples, found.note) == (0, 0, 0, (), "")


def test_lost_objects_and_the_interval(file):
    lost = outputs(*[0.9] * 6, 0, 0)
    metric = paired(outputs(*[0.9] * 8), lost, [target(file)] * 8)
    found = metric.accuracy()
    # three quarters of the objects: 76 of 101 recalls are reached
    assert (found.reference, found.artifact) == (1.0, pytest.approx(76 / 101))
    # of 8 draws, each lost with a chance of 1/4, 2.5 and 97.5 % of the binomial distribution lose 0 and 5
    assert (found.low, found.high) == (pytest.approx(38 / 101 - 1, abs=0.13), 0.0)
    again = paired(outputs(*[0.9] * 8), lost, [target(file)] * 8).accuracy()
    assert again == found
    assert metric.rows_needed(0.3) == images_needed(8, found.difference, found.low, 0.3) > 8
    assert metric.rows_needed(0.2) is None  # the drop itself is larger


def test_how_many_images_a_budget_needs():
    assert images_needed(100, -0.01, -0.03, 0.02) == 400  # half the width takes four times as many
    assert images_needed(100, 0.0, -0.01, 0.02) == 100
    assert images_needed(100, -0.02, -0.03, 0.02) is None


def test_background_and_rows_that_do_not_count(file):
    metric = PairedMetric()
    labels = np.array([target(file), target(file, (), annotated=False), None], dtype=object)
    metric.add(outputs(0.9, 0, 0.9), outputs(0.9, 0, 0), labels)
    found = metric.accuracy()
    assert (found.samples, found.difference) == (2, 0)
    assert found.note == "1 image has no label file and count as background"


def test_without_an_object_there_is_no_number(file):
    found = paired(outputs(0.9), outputs(0.9), [target(file, ())])
    assert (found.accuracy(), found.reason) == (None, "no image shows an object")


def test_outputs_that_are_no_boxes(file):
    metric = paired({"y": np.zeros((1, 4))}, {"y": np.zeros((1, 4))}, [target(file)])
    assert metric.accuracy() is None
    assert "no outputs are boxes, scores and labels" in metric.reason


def test_examples_are_the_images_that_differ_most(file):
    reference, artifact = outputs(0.9, 0.9, 0.9, 0.9, 0.9), outputs(0.9, 0.5, 0.1, 0.7, 0.8)
    found = paired(reference, artifact, [target(file)] * 5).with_examples()
    assert [example.artifact[0].score if example.artifact else None for example in found.examples] == [None, 0.5, 0.7]
    first = found.examples[0]
    assert (first.name, first.reference[0].label, first.reference[0].score) == ("a.png", "0", 0.9)
    assert [getattr(first.reference[0], side) for side in ("left", "top", "right", "bottom")] == BOX
    with Image.open(io.BytesIO(base64.b64decode(first.jpeg))) as image:
        assert image.size == (20, 20)
        np.testing.assert_allclose(image.getpixel((5, 5)), (200, 30, 30), atol=6)


def test_parts_of_the_data_merge_to_the_same(file):
    sides = outputs(0.9, 0.9, 0.9, 0.9, 0.9), outputs(0.9, 0.5, 0.1, 0.7, 0.1)
    labels = [target(file), target(file, ([3, 3, 9, 9],)), target(file), target(file, (), False), target(file)]
    whole = paired(*sides, labels)
    parts = PairedMetric()
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        parts.merge(paired(*({n: v[rows] for n, v in side.items()} for side in sides), labels[rows]))
    assert parts.with_examples() == whole.with_examples()
    assert whole.accuracy().difference < 0


def test_disagreement_by_hand():
    def detections(boxes, scores, classes):
        return Detections.of(np.array(boxes, float).reshape(-1, 4), np.array(scores), np.array(classes))

    one = detections([[0, 0, 10, 10], [50, 0, 60, 10]], [0.9, 0.3], [0, 0])
    other = detections([[0, 0, 10, 8], [50, 0, 60, 10], [0, 0, 5, 5]], [0.8, 0.4, 0.1], [0, 1, 0])
    # 0.1 of the score and 0.2 of the box; 0.3 and 0.4 of a box of another class; 0.1 is not shown
    assert disagreement(one, other) == pytest.approx(0.1 + 0.2 + 0.3 + 0.4)
