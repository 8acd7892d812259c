"""A small network with one site that int8 ruins: its input has an outlier channel, which its weights undo."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime

from scconv_deploy.graph.contract import MODULE
from tests.precision.made import parsed

OUTLIER = 3000.0
BAD = "bad"
SITES = ["w1", "bad", "block", "w3"]
"""Sites in the graph's order; ``block`` is the skip of its Add."""
_TEXT = """g (float[N, 3, 8, 8] x) => (float[N, 5] logits) {
    s = Conv<pads = [1, 1, 1, 1]>(x, stem)
    a = Conv<pads = [1, 1, 1, 1]>(s, w1)
    r = Relu(a)
    m = Mul(r, boost)
    b = Conv(m, bad)
    t = Add(b, s)
    c = Conv(t, w3)
    d = Relu(c)
    f = Flatten(d)
    logits = Gemm(f, fc)
}"""


def network(outlier: float = OUTLIER) -> onnx.ModelProto:
    """The network: stem, ``w1``, ``bad`` (1x1, channel 0 of its input is the outlier), a skip, ``w3``, a classifier."""
    rng = np.random.default_rng(0)
    boost = np.ones((1, 8, 1, 1), np.float32)
    boost[0, 0] = outlier
    bad = _drawn(rng, 8, 8, 1, 1)
    bad[:, 0] /= outlier
    model = parsed(
        _TEXT, stem=_drawn(rng, 8, 3, 3, 3), w1=_drawn(rng, 8, 8, 3, 3), boost=boost, bad=bad,
        w3=_drawn(rng, 8, 8, 1, 1), fc=_drawn(rng, 512, 5) / 8,
    )  # fmt: skip
    layers = {"stem", "w1", "bad", "w3", "fc"}
    for tensor in model.graph.initializer:
        tensor.name += ".weight" if tensor.name in layers else ""
    for node in model.graph.node:
        layer = next((name for name in node.input if name in layers), "")
        node.input[:] = [f"{name}.weight" if name == layer else name for name in node.input]
        node.metadata_props.add(key=MODULE, value=layer or "block")
    return model


def data(model: onnx.ModelProto, rows: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Seeded images ``[rows, 3, 8, 8]``, labelled with what the float network answers, but for one row in five."""
    images = np.random.default_rng(1).normal(size=(rows, 3, 8, 8)).astype(np.float32)
    labels = logits(model, images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 5
    return images, labels


def logits(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """``[N, 5]`` of a network, run without optimisation."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": images})[0]


def snr_db(found: np.ndarray, expected: np.ndarray) -> float:
    """Signal-to-noise ratio by its definition."""
    error = np.sum((found.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(np.sum(expected.astype(np.float64) ** 2) / error))


def _drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
