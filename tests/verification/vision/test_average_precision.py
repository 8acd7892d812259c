"""mAP against numbers made by hand, and the resamples' sums against pycocotools'."""

from __future__ import annotations

import numpy as np
import pytest

from scconv_deploy.verification.vision import average_precision
from scconv_deploy.verification.vision.average_precision import Side, match
from scconv_deploy.verification.vision.decoding import Detections


def side(*images):
    """A side of images, each (boxes, scores, classes) and (objects, their classes, crowd)."""
    found = Side()
    for number, ((boxes, scores, classes), (objects, kinds, crowd)) in enumerate(images):
        detections = Detections.of(
            np.array(boxes, float).reshape(-1, 4), np.array(scores, float), np.array(classes, int)
        )
        truth = np.array(objects, float).reshape(-1, 4)
        found.add(match(number, detections, truth, np.array(kinds, int), np.array(crowd, bool)))
    return found


def by_hand(half_right):
    """Two objects: one found exactly, then a false one, then the other at an IoU of 0.62 (3 of the 10 limits)."""
    return (51 + 50 * 2 / 3) / 101 * half_right + 51 / 101 * (1 - half_right)


TWO = ([[0, 0, 10, 10], [50, 50, 60, 60], [20, 0, 26.2, 10]], [0.9, 0.8, 0.7], [0, 0, 0])
OBJECTS = ([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 0], [0, 0])


def test_by_hand():
    found = side((TWO, OBJECTS))
    assert found.precision() == pytest.approx(by_hand(0.3), abs=1e-12)
    assert found.objects == 2


def test_classes_count_alike_and_those_without_objects_do_not():
    boxes, scores, _ = TWO
    found = side(((boxes, scores, [0, 5, 0]), ([*OBJECTS[0], [80, 0, 90, 10]], [0, 0, 1], [0, 0, 0])))
    first = (0.3 * 101 + 0.7 * 51) / 101  # without the false one, which is of a class that no object has
    assert found.precision() == pytest.approx((first + 0) / 2, abs=1e-12)


def test_a_crowd_counts_neither_way():
    found = side((TWO, ([*OBJECTS[0], [48, 48, 62, 62]], [0, 0, 0], [0, 0, 1])))
    assert found.precision() == pytest.approx((0.3 * 101 + 0.7 * 51) / 101, abs=1e-12)


def test_nothing_found_and_nothing_there():
    nothing = ([], [], [])
    assert side((nothing, OBJECTS)).precision() == 0
    assert np.isnan(side((TWO, nothing)).precision())


@pytest.mark.parametrize("at_once", [1, average_precision._AT_ONCE])
def test_resamples_are_pycocotools_numbers_of_the_images_drawn(monkeypatch, at_once):
    monkeypatch.setattr(average_precision, "_AT_ONCE", at_once)
    rng = np.random.default_rng(5)
    images = []
    for _ in range(6):
        corners = rng.uniform(0, 50, (5, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5, 20, (5, 2))], axis=1)
        objects = boxes[:3] + rng.normal(0, 1, (3, 4))
        detections = boxes, rng.uniform(0.1, 1, 5), rng.integers(0, 3, 5)
        images.append((detections, (objects, rng.integers(0, 3, 3), [0, 0, rng.integers(2)])))
    drawn = np.array([[1, 1, 1, 1, 1, 1], [2, 0, 1, 0, 3, 0], [0, 0, 0, 0, 0, 6]])
    found = side(*images).resampled(drawn)
    for times, value in zip(drawn, found, strict=True):
        expected = side(*[image for image, n in zip(images, times, strict=True) for _ in range(n)]).precision()
        assert value == pytest.approx(expected, abs=1e-9)
    assert len(set(found)) == 3
