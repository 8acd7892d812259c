"""int8 engines against fake-quantised PyTorch. ONNX Runtime without optimisation stands for the library."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.report.engine_facts import engine_facts
from scconv_deploy.report.load import from_json
from scconv_deploy.runtimes.half import runner_of
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.verification.onnx.parity import Artifact, source_of_engine
from scconv_deploy.verification.samples import noise_samples
from tests import int8
from tests.mutations import edit
from tests.verification.engine_cases import QUANTIZED, ends_of, judge, watched_opener
from tests.verification.judging import check_of, edit_body

PLAIN = RuntimeOptions(optimization="none")  # its integer kernels saturate on some CPUs


@pytest.fixture(scope="module")
def healthy():
    """(float model in PyTorch, int8 file, the reference that rounds to its codes)."""
    reference, proto = int8.reference()
    model = int8.quantize(proto)
    return reference, model, source_of_engine(reference, Artifact(model, "model.onnx", b""))


def opener(engine, plugin):
    return runner_of(onnx.load_model_from_string(engine.verified_bytes()), PLAIN)


def judged(healthy, folder, damage=None, **changes):
    reference, model, source = healthy
    given = {"source": source, "opener": opener, "layers": QUANTIZED, "whole_only": True} | changes
    given["samples"] = noise_samples(reference.signature, 0)[:1]
    return judge(reference, model, folder, damage=damage, **given)


def inside(healthy, folder, damage=None):
    watched = partial(watched_opener, options=PLAIN)
    return judged(healthy, folder, damage, opener=watched, debug_tensors=ends_of(healthy[1]))


def scaled(name, factor):
    return lambda model: edit(model, name, lambda value: (value * factor).astype(value.dtype))


def inverted(model):
    edit_body(model, "GreaterOrEqual (sru__signed, sru__threshold)", "Less (sru__signed, sru__threshold)")


def test_a_healthy_engine_passes_and_is_called_int8(healthy, tmp_path):
    report = judged(healthy, tmp_path)
    assert report, report.failures
    reason = check_of(report, "end to end").reason
    assert "the noise of explained gate and code changes" in reason
    assert check_of(report, "teacher-forced gates").status == "passed"
    assert report.engines[0].precision == "int8"
    assert ", int8, on " in engine_facts(report.engines[0])["engine"]
    assert all(output.noise_measured for output in report.engines[0].outputs)
    assert from_json(report.as_json()) == report


@pytest.mark.parametrize(
    "damage",
    [inverted, scaled(f"{int8.LAYER}.weight_scale", 1.5), scaled("net.layer1.0.conv1.weight_quantized", -1)],
)
def test_faults_of_the_whole_engine_show_end_to_end(healthy, tmp_path, damage):
    report = judged(healthy, tmp_path, damage)
    assert check_of(report, "end to end").status == "failed"


def test_codes_that_rounding_moves_fail_no_segment(healthy, tmp_path):
    report = inside(healthy, tmp_path)
    assert report, report.failures
    assert "the rounding of float32 and of codes" in check_of(report, "segments").reason
    assert check_of(report, "gates inside").status == "passed"


def test_a_scale_that_is_off_shows_in_its_segment_alone(healthy, tmp_path):
    report = inside(healthy, tmp_path, scaled(f"{int8.LAYER}.weight_scale", 1.05))
    reason = check_of(report, "segments").reason
    assert check_of(report, "segments").status == "failed"
    assert "the segment before net.layer2.0." in reason
    assert "; so do" not in reason


def test_codes_are_not_held_against_floats(healthy, tmp_path):
    """Float tolerances would fail a healthy int8 engine, or pass a wrong float one."""
    reference, model, source = healthy
    with pytest.raises(UsageError, match=r"The engine is int8, and the reference .* does not round to its codes") as e:
        judge(reference, model, tmp_path, layers=QUANTIZED, opener=opener)
    assert "its bundle, or the model with the ONNX file that it was built from" in e.value.remedy
    with pytest.raises(UsageError, match=r"The engine is fp32, and the reference .* is fake-quantised"):
        judge(reference, model, tmp_path, source=source, opener=opener)


def test_quantisers_without_a_place_in_the_model_are_no_reference(healthy):
    """One before an SRU: the plan for PyTorch has none there."""
    reference, model, _ = healthy
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.metadata_props[:]
    node = next(n for n in changed.graph.node if n.domain == "scconv")
    node.input[0] = int8._pair(changed, node.input[0], node, 1 / np.float32(8))
    with pytest.raises(ModelError, match=r"m.onnx is int8 \(Q/DQ\), and cannot be judged: PyTorch has no place"):
        source_of_engine(reference, Artifact(changed, "m.onnx", b""))
