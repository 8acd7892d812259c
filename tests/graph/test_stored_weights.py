"""Weights that a file rounds itself."""

from __future__ import annotations

import numpy as np

from tests.graph.test_quantization import PAIR, STORED, read


def test_float_weights_that_the_file_rounds_are_stored_weights():
    """As Model Optimizer writes them; halves are rounded to even."""
    body = PAIR + "v8 = QuantizeLinear<axis = 0>(v, ws, wn) w = DequantizeLinear<axis = 0>(v8, ws, wn) y = Conv(d, w)"
    weight = np.asarray([0.25, -0.75, 400.0, 3.1], np.float32).reshape(2, 2, 1, 1)
    found = read(body, v=weight)
    assert found.unknown == {"y": "no module is known for its weights v"}
    assert found.stored[0].codes.ravel().tolist() == [0, -2, 127, 2]
    assert found.stored[0].dequantized.ravel().tolist() == [0.0, -1.0, 254.0, 4.0]
    changes = {
        "another scale": (body.replace("(v8, ws", "(v8, w2"), {"w2": STORED["ws"] * 2}),
        "another axis": (body.replace("<axis = 0>(v, ws", "<axis = 1>(v, ws"), {}),
        "a zero point": (body, {"wn": np.ones(2, np.int8)}),
        "unsigned": (body, {"wn": np.zeros(2, np.uint8)}),
        "scale 0": (body, {"ws": np.zeros(2, np.float32)}),
    }
    for name, (changed, stored) in changes.items():
        assert list(read(changed, v=weight, **stored).unknown.values()) == ["its weights are dequantised otherwise"], (
            name
        )
