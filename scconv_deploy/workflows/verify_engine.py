"""``scconv-deploy verify F.engine``: an engine against a model, another ONNX file, or what a bundle recorded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scconv_deploy.bundle.engine_verdict import judge_with_bundle
from scconv_deploy.graph.file import read_onnx
from scconv_deploy.model.prepare import reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records import tolerances
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.stage import Progress, StageLog, silent
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact, load_engine
from scconv_deploy.runtimes.tensorrt.runner import check_plugin_of, require_runtime
from scconv_deploy.verification import sru_models
from scconv_deploy.verification.engine.srus import Models, SRUModels
from scconv_deploy.verification.engine.verdict import judge_engine
from scconv_deploy.verification.options import Checks
from scconv_deploy.verification.reference.onnx_file import OnnxReference
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.reference.run import Site
from scconv_deploy.verification.samples import with_progress
from scconv_deploy.workflows.provenance import provenance_of


@dataclass(frozen=True)
class EngineVerification:
    """An engine, checked against its manifest, on a machine whose library and GPU may run it.

    Attributes:
        plugin: the library that it was built with.
        command: for the report.
    """

    engine: EngineArtifact
    plugin: Path | None = None
    command: str = ""
    progress: Progress = silent

    @classmethod
    def open(
        cls, path: Path, plugin: Path | None, command: str = "", progress: Progress = silent
    ) -> EngineVerification:
        """Refuse before any reference is loaded what cannot be judged.

        Raises:
            UsageError: no such file, or a plugin for an engine that has none.
            IntegrityError: it is not what its manifest says, or not its plugin.
            MissingRuntimeError: no library, another version of it, or no GPU.
        """
        engine = load_engine(path)
        if plugin is not None:
            check_plugin_of(engine, plugin)
        require_runtime(engine)
        return cls(engine, plugin, command, progress)

    def against_spec(self, spec: ModelSpec, checks: Checks) -> ParityReport:
        """``--reference MODEL``."""
        tolerances.table(checks.tolerances)
        reference, log = reference_from_spec(spec, self.progress)
        models, facts = models_of(self.engine)
        return judge_engine(
            TorchReference(reference), self.engine,
            with_progress(checks.samples(reference, spec.seed, spec.source), self.progress), log,
            overrides=checks.tolerances, plugin=self.plugin, provenance=provenance_of(spec, self.command, log) | facts,
            sru_models=models,
        )  # fmt: skip

    def against_onnx(self, reference: Path, seed: int, checks: Checks) -> ParityReport:
        """``--reference REF.onnx``."""
        source = OnnxReference(str(reference), read_onnx(reference), checks.judging.runtime)
        models, facts = models_of(self.engine, reference)
        facts |= {"command": self.command, "seed": str(seed), "reference": str(reference)}
        return judge_engine(
            source, self.engine, source.samples(seed), StageLog(),
            overrides=checks.tolerances, plugin=self.plugin, provenance=facts, sru_models=models,
        )  # fmt: skip

    def against_bundle(self, bundle: Path, checks: Checks) -> ParityReport:
        """``--reference BUNDLE``."""
        self.progress(f"verifying {self.engine.path.name} against {bundle}")
        return judge_with_bundle(
            bundle, self.engine, StageLog(),
            overrides=checks.tolerances, plugin=self.plugin, provenance={"command": self.command},
        )  # fmt: skip


def models_of(engine: EngineArtifact, *further: Path) -> tuple[SRUModels, dict[str, str]]:
    """ONNX models of single SRUs: out of the file that the engine was built from, if it lies beside it or is among
    further ones; else the nodes that the reference asks for. And a line for the report that says which."""
    for path in (*sorted(engine.path.parent.glob("*.onnx")), *further):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == engine.manifest.onnx_sha256:
            return partial(sru_models.of_artifact, read_onnx(path)), {"SRUs alone": f"out of {path.name}"}
    why = "made from the reference; the ONNX file that the engine was built from is not at hand"
    return partial(_of_site, engine), {"SRUs alone": why}


def _of_site(engine: EngineArtifact, site: Site, shape: tuple[int, ...]) -> Models:
    return sru_models.of_site(site, engine.manifest, shape)
