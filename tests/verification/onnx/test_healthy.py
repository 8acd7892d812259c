"""It does not cry wolf: a reduced matrix; two hundred of them: ``python -m benchmarks healthy``."""

from __future__ import annotations

import onnx
import pytest
import torch

from scconv_deploy import cli
from scconv_deploy.errors import MissingRuntimeError, ModelError, UsageError
from scconv_deploy.records import tolerances
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.onnx.parity import Artifact, Judging, verify_onnx
from scconv_deploy.verification.samples import Sample, noise_samples

MATRIX = [("none", 1, 1), ("basic", 2, 3), ("extended", 1, 2), ("all", 2, 5)]


@pytest.mark.parametrize(("optimization", "threads", "batch"), MATRIX)
def test_healthy_artifacts_pass(tiny_reference, tiny_bytes, optimization, threads, batch):
    reference, content = tiny_reference[0], tiny_bytes[0]
    generator = torch.Generator().manual_seed(batch)
    images = [scale * torch.randn(batch, 3, 16, 16, generator=generator) for scale in (1e-2, 1.0, 30.0)]
    samples = [Sample("drawn", {"image": image}, kind="drawn") for image in images]
    judging = Judging(runtime=RuntimeOptions(threads=threads, optimization=optimization))
    artifact = Artifact(onnx.load_model_from_string(content), "model.onnx", content)
    report = verify_onnx(reference, artifact, samples, StageLog(), judging=judging)
    assert report, report.failures
    assert report.first_departure == ""
    assert report.samples == ("drawn, 3 batches",)
    for sru in report.srus:
        gates = 3 * batch * 16 * 8 * 8
        assert (sru.free_running.gates, sru.free_running.unexplained) == (gates, 0)
        assert (sru.teacher_forced.gates, sru.teacher_forced.unexplained) == (gates, 0)
        assert sum(sru.margins.counts) == gates
        counts = (sru.teacher_forced, sru.free_running)
        assert (sru.jump is None) == (sum(c.flips + c.ill_conditioned for c in counts) == 0)
    assert report.layers[0].name == "relu"
    assert [layer.module for layer in report.layers][1:3] == ["a.CRU", "b.CRU"]
    assert all(0 < layer.floor < 1e-6 for layer in report.layers)
    assert len(report.worst_inputs) == min(3 * batch, 5)
    errors = [worst.relative_l2 for worst in report.worst_inputs]
    assert errors == sorted(errors, reverse=True)


def test_a_gate_that_changes_only_running_free_fails(tiny_reference, tiny_bytes, monkeypatch):
    """As if a runtime fused the function into its surroundings and got it wrong there."""
    run = OnnxRuntimeRunner.run

    def fused(self, tensors):
        found = run(self, tensors)
        if "b.SRU::decided" in found:
            found["b.SRU::decided"] = ~found["b.SRU::decided"]
        return found

    monkeypatch.setattr(OnnxRuntimeRunner, "run", fused)
    content = tiny_bytes[0]
    artifact = Artifact(onnx.load_model_from_string(content), "model.onnx", content)
    samples = noise_samples(tiny_reference[0].signature, 0)
    report = verify_onnx(tiny_reference[0], artifact, samples, StageLog())
    checks = {c.name: c for c in report.links[1].checks}
    assert checks["teacher-forced gates"].status == "passed"
    assert checks["free-running gates"].status == "failed"
    assert "worst b.SRU with" in checks["free-running gates"].reason
    assert report.first_departure.startswith("gates of b.SRU: ")
    broken = next(sru for sru in report.srus if sru.site == "b.SRU")
    assert broken.free_running.flips == broken.free_running.gates
    assert broken.free_running.channels == 16
    assert broken.jump > 1


# --- a crash of a runtime is not a parity failure ----------------------------------------------------------------


class Broken:
    """A session that starts and cannot run."""

    def __init__(self, good):
        self._good = good

    def __getattr__(self, name):
        return getattr(self._good, name)

    def run(self, *_):
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : kernel\ncrashed")


@pytest.fixture
def crashing(monkeypatch):
    start = OnnxRuntimeRunner.__init__

    def broken(self, *args):
        start(self, *args)
        self._session = Broken(self._session)

    monkeypatch.setattr(OnnxRuntimeRunner, "__init__", broken)


def test_a_crash_is_told_as_one(crashing, tiny_reference, tiny_bytes):
    artifact = Artifact(onnx.load_model_from_string(tiny_bytes[0]), "model.onnx", tiny_bytes[0])
    with pytest.raises(ModelError, match=r"cannot run the model: .* kernel crashed") as caught:
        verify_onnx(tiny_reference[0], artifact, noise_samples(tiny_reference[0].signature, 0), StageLog())
    assert caught.value.exit_code == 4


def test_a_crash_in_deploy_leaves_no_rejected_artifact(crashing, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    source = "tests.conftest:tiny_net"
    arguments = ["deploy", source, "--input", "2x3x16x16", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_a_provider_that_is_missing_is_the_environment(tiny_bytes):
    model = onnx.load_model_from_string(tiny_bytes[0])
    with pytest.raises(MissingRuntimeError, match=r"no qnn here\. Installed: .*CPUExecutionProvider") as caught:
        OnnxRuntimeRunner(model, RuntimeOptions("qnn"))
    assert caught.value.exit_code == 3
    for name in ("cpu", "CPU", "CPUExecutionProvider"):
        assert RuntimeOptions(name).resolved_provider() == "CPUExecutionProvider"


def test_a_provider_that_does_not_start_is_no_silent_fallback(tiny_bytes, monkeypatch):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA may start here")
    available = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    with pytest.raises(MissingRuntimeError, match="would use the CPU") as caught:
        OnnxRuntimeRunner(onnx.load_model_from_string(tiny_bytes[0]), RuntimeOptions("cuda"))
    assert caught.value.exit_code == 3


# --- tolerances --------------------------------------------------------------------------------------------------


def test_overrides_by_name():
    assert tolerances.parse_overrides(["replay_multiple=16", "largest_floor.float32 = 1e-4"]) == {
        "replay_multiple": 16,
        "largest_floor.float32": 1e-4,
    }
    changed = tolerances.table({"replay_multiple": 16})
    assert changed["replay_multiple"].value == 16
    assert changed["replay_multiple"].limits == tolerances.ALL["replay_multiple"].limits
    assert tolerances.ALL["replay_multiple"].value == 4
    for bad, words in (
        ("replay=1", "There are unexplained_flips, "),
        ("replay_multiple", "not NAME=VALUE"),
        ("replay_multiple=many", "not NAME=VALUE"),
        ("replay_multiple=-1", "at least 0"),
        ("replay_multiple=nan", "at least 0"),
    ):
        with pytest.raises(UsageError, match=words):
            tolerances.parse_overrides([bad])


def test_an_override_decides_and_is_reported(tiny_reference, tiny_bytes):
    artifact = Artifact(onnx.load_model_from_string(tiny_bytes[0]), "model.onnx", tiny_bytes[0])
    samples = noise_samples(tiny_reference[0].signature, 0)[:1]
    judging = Judging({"largest_floor.float32": 1e-9})
    report = verify_onnx(tiny_reference[0], artifact, samples, StageLog(), judging=judging)
    assert not report
    assert "limit 1e-09" in " ".join(report.failures)
    assert report.overrides == {"largest_floor.float32": 1e-9}
    assert report.as_json()["tolerances"]["largest_floor.float32"]["value"] == 3e-5  # what it was
