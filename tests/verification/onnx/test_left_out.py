"""Nothing is left out in silence: what was not compared fails, or is said."""

from __future__ import annotations

import numpy as np
import pytest

from scconv_deploy.errors import UsageError
from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import OPEN
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from tests.verification.judging import check_of, judge
from tests.verified import verify_bundle
from tests.workflows.test_verify import make_bundle


@pytest.fixture
def changed(monkeypatch):
    """Change one of the values that ONNX Runtime returns: ``changed(name, change, with_gates=False)``."""
    run = OnnxRuntimeRunner.run

    def install(name, change, with_gates=False):
        def otherwise(self, tensors):
            found = run(self, tensors)
            injected = any(given.endswith("::open") for given in tensors)
            if name in found and injected == with_gates:
                found[name] = change(found[name])
            return found

        monkeypatch.setattr(OnnxRuntimeRunner, "run", otherwise)

    return install


def spoil(x):
    x = x.copy()
    x.flat[3] = np.nan
    return x


def cropped(x):
    return x[:, :, 1:]


@pytest.mark.parametrize("with_gates", [False, True])
def test_nan_at_a_gate_that_no_output_shows_is_named(tiny_reference, model, changed, with_gates):
    changed(instrument.gate_input("b.SRU"), spoil, with_gates)
    report = judge(tiny_reference[0], model)
    where = "with the reference's gates" if with_gates else "in the artifact"
    assert f"the input of b.SRU {where} on seeded noise" in check_of(report, "finite").reason
    assert check_of(report, "finite").status == "failed"


@pytest.mark.parametrize("with_gates", [False, True])
def test_a_gate_of_another_shape_breaks_the_contract(tiny_reference, model, changed, with_gates):
    name = instrument.gate_input("b.SRU") if with_gates else instrument.gate_output("b.SRU")
    changed(name, cropped, with_gates)
    reason = check_of(judge(tiny_reference[0], model), "contract").reason
    assert "the input of b.SRU is [2, 16, 7, 8], PyTorch's [2, 16, 8, 8]" in reason


def test_it_is_said_of_how_many_srus_gates_were_compared(tiny_reference, tiny_bytes, model, tmp_path):
    for name in ("free-running gates", "second opinion"):
        assert "SRUs" not in check_of(judge(tiny_reference[0], model), name).reason
    report = verify_bundle(make_bundle(tmp_path / "some", tiny_reference[0], tiny_bytes[0], largest_bytes=22_000))
    names = [sample.partition(":")[0] for sample in report.samples]
    check = check_of(report, "free-running gates")
    assert check.status == "passed"
    assert check.reason.endswith(" of 4 SRUs")
    assert {worst.sample for worst in report.worst_inputs} == set(names)


def test_an_sru_that_hides_its_gates_is_counted(tiny_reference, model):
    function = next(f for f in model.functions if f.name == "SRUSoft")
    for node in function.node:
        node.input[:] = [name.replace(OPEN, "hidden") for name in node.input]
        node.output[:] = [name.replace(OPEN, "hidden") for name in node.output]
    report = judge(tiny_reference[0], model)
    assert "function body" in check_of(report, "static").reason
    for name in ("teacher-forced gates", "free-running gates", "second opinion"):
        assert check_of(report, name).reason.endswith(", on 3 of 4 SRUs"), name


def test_without_a_sample_nothing_passes(tiny_reference, model):
    with pytest.raises(UsageError, match="There is no sample"):
        verify_onnx(tiny_reference[0], Artifact(model, "model.onnx", b""), [], StageLog())
