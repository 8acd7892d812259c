"""What a model's data are, and whether it holds half at all: not the same question."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from scconv_deploy.graph.types import PRECISION, half_in, precision_of


def model(*weights, io=TensorProto.FLOAT, cast=None, stated=None):
    """A model with these weights; one Cast to another type if there is one."""
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=cast or io)]
    ends = [helper.make_tensor_value_info(name, io, [2]) for name in "xy"]
    tensors = [numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(weights)]
    proto = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors))
    if stated is not None:
        helper.set_model_props(proto, {PRECISION: stated})
    return proto


SINGLE, HALF = np.zeros(100, np.float32), np.zeros(200, np.float16)
BF16 = onnx.numpy_helper.to_array(helper.make_tensor("w", TensorProto.BFLOAT16, [300], np.zeros(300)))


@pytest.mark.parametrize(
    ("proto", "precision", "held"),
    [
        (model(SINGLE), "fp32", None),
        (model(SINGLE, HALF), "fp16", "fp16"),  # cuts and signs stay float32
        (model(SINGLE, BF16), "bf16", "bf16"),
        (model(SINGLE, HALF[:10]), "fp32", "fp16"),  # a float32 model with one half tensor: a fault
        (model(SINGLE, cast=TensorProto.FLOAT16), "fp32", "fp16"),
        (model(io=TensorProto.FLOAT16), "fp16", "fp16"),
        (model(cast=TensorProto.BFLOAT16, stated=json.dumps({"precision": "bf16"})), "bf16", "bf16"),
        (model(SINGLE, BF16[:10], stated=json.dumps({"precision": "bf16"})), "bf16", "bf16"),  # most were kept
        (
            model(SINGLE, cast=TensorProto.BFLOAT16, stated=json.dumps({"precision": "bf16"})),
            "bf16",
            "bf16",
        ),  # all were
        (model(SINGLE, stated=json.dumps({"precision": "bf16"})), "fp32", None),  # its metadata do not make it half
        (model(SINGLE, HALF, stated="not JSON"), "fp16", "fp16"),
        (model(SINGLE, stated='["fp16"]'), "fp32", None),
        (model(SINGLE, stated='{"precision": "fp8"}'), "fp32", None),
    ],
)
def test_what_a_model_claims_to_be_and_what_it_holds(proto, precision, held):
    assert (precision_of(proto), half_in(proto)) == (precision, held)
