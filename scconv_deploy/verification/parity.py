"""Judge an ONNX file against PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from scconv_deploy.report.records import ParityReport, StageLog
from scconv_deploy.verification.chain import ONNX_LINK, SWAPPED_LINK, Artifact, Judging, verify_artifact
from scconv_deploy.verification.samples import Sample
from scconv_deploy.verification.torch_reference import Reference, TorchReference

__all__ = ["ONNX_LINK", "SWAPPED_LINK", "Artifact", "Judging", "Reference", "verify_onnx"]


def verify_onnx(
    reference: Reference,
    artifact: Artifact,
    samples: Iterable[Sample],
    log: StageLog,
    *,
    judging: Judging = Judging(),
    provenance: Mapping[str, str] | None = None,
) -> ParityReport:
    """Judge an ONNX model against PyTorch; see :func:`.chain.verify_artifact`."""
    return verify_artifact(TorchReference(reference), artifact, samples, log, judging=judging, provenance=provenance)
