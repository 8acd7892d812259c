"""Detections out of a model's outputs, in each layout."""

from __future__ import annotations

import numpy as np
import pytest

from scconv_deploy.verification.vision.decoding import detections_in, overlaps
from scconv_deploy.verification.vision.targets import Task

SIZE = (100, 50)
NAMES = {0: "a", 1: "b"}


def found(outputs, **task):
    return detections_in(outputs, 0, Task("detect", NAMES, **task) if task is not None else None, SIZE)


def test_output0_of_a_detector_is_suppressed_within_a_class():
    boxes = np.array([[20, 20, 10, 10], [20, 20, 10, 8], [50, 20, 10, 10], [70, 20, 10, 10], [20, 20, 9, 10]], float)
    scores = np.array([[0.9, 0.3], [0.8, 0], [0.0005, 0.5], [0, 0], [0, 0.7]])
    result = found({"output0": np.concatenate([boxes, scores], 1).T[None].astype(np.float32)})
    # row 1 is suppressed by row 0 (IoU 0.8), row 0's other class by row 4 (0.9); 0.0005 is too low
    np.testing.assert_allclose(result.scores, [0.9, 0.7, 0.5], rtol=1e-6)
    assert result.classes.tolist() == [0, 1, 1]
    np.testing.assert_allclose(result.boxes[0], [15, 15, 25, 25])


def test_the_best_300_are_kept():
    boxes = np.stack([np.arange(400) * 20.0, np.zeros(400), np.full(400, 10.0), np.full(400, 10.0)])
    scores = np.stack([np.linspace(0.9, 0.1, 400), np.zeros(400)])
    result = found({"output0": np.concatenate([boxes, scores])[None]})
    np.testing.assert_allclose(result.scores, scores[0, :300])


def test_output0_with_a_score_of_the_box():
    rows = np.array([[[20, 20, 10, 10, 0.5, 0.8, 0.1]] + [[0] * 7] * 9])
    result = found({"output0": rows})
    np.testing.assert_allclose(result.scores, [0.4, 0.05])
    assert result.classes.tolist() == [0, 1]


def test_rows_that_the_model_selected():
    rows = np.array([[[1, 2, 3, 4, 0.5, 1], [1, 2, 3, 4, 0.9, 0], [0, 0, 0, 0, 0, 0]]])
    result = found({"output0": rows}, end_to_end=True)
    assert (result.scores.tolist(), result.classes.tolist()) == ([0.9, 0.5], [0, 1])
    assert result.boxes.tolist() == [[1, 2, 3, 4]] * 2


def test_boxes_in_parts_of_the_image():
    rows = np.array([[[0.5, 0.5, 0.2, 0.4, 0.3, 0.6]]])
    result = found({"output0": rows}, head="RTDETRDecoder")
    np.testing.assert_allclose(result.boxes, [[40, 15, 60, 35]])
    assert (result.scores.tolist(), result.classes.tolist()) == ([0.6], [1])


def test_named_outputs():
    outputs = {
        "boxes": np.array([[[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 0]]], float), "scores": np.array([[0.2, 0.4, 0]]),
        "labels": np.array([[3, 1, -1]]),
    }  # fmt: skip
    result = detections_in(outputs, 0, None, SIZE)
    assert (result.boxes.tolist(), result.classes.tolist()) == ([[5, 6, 7, 8], [1, 2, 3, 4]], [1, 3])


@pytest.mark.parametrize("outputs", [{}, {"output0": np.zeros((1, 5, 9))}, {"output0": np.zeros((1, 6))}])
def test_an_unknown_layout(outputs):
    assert found(outputs) is None
    assert detections_in(outputs, 0, None, SIZE) is None


def test_boxes_that_are_not_finite_are_no_detections():
    rows = np.array([[[1, 2, 3, np.nan, 0.5, 1], [1, 2, 3, 4, np.inf, 0]]])
    assert len(found({"output0": rows}, end_to_end=True).scores) == 0


def test_overlaps_by_hand():
    box = np.array([0.0, 0, 10, 10])
    others = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [3, 3, 3, 3]], float)
    np.testing.assert_allclose(overlaps(box, others), [1, 1 / 3, 0, 0])
