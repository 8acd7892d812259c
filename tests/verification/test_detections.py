"""Rows that rounding swaps are put side by side, and no others."""

import numpy as np

from scconv_deploy.records.tolerances import ALL
from scconv_deploy.verification.detections import align_rows


def detections(scores, labels, corners):
    boxes = np.stack([np.full(4, c, np.float32) for c in corners])
    return {
        "boxes": boxes[None],
        "scores": np.float32(scores)[None],
        "labels": np.int64(labels)[None],
        "count": np.int64([len(scores)]),
    }


def swapped(found, rows):
    return {name: value if name == "count" else value[:, rows] for name, value in found.items()}


def assert_same(actual, expected):
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def test_a_tie_that_changed_places_is_put_back():
    tie = ALL["equal_scores"].value / 2
    reference = detections([0.9, 0.5 + tie, 0.5, 0.0], [1, 2, 3, -1], [1, 2, 3, 0])
    actual = swapped(reference, [0, 2, 1, 3])
    assert_same(align_rows(actual, reference), reference)
    assert_same(actual, swapped(reference, [0, 2, 1, 3]))  # not in place


def test_two_of_one_class_are_told_apart_by_their_boxes():
    reference = detections([0.5, 0.5, 0.5], [1, 1, 1], [1, 2, 3])
    assert_same(align_rows(swapped(reference, [2, 0, 1]), reference), reference)


def test_a_wrong_order_stays_wrong():
    reference = detections([0.9, 0.5, 0.4], [1, 1, 1], [1, 2, 3])
    actual = swapped(reference, [2, 1, 0])
    assert_same(align_rows(actual, reference), actual)


def test_another_class_does_not_match():
    reference = detections([0.5, 0.5], [1, 2], [1, 2])
    actual = detections([0.5, 0.5], [3, 1], [1, 2])
    assert_same(align_rows(actual, reference), detections([0.5, 0.5], [1, 3], [2, 1]))


def test_other_outputs_are_left_alone():
    classifier = {"scores": np.float32([[0.1, 0.9]])}
    assert_same(align_rows(classifier, {"scores": np.float32([[0.9, 0.1]])}), classifier)
    fewer = detections([0.5], [1], [1])
    assert_same(align_rows(fewer, detections([0.5, 0.5], [1, 2], [1, 2])), fewer)
    not_a_number = detections([np.nan, 0.5], [1, 1], [1, 2])
    assert_same(align_rows(not_a_number, detections([0.6, 0.5], [1, 1], [1, 2])), not_a_number)


def test_the_limit_of_equal_scores_is_the_callers():
    reference = detections([0.9, 0.8], [1, 1], [1, 2])
    actual = swapped(reference, [1, 0])
    assert_same(align_rows(actual, reference, 0.0), actual)
    assert_same(align_rows(actual, reference, 0.2), reference)


def packed(scores, labels, corners):
    """As a YOLO returns the detections that it selects itself, here with one more value for the task."""
    rows = [[*[float(c)] * 4, s, label, 7 * c] for s, label, c in zip(scores, labels, corners, strict=True)]
    return {"output0": np.float32([rows])}


def test_rows_of_one_output_that_changed_places_are_put_back():
    tie = ALL["equal_scores"].value / 2
    reference = packed([0.9, 0.5 + tie, 0.5], [1, 2, 3], [1, 2, 3])
    actual = {"output0": reference["output0"][:, [0, 2, 1]]}
    assert_same(align_rows(actual, reference), reference)
    apart = packed([0.9, 0.6, 0.5], [1, 2, 3], [1, 2, 3])
    wrong = {"output0": apart["output0"][:, [0, 2, 1]]}
    assert_same(align_rows(wrong, apart), wrong)


def test_an_output0_that_is_no_list_of_detections_is_left_alone():
    """Boxes and scores of every anchor, [N, 4 + nc, anchors], or a class that is no whole number."""
    for values in (np.random.default_rng(0).random((1, 9, 9)), packed([0.5, 0.5], [1.5, 2], [1, 2])["output0"]):
        reference = {"output0": np.float32(values)}
        actual = {"output0": reference["output0"][:, ::-1].copy()}
        assert_same(align_rows(actual, reference), actual)
