"""Non-maximum suppression against a brute-force reading of ONNX's text, and against ONNX Runtime's own node."""

import math

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from scconv_deploy.zoo.nms import non_max_suppression, overlaps

LIMITS = {"max_per_class": 4, "iou_threshold": 0.5, "score_threshold": 0.2}


def intersection_over_union(a, b):
    """Of two boxes given by any two opposite corners, in plain Python."""
    ax, ay, bx, by = sorted(a[0::2]), sorted(a[1::2]), sorted(b[0::2]), sorted(b[1::2])
    both = max(0.0, min(ax[1], bx[1]) - max(ax[0], bx[0])) * max(0.0, min(ay[1], by[1]) - max(ay[0], by[0]))
    areas = (ax[1] - ax[0]) * (ay[1] - ay[0]), (bx[1] - bx[0]) * (by[1] - by[0])
    return both / (sum(areas) - both) if min(areas) > 0 else 0.0


def brute_force(boxes, scores, max_per_class, iou_threshold, score_threshold):
    """Box by box, as the specification says it."""
    kept = np.zeros_like(scores)
    for image, of_image in enumerate(scores):
        for label, of_class in enumerate(of_image):
            chosen = []
            for index in sorted(range(len(of_class)), key=lambda i, s=of_class: (-s[i], i)):
                apart = all(
                    intersection_over_union(boxes[image, index].tolist(), boxes[image, other].tolist()) <= iou_threshold
                    for other in chosen
                )
                if of_class[index] > score_threshold and apart and len(chosen) < max_per_class:
                    chosen.append(index)
            kept[image, label, chosen] = 1
    return kept


@pytest.fixture(scope="module")
def onnx_node():
    """ONNX Runtime's NonMaxSuppression with :data:`LIMITS`; boxes and scores to the same mask."""
    constants = [
        helper.make_tensor("most", TensorProto.INT64, [1], [LIMITS["max_per_class"]]),
        helper.make_tensor("iou", TensorProto.FLOAT, [1], [LIMITS["iou_threshold"]]),
        helper.make_tensor("score", TensorProto.FLOAT, [1], [LIMITS["score_threshold"]]),
    ]
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "iou", "score"], ["selected"])
    value = helper.make_tensor_value_info
    inputs = [value("boxes", TensorProto.FLOAT, [None, None, 4]), value("scores", TensorProto.FLOAT, [None] * 3)]
    graph = helper.make_graph([node], "nms", inputs, [value("selected", TensorProto.INT64, [None, 3])], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(boxes, scores):
        kept = np.zeros_like(scores)
        kept[tuple(session.run(None, {"boxes": boxes, "scores": scores})[0].T)] = 1
        return kept

    return run


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 24), coarse=st.booleans())
def test_it_is_onnx_and_the_brute_force(onnx_node, seed, count, coarse):
    """Coarse corners and scores give exact ties, overlaps of exactly the threshold, and boxes without area."""
    random = np.random.default_rng(seed)
    boxes = random.integers(0, 5, (2, count, 4)) if coarse else random.uniform(0, 5, (2, count, 4))
    scores = random.integers(0, 6, (2, 3, count)) / 5 if coarse else random.uniform(0, 1, (2, 3, count))
    boxes, scores = boxes.astype(np.float32), scores.astype(np.float32)
    kept = non_max_suppression(torch.from_numpy(boxes), torch.from_numpy(scores), *LIMITS.values()).numpy()
    np.testing.assert_array_equal(kept, onnx_node(boxes, scores))
    # the text knows real numbers only: where scores are 0.2 it must be told the float that they are
    limits = LIMITS | {"score_threshold": float(np.float32(LIMITS["score_threshold"]))}
    np.testing.assert_array_equal(kept, brute_force(boxes.astype(np.float64), scores, **limits))


def test_overlaps_by_hand():
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [4, 4, 0, 0], [1, 1, 1, 3], [10, 10, 11, 11]])
    third = 8 / 24
    expected = torch.tensor(
        [[1, third, 1, 0, 0], [third, 1, third, 0, 0], [1, third, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    )
    torch.testing.assert_close(overlaps(boxes), expected)


def test_a_chain_of_overlaps_keeps_its_ends():
    """The middle box falls to the first one, so the last one, which only it overlaps, stays."""
    boxes = torch.tensor([[[0.0, 0, 10, 1], [4, 0, 14, 1], [8, 0, 18, 1]]])
    scores = torch.tensor([[[0.9, 0.8, 0.7]]])
    assert math.isclose(float(overlaps(boxes[0])[0, 1]), 6 / 14, rel_tol=1e-6)
    assert non_max_suppression(boxes, scores, 10, 0.4, 0.0).tolist() == [[[1, 0, 1]]]
    assert non_max_suppression(boxes, scores, 10, 0.5, 0.0).tolist() == [[[1, 1, 1]]]
    assert non_max_suppression(boxes, scores, 1, 0.5, 0.0).tolist() == [[[1, 0, 0]]]
    assert non_max_suppression(boxes, scores, 10, 0.5, 0.8).tolist() == [[[1, 0, 0]]]


def test_nothing_above_the_threshold_keeps_nothing():
    assert non_max_suppression(torch.rand(1, 3, 4), torch.zeros(1, 2, 3), 10, 0.5, 0.0).sum() == 0
