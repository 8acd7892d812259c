"""Provenance of an artifact: command, sources, versions."""

from __future__ import annotations

import json

from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records.stage import StageLog, weights_lines
from scconv_deploy.system.environment import installed_version, sha256_of
from scconv_deploy.version import __version__


def provenance_of(spec: ModelSpec, command: str, log: StageLog) -> dict[str, str]:
    """Provenance of a reference model, for the report.

    Args:
        log: stage log of the run, whose first stage loaded the model.
    """
    facts = {"seed": str(spec.seed), "command": command, "kwargs": json.dumps(dict(spec.kwargs), sort_keys=True)}
    if spec.embed is not None:
        facts["embed"] = str(spec.embed)
    if weights := weights_lines(log.records):
        facts["weights"] = "; ".join(weights)
    if spec.weights is not None:
        facts["weights_sha256"] = sha256_of(spec.weights)
    return facts


def versions() -> dict[str, str]:
    """Versions of scconv-deploy and of the libraries that shape an artifact, for the bundle's manifest."""
    names = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxsim", "numpy")
    return {"scconv-deploy": __version__} | {name: installed_version(name) or "unknown" for name in names}
