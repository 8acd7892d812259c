"""Provenance of an artifact: command, sources, versions."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version

from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records.stage import StageLog, weights_lines
from scconv_deploy.version import __version__


def provenance_of(spec: ModelSpec, command: str, log: StageLog) -> dict[str, str]:
    """What a report says of where a reference came from.

    Args:
        log: of the run, whose first stage loaded the model.
    """
    facts = {"seed": str(spec.seed), "command": command, "kwargs": json.dumps(dict(spec.kwargs), sort_keys=True)}
    if spec.embed is not None:
        facts["embed"] = str(spec.embed)
    if weights := weights_lines(log.records):
        facts["weights"] = "; ".join(weights)
    if spec.weights is not None:
        facts["weights_sha256"] = hashlib.sha256(spec.weights.read_bytes()).hexdigest()
    return facts


def _versions() -> dict[str, str]:
    names = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxsim", "numpy")
    found = {"scconv-deploy": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
