"""Judge an engine against the reference in a bundle. No onnx."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scconv_deploy.bundle.contents import REFERENCE
from scconv_deploy.bundle.manifest import read_manifest
from scconv_deploy.bundle.reference import read_sealed_reference
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact
from scconv_deploy.verification.engine.sru_alone import lone_sru
from scconv_deploy.verification.engine.srus import SRUBuilder
from scconv_deploy.verification.engine.verdict import Opener, judge_engine, open_engine


def judge_with_bundle(
    bundle: Path,
    engine: EngineArtifact,
    log: StageLog,
    *,
    overrides: Mapping[str, float] | None = None,
    plugin: Path | None = None,
    provenance: Mapping[str, str] | None = None,
    opener: Opener = open_engine,
    build_sru: SRUBuilder = lone_sru,
) -> ParityReport:
    """Judge an engine against the ``reference/`` of a bundle; see :func:`judge_engine`.

    Raises:
        IntegrityError: a file of ``reference/`` differs from the manifest.
    """
    source = read_sealed_reference(bundle)
    facts = {"reference": f"{REFERENCE}/ of {bundle}"} | dict(provenance or {})
    if engine.manifest.onnx_sha256 not in {entry["sha256"] for entry in read_manifest(bundle)["files"].values()}:
        facts["SRUs alone"] = "out of the bundle's model; the engine was built from another ONNX file"
    return judge_engine(
        source, engine, source.samples, log, overrides=overrides, plugin=plugin, provenance=facts,
        sru_models=source.sru_models, opener=opener, build_sru=build_sru,
    )  # fmt: skip
