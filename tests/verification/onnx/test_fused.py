"""ONNX Runtime with the fused SRU for CPUs, as a link: healthy libraries pass, others fail, the rest was not run."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from scconv_deploy.errors import IntegrityError
from scconv_deploy.graph.file import serialize
from scconv_deploy.graph.forms import inlined
from scconv_deploy.records import tolerances
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.onnx.chain import Artifact
from scconv_deploy.verification.onnx.fused import FUSED_LINK, FusedSRUs
from scconv_deploy.verification.onnx.parity import Judging, source_of, verify_onnx
from scconv_deploy.verification.samples import Sample, noise_samples
from scconv_deploy.workflows.export import ExportOptions, export_to_ir, in_precision
from tests import int8
from tests.exporters.tensorrt.engines import elf_library


def judge(reference, proto, operators):
    artifact, samples = Artifact(proto, "model.onnx", proto.SerializeToString()), noise_samples(reference.signature, 0)
    report = verify_onnx(reference, artifact, samples, StageLog(), judging=Judging(operators=operators))
    return report, next(link for link in report.links if link.name == FUSED_LINK)


def in_type(reference, precision):
    log, options = StageLog(), ExportOptions(precision=precision)
    return onnx.load_model_from_string(serialize(in_precision(export_to_ir(reference, options, log), options, log)))


def verdicts(link):
    return {check.name: check.status for check in link.checks}


@pytest.fixture
def tiny(tiny_reference, tiny_bytes):
    return tiny_reference[0], onnx.load_model_from_string(tiny_bytes[0])


def test_a_healthy_library_passes_gates_values_segments_and_outputs(tiny, cpu_path):
    report, link = judge(*tiny, cpu_path)
    assert report, report.failures
    assert [link.name for link in report.links][-2:] == [FUSED_LINK, "engine"]
    assert verdicts(link) == dict.fromkeys(
        ("teacher-forced gates", "values of SRUs", "gates inside", "values inside", "segments", "end to end", "top-1"),
        "passed",
    )
    seen = int(re.search(r"gates changed: 0 of ([\d,]+)", link.checks[0].reason)[1].replace(",", ""))
    assert seen > 4 * 16 * 64  # more than half of 4 SRUs
    assert re.fullmatch(r"libscconv_sru_cpu\.so, sha256 [0-9a-f]{64}", report.provenance["fused SRU"])


def test_without_a_library_there_is_no_such_link(tiny):
    reference, proto = tiny
    content = proto.SerializeToString()
    report = verify_onnx(
        reference, Artifact(proto, "model.onnx", content), noise_samples(reference.signature, 0), StageLog()
    )
    assert FUSED_LINK not in [link.name for link in report.links]
    assert "fused SRU" not in report.provenance


def test_a_library_that_computes_otherwise_fails(tiny, cpu_path, tmp_path):
    """SRUNorm and SRUSoft have each other's names: values and outputs are wrong, although all other links pass."""
    data = cpu_path.read_bytes().replace(b"\0SRUNorm\0", b"\0SRU?\0").replace(b"\0SRUSoft\0", b"\0SRUNorm\0")
    (tmp_path / "lib.so").write_bytes(data.replace(b"\0SRU?\0", b"\0SRUSoft\0"))
    report, link = judge(*tiny, tmp_path / "lib.so")
    assert not report
    assert [other.name for other in report.links if other.status == "failed"] == [FUSED_LINK]
    found = verdicts(link)
    assert (found["values of SRUs"], found["values inside"], found["end to end"]) == ("failed",) * 3


@pytest.mark.parametrize(("shown", "failing"), [("a.SRU::y", "gates inside"), ("sru_y", "teacher-forced gates")])
def test_gates_that_are_inverted_fail(tiny, cpu_path, monkeypatch, shown, failing):
    """y of inverted hard gates is y with its halves exchanged."""
    run = OnnxRuntimeRunner.run

    def inverted(self, tensors):
        found = run(self, tensors)
        if shown in found:
            found[shown] = np.roll(found[shown], found[shown].shape[1] // 2, axis=1)
        return found

    monkeypatch.setattr(OnnxRuntimeRunner, "run", inverted)
    report, link = judge(*tiny, cpu_path)
    assert not report
    assert verdicts(link)[failing] == "failed"


def checks_of(reference, proto, operators, samples=()):
    """The link's checks alone, by name: all others are tested elsewhere."""
    source = source_of(reference, Artifact(proto, "model.onnx", b""))
    with FusedSRUs(source, proto, operators, tolerances.table()) as fused:
        for sample in samples:
            fused.add(source.run(sample))
        return {check.name: check for check in fused.checks()}


def test_float16_runs_in_the_files_own_type(tiny_reference, cpu_path):
    reference = tiny_reference[0]
    found = checks_of(reference, in_type(reference, "fp16"), cpu_path, [*noise_samples(reference.signature, 0)][:1])
    assert {check.status for check in found.values()} == {"passed"}, found
    assert {"gates inside", "teacher-forced gates", "segments", "end to end"} <= set(found)


def test_bfloat16_is_not_run(tiny_reference, cpu_path):
    (found,) = checks_of(tiny_reference[0], in_type(tiny_reference[0], "bf16"), cpu_path).values()
    assert (found.status, found.reason) == ("not run", "ONNX Runtime's CPU has no bfloat16")


def test_of_a_quantised_artifact_the_gates_are_judged(cpu_path):
    reference, proto = int8.reference()
    sample = Sample("drawn", {name: int8.image() for name in reference.signature.names})
    found = checks_of(reference, int8.quantize(proto, "cpu"), cpu_path, [sample])
    assert found["gates inside"].status == found["teacher-forced gates"].status == "passed"
    assert found["end to end"].status == "not run"
    assert "segments" not in found


def test_a_file_without_sru_nodes_is_not_run(tiny, cpu_path):
    reference, proto = tiny
    (found,) = checks_of(reference, inlined(proto), cpu_path).values()
    assert (found.status, "no SRU node" in found.reason) == ("not run", True)


def test_a_file_that_is_no_library_is_refused(tiny, tmp_path):
    for content in (b"nothing", elf_library()):
        (tmp_path / "lib.so").write_bytes(content)
        with pytest.raises(IntegrityError) as refused:
            OnnxRuntimeRunner(tiny[1], replace(RuntimeOptions(), operators=tmp_path / "lib.so"))
        assert "plugin build" in refused.value.remedy


def test_ir_is_not_touched(tiny):
    """The value infos of SRU outputs, which fusions behind them depend on without a library, are in the artifact."""
    _, proto = tiny
    known = {value.name: value.type.tensor_type.shape for value in proto.graph.value_info}
    outputs = {value.name for value in proto.graph.output}
    srus = [node for node in ir.from_proto(proto).graph if node.domain == "scconv"]
    assert len(srus) == 4
    for node in srus:
        (y,) = node.outputs
        assert y.name in outputs or len(known[y.name].dim) == 4
