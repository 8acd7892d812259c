"""Inputs beyond ``deep`` run free: gates, outputs and answers are compared, and the report says how many were."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest

from scconv_deploy.records.stage import StageLog
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from scconv_deploy.verification.options import DEEP, Checks
from scconv_deploy.verification.preprocessing import Preprocessing
from scconv_deploy.verification.samples import load_samples
from tests.verification.judging import check_of, initializer

GATES = 16 * 8 * 8
SITES = 4


@pytest.fixture
def data(tmp_path):
    """Ten labelled inputs of TinyNet."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", image=rng.normal(size=(10, 3, 16, 16)), labels=rng.integers(0, 5, 10))
    return str(tmp_path / "d.npz")


def judge(reference, model, data, deep):
    samples = load_samples(data, reference.signature, Preprocessing(), deep)
    return verify_onnx(reference, Artifact(model, "model.onnx", b""), samples, StageLog())


def test_every_line_says_how_many_inputs_it_covers(tiny_reference, model, data):
    report = judge(tiny_reference[0], model, data, 3)
    assert report, report.failures
    assert report.samples == (
        "d.npz: image 2x3x16x16, 2 batches",
        "d.npz: image 2x3x16x16 (running free: gates, end to end, accuracy), 3 batches",
    )
    for name in ("gates", "values", "whole model", "teacher-forced gates", "replay", "layers"):
        assert check_of(report, name).reason.endswith(", on 4 of 10 inputs"), name
    assert "inputs" not in check_of(report, "free-running gates").reason
    for sru in report.srus:
        assert (sru.teacher_forced.gates, sru.free_running.gates) == (4 * GATES, 10 * GATES)
        assert sum(sru.margins.counts) == 10 * GATES
    assert report.accuracy.samples == 10


def test_what_runs_free_is_as_it_is_in_full(tiny_reference, model, data):
    free, full = (judge(tiny_reference[0], model, data, deep) for deep in (2, None))
    assert re.search(r"\(limit [\d.]+x\)$", check_of(full, "replay").reason)  # and no word on what it covers
    assert free.accuracy == full.accuracy
    assert free.worst_inputs == full.worst_inputs
    for one, other in zip(free.srus, full.srus, strict=True):
        assert (one.free_running, one.margins, one.open_share) == (other.free_running, other.margins, other.open_share)
    assert [o.end_to_end for o in free.outputs] == [o.end_to_end for o in full.outputs]


def test_a_moved_gate_is_seen_running_free(tiny_reference, model, data):
    tensor = initializer(model, "a.SRU", 1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + np.float32(0.05), tensor.name))
    report = judge(tiny_reference[0], model, data, 0)
    assert check_of(report, "free-running gates").status == "failed"
    assert check_of(report, "teacher-forced gates").status == "not run"
    assert "gates of a.SRU" in report.first_departure


def test_nan_of_the_artifact_is_named_where_it_runs_free(tiny_reference, model, data):
    tensor = next(t for t in model.graph.initializer if t.name == "head.bias")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(5, np.nan, np.float32), tensor.name))
    report = judge(tiny_reference[0], model, data, 0)
    assert "the artifact's output logits on d.npz 8-9" in check_of(report, "finite").reason


def test_the_seeded_noise_is_always_judged_in_full(tiny_reference, data):
    noise, real = Checks(data=data, deep=0).samples(tiny_reference[0], 0)
    assert [sample.deep for sample in noise] == [True] * 4
    assert [sample.deep for sample in real] == [False] * 5
    _, real = Checks(data=data, deep=1).samples(tiny_reference[0], 0)
    assert [sample.deep for sample in real] == [True, *[False] * 4]
    assert Checks().deep == DEEP == 64
