"""Anchors, decoding and the choice of boxes, against numbers worked out by hand."""

import math

import pytest
import torch

from scconv_deploy.errors import ConfigurationError
from scconv_deploy.zoo.detection import DetectionOptions, anchor_shapes, candidates, decode, detect, grid_anchors


def test_anchor_shapes_by_hand():
    shapes = anchor_shapes(32, (0.5, 1, 2), (1, 2))
    wide, narrow = 16 * math.sqrt(2), 16 / math.sqrt(2)
    expected = torch.tensor(
        [
            [-wide, -narrow, wide, narrow],
            [-2 * wide, -2 * narrow, 2 * wide, 2 * narrow],
            [-16, -16, 16, 16],
            [-32, -32, 32, 32],
            [-narrow, -wide, narrow, wide],
            [-2 * narrow, -2 * wide, 2 * narrow, 2 * wide],
        ]
    )
    torch.testing.assert_close(shapes, expected)


def test_grid_anchors_go_row_by_row_and_keep_the_shapes_together():
    shapes = torch.tensor([[-1.0, -2, 1, 2], [-3, -3, 3, 3]])
    anchors = grid_anchors(shapes, 2, 3, 8)
    assert anchors.tolist() == [
        [-1, -2, 1, 2], [-3, -3, 3, 3], [7, -2, 9, 2], [5, -3, 11, 3], [15, -2, 17, 2], [13, -3, 19, 3],
        [-1, 6, 1, 10], [-3, 5, 3, 11], [7, 6, 9, 10], [5, 5, 11, 11], [15, 6, 17, 10], [13, 5, 19, 11],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        ((0, 0, 0, 0), (10, 20, 30, 60)),
        ((0.1, -0.05, math.log(2), 0), (2, 18, 42, 58)),  # centre 22, 38; 40 x 40
        ((-1, 0, 0, math.log(4)), (0, 0, 10, 100)),  # x from -10, y from -40 to 120: cut at the edges
        ((5, 0, 0, 0), (100, 20, 100, 60)),  # outside: no width is left
    ],
)
def test_decode_by_hand(deltas, expected):
    boxes = decode(torch.tensor([10.0, 20, 30, 60]), torch.tensor(deltas, dtype=torch.float32), 100, 100)
    torch.testing.assert_close(boxes, torch.tensor(expected, dtype=torch.float32))


def test_decode_limits_the_scale():
    boxes = decode(torch.tensor([5000.0, 5000, 5016, 5032]), torch.tensor([0.0, 0, 1e4, 1e4]), 10000, 10000)
    torch.testing.assert_close(boxes, torch.tensor([4508.0, 4016, 5508, 6016]))  # 62.5 times as large


def test_candidates_are_the_best_pairs_with_what_belongs_to_them():
    logits = torch.tensor([[[0.0, 9], [7, 8], [-1, -2]]])
    deltas = torch.arange(12.0).reshape(1, 3, 4)
    anchors = 100 + torch.arange(12.0).reshape(3, 4)
    best, labels, encoded = candidates(logits, deltas, anchors, 3)
    assert best.tolist() == [[9, 8, 7]]
    assert labels.tolist() == [[1, 1, 0]]
    assert encoded.tolist() == [
        [[0, 1, 2, 3, 100, 101, 102, 103], [4, 5, 6, 7, 104, 105, 106, 107], [4, 5, 6, 7, 104, 105, 106, 107]]
    ]
    assert candidates(logits, deltas, anchors, 50)[0].shape == (1, 6)


def two_levels(scores):
    """(logits, deltas, anchors) of two feature maps whose boxes are the anchors."""
    logits = [torch.logit(torch.tensor(level))[None] for level in scores]
    anchors = [torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10]]), torch.tensor([[0.0, 1, 10, 11]])]
    return logits, [torch.zeros(1, 2, 4), torch.zeros(1, 1, 4)], anchors


def test_detect_by_hand():
    """Three boxes on one another, of two maps: one of each class stays, best first, and the rest is padding."""
    levels = two_levels([[[0.3, 0.04], [0.9, 0.6]], [[0.5, 0.7]]])
    found = detect(*levels, (20, 20), DetectionOptions(max_detections=4))
    assert found["count"].tolist() == [2]
    assert found["labels"].tolist() == [[0, 1, -1, -1]]
    torch.testing.assert_close(found["scores"], torch.tensor([[0.9, 0.7, 0, 0]]))
    assert found["boxes"].tolist() == [[[1, 0, 11, 10], [0, 1, 10, 11], [0, 0, 0, 0], [0, 0, 0, 0]]]
    assert found["labels"].dtype == found["count"].dtype == torch.int64


def test_detect_options():
    levels = two_levels([[[0.3, 0.04], [0.9, 0.6]], [[0.5, 0.7]]])
    everything = detect(*levels, (20, 20), DetectionOptions(score_threshold=0.05, iou_threshold=1.0))
    torch.testing.assert_close(everything["scores"], torch.tensor([[0.9, 0.7, 0.6, 0.5, 0.3, 0]]))
    assert everything["labels"].tolist() == [[0, 1, 1, 0, 0, -1]]
    best = detect(*levels, (20, 20), DetectionOptions(iou_threshold=1.0, candidates_per_level=1))
    torch.testing.assert_close(best["scores"], torch.tensor([[0.9, 0.7]]))
    strict = detect(*levels, (20, 20), DetectionOptions(score_threshold=0.8, max_detections=2))
    assert strict["count"].tolist() == [1]


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigurationError, match=r"score_threshold is 1, expected 0 <= t < 1"):
        DetectionOptions(score_threshold=1)
    with pytest.raises(ConfigurationError, match=r"iou_threshold is -0.1"):
        DetectionOptions(iou_threshold=-0.1)
    with pytest.raises(ConfigurationError, match=r"max_detections 0"):
        DetectionOptions(max_detections=0)
