"""The chain from PyTorch to the artifact, link by link, and the verdict.

``PyTorch as given -> with SRUs swapped -> ONNX Runtime``: each SRU is fed the reference's own input and its gates are
compared one by one; with the gates fixed the rest is continuous and is judged by its error against PyTorch's own
rounding noise. See DESIGN section 6.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import onnx

from scconv_deploy import __version__
from scconv_deploy.gate import FlipCount
from scconv_deploy.report.records import Check, Link, OutputParity, ParityReport, SRUParity, StageLog
from scconv_deploy.verification import instrument, judge
from scconv_deploy.verification.measure import Measured, Measurement, Reference, open_share
from scconv_deploy.verification.runners.onnxruntime import OnnxRuntimeRunner
from scconv_deploy.verification.samples import Sample

SWAPPED_LINK = "PyTorch with SRUs swapped"
ONNX_LINK = "onnxruntime"


def verify_onnx(
    reference: Reference,
    proto: onnx.ModelProto,
    artifact: str,
    artifact_bytes: bytes,
    samples: Sequence[Sample],
    log: StageLog,
    *,
    provenance: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Judge an ONNX model against PyTorch.

    Args:
        proto: the model, external data loaded; ``artifact_bytes`` is what is hashed.
        samples: inputs; at least one.
        progress: told what is being done, in words.

    Returns:
        The report; falsy when a check failed.

    Raises:
        UsageError: the artifact's inputs or outputs are not the reference's.
        ModelError: ONNX Runtime or the reference cannot run the inputs at all.
    """
    nodes = instrument.sites(proto)
    with (
        log.stage("verify") as stage,
        OnnxRuntimeRunner(proto) as free,
        Measurement(reference, proto, free) as measurement,
    ):
        for sample in samples:
            progress(f"verifying on {sample}")
            measurement.run(sample)
        measured = measurement.measured
        stage.applied += [str(sample) for sample in samples]
        stage.skipped += measured.redundant.items()
        if measured.float64_refusal:
            stage.skipped.append(("noise floor in float64", measured.float64_refusal))
    statics = judge.static_checks(proto, nodes, measured)
    links = (
        Link.of(SWAPPED_LINK, judge.swapped_checks(reference.recognition, measured)),
        Link.of(ONNX_LINK, [
            judge.static_summary(proto, nodes, statics, measured),
            *judge.rewritten_checks(proto, nodes, measured),
            judge.teacher_forced_check(measured),
            *judge.replay_checks(measured),
            *judge.contract_checks(measured),
            *judge.finite_checks(measured),
        ]),
        Link("precision", "not run", "the artifact computes in fp32; nothing was converted"),
        Link("engine", "not run", "no engine was built"),
    )  # fmt: skip
    return ParityReport(
        model=reference.name,
        artifact=artifact,
        artifact_sha256=hashlib.sha256(artifact_bytes).hexdigest(),
        links=links,
        srus=tuple(_sru(site, measured, statics) for site in measured.variants),
        outputs=tuple(_output(name, measured) for name in measured.end_to_end),
        samples=tuple(str(sample) for sample in samples),
        left_alone=reference.recognition.refused,
        provenance=_provenance() | dict(provenance or {}),
        stages=tuple(log.records),
    )


def _sru(site: str, measured: Measured, statics: Mapping[str, Check]) -> SRUParity:
    swapped = measured.variants[site]
    return SRUParity(
        site=site,
        variant=str(swapped.variant),
        static=statics[site],
        swapped=measured.swapped_flips.get(swapped.path, FlipCount(0)),
        teacher_forced=measured.teacher_forced.get(site),
        open_share=open_share(measured, site),
    )


def _output(name: str, measured: Measured) -> OutputParity:
    found = measured.replay[name]
    return OutputParity(name, measured.end_to_end[name], found.error, found.floor, not measured.float64_refusal)


def _provenance() -> dict[str, str]:
    versions = {name: version(name) for name in ("torch", "onnx", "onnxruntime", "onnxsim", "onnxscript", "numpy")}
    return {
        "scconv_deploy": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **versions,
    }
