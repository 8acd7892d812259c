"""Medians and shares of layers."""

import numpy as np
import onnx
import pytest

from scconv_deploy.runtimes import onnxruntime as runners
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.runtimes.timing import LayerTime, layer_times


def test_medians_over_runs_and_shares_of_their_sum():
    runs = [
        [("a", "Conv", 3.0), ("b", "Relu", 1.0), ("b", "Relu", 1.0)],  # b twice in a run
        [("a", "Conv", 9.0), ("b", "Relu", 2.0)],
        [("a", "Conv", 6.0), ("b", "Relu", 4.0), ("c", "Loop", 5.0)],  # c in one run of three
    ]
    assert layer_times(runs) == (
        LayerTime("a", "Conv", 6.0, 0.75), LayerTime("b", "Relu", 2.0, 0.25), LayerTime("c", "Loop", 0.0, 0.0),
    )  # fmt: skip
    assert layer_times([]) == ()


def test_layers_of_one_name_and_two_kinds_are_two():
    assert [layer.kind for layer in layer_times([[("a", "Conv", 1.0), ("a", "Relu", 2.0)]])] == ["Relu", "Conv"]


@pytest.mark.parametrize("warmup", [0, 4])
def test_onnx_runtimes_profiler_times_every_node_of_the_runs_that_count(warmup, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counted = []
    monkeypatch.setattr(runners, "layer_times", lambda runs: counted.extend(runs) or layer_times(runs))
    text = '<ir_version: 10, opset_import: ["" : 18]> g (float[N, 64] x) => (float[N, 64] y) '
    model = onnx.parser.parse_model(text + "{ a = Abs(x) b = Exp(a) y = Neg(b) }")
    given = {"x": np.ones((400, 64), np.float32)}
    layers = runners.profile_layers(model, RuntimeOptions(optimization="none"), given, rounds=5, warmup=warmup)
    assert sorted(layer.kind for layer in layers) == ["Abs", "Exp", "Neg"]
    assert [[kind for _, kind, _ in run] for run in counted] == [["Abs", "Exp", "Neg"]] * 5
    longest = layers[0]
    assert longest.p50_ms == np.median([time for run in counted for _, kind, time in run if kind == longest.kind])
    assert list(tmp_path.iterdir()) == []  # the profiler's file is gone
