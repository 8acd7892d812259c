"""Take PyTorch models with ScConv in them to ONNX, and prove that the artifact computes what PyTorch computes.

The names below are imported when they are first used: ``import scconv_deploy`` does not load torch.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # importing typing takes as long as all of this, before the command line handles Ctrl-C
if TYPE_CHECKING:
    from typing import Any

    from scconv_deploy.building import EngineRequest, build_file
    from scconv_deploy.exporters.build_options import BuildOptions
    from scconv_deploy.exporting import ExportOptions, ExportResult, export
    from scconv_deploy.nn import CRU, SRU, GroupBatchnorm2d, ScConv
    from scconv_deploy.pipeline import DeployResult, deploy, verify
    from scconv_deploy.report.records import ParityReport
    from scconv_deploy.rewriting import RewriteOptions, RewriteResult, rewrite_onnx
    from scconv_deploy.spec import DynamicAxis, InputSpec, ModelSpec, load
    from scconv_deploy.verification.checks import Checks
    from scconv_deploy.zoo.embed import EmbedResult, embed
    from scconv_deploy.zoo.embed_spec import EmbedSpec

_HOMES = {
    "BuildOptions": "exporters.build_options",
    "EngineRequest": "building",
    "build_file": "building",
    "CRU": "nn",
    "SRU": "nn",
    "GroupBatchnorm2d": "nn",
    "ScConv": "nn",
    "Checks": "verification.checks",
    "DeployResult": "pipeline",
    "ExportOptions": "exporting",
    "ExportResult": "exporting",
    "deploy": "pipeline",
    "export": "exporting",
    "verify": "pipeline",
    "ParityReport": "report.records",
    "RewriteOptions": "rewriting",
    "RewriteResult": "rewriting",
    "rewrite_onnx": "rewriting",
    "DynamicAxis": "spec",
    "InputSpec": "spec",
    "ModelSpec": "spec",
    "load": "spec",
    "EmbedResult": "zoo.embed",
    "embed": "zoo.embed",
    "EmbedSpec": "zoo.embed_spec",
}

__all__ = [
    "CRU",
    "SRU",
    "BuildOptions",
    "Checks",
    "DeployResult",
    "DynamicAxis",
    "EmbedResult",
    "EmbedSpec",
    "EngineRequest",
    "ExportOptions",
    "ExportResult",
    "GroupBatchnorm2d",
    "InputSpec",
    "ModelSpec",
    "ParityReport",
    "RewriteOptions",
    "RewriteResult",
    "ScConv",
    "build_file",
    "deploy",
    "embed",
    "export",
    "load",
    "rewrite_onnx",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
