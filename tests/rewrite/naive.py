"""Naive ONNX files: user code through torch's two exporters, and graphs as ONNX text."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from scconv_deploy.rewrite.apply import apply_rules
from tests import made_once, wild


def export(model, x, dynamo, opset=18, dynamic=False, *, shapes=None, axes=None):
    """The model as a user exports it: input x, output y; open axes are those of an image, or as each exporter says.

    Exported once a run: rewriting is what is tested.
    """
    key = made_once.key_of("naive", model, x, dynamo, opset, dynamic, shapes, axes)
    made = made_once.once(
        key, lambda: _export(model, x, dynamo, opset, dynamic, shapes=shapes, axes=axes).SerializeToString()
    )
    return onnx.load_model_from_string(made)


def _export(model, x, dynamo, opset, dynamic, *, shapes, axes):
    names = {"opset_version": opset, "input_names": ["x"], "output_names": ["y"]}
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            if dynamo:
                dims = {axis: torch.export.Dim(name, min=2, max=256) for axis, name in ((0, "b"), (2, "h"), (3, "w"))}
                shapes = (dims,) if dynamic else shapes
                return torch.onnx.export(
                    model, (x,), dynamo=True, verbose=False, dynamic_shapes=shapes, **names
                ).model_proto
            buffer = io.BytesIO()
            axes = {"x": {0: "b", 2: "h", 3: "w"}} if dynamic else axes
            torch.onnx.export(model, (x,), buffer, dynamo=False, dynamic_axes=axes, **names)
            return onnx.load_model_from_string(buffer.getvalue())
    finally:
        logging.disable(logging.NOTSET)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(proto, x):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy() if isinstance(x, torch.Tensor) else np.asarray(x)})[0]


def rewritten(proto, mask_form="multiply", cru="halves"):
    """The rules applied to a model with inferred shapes; (model, what was done)."""
    opset = proto.opset_import[0].version
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    applied = apply_rules(model, mask_form, opset, cru)
    result = ir.to_proto(model)
    result.ir_version = 10
    onnx.checker.check_model(result, full_check=True)
    return result, applied


def parse(text):
    """A model of a graph in ONNX's text format, opset 18."""
    return onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 18]>\n' + text)


class SmallNet(nn.Module):
    """Two blocks with an SRU each, the second at half the size."""

    def __init__(self, sru, channels=16):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 1, 1)
        self.layer = nn.Sequential(
            nn.Sequential(sru(channels), nn.Conv2d(channels, channels, 3, 1, 1), nn.ReLU()),
            nn.Sequential(nn.AvgPool2d(2, 2), sru(channels), nn.Conv2d(channels, channels, 1)),
        )

    def forward(self, x):
        return self.layer(torch.relu(self.stem(x))).mean((2, 3))


VARIANTS = {
    "groupbn-hard": lambda c: wild.OriginalSRU(c, 4),
    "groupbn-hard-normalized": lambda c: wild.NormalizedSRU(c, 4),
    "groupnorm-soft": lambda c: wild.SoftSRU(c, 4),
}


def small_net(variant, seed=0):
    torch.manual_seed(seed)
    return wild.randomize(SmallNet(VARIANTS[variant]), seed)
