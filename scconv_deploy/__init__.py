"""Take PyTorch models with ScConv in them to ONNX, and prove that the artifact computes what PyTorch computes.

The names below are imported when they are first used: ``import scconv_deploy`` does not load torch.
"""

from __future__ import annotations

from scconv_deploy.version import __version__ as __version__

TYPE_CHECKING = False  # importing typing takes as long as all of this, before the command line handles Ctrl-C
if TYPE_CHECKING:
    from typing import Any

    from scconv_deploy.exporters.tensorrt.options import BuildOptions
    from scconv_deploy.model.inputs import DynamicAxis, InputSpec
    from scconv_deploy.model.load import load
    from scconv_deploy.model.spec import ModelSpec
    from scconv_deploy.nn import CRU, SRU, GroupBatchnorm2d, ScConv
    from scconv_deploy.records.parity import ParityReport
    from scconv_deploy.verification.options import Checks
    from scconv_deploy.workflows.build import EngineRequest, build_file
    from scconv_deploy.workflows.deploy import DeployResult, deploy
    from scconv_deploy.workflows.export import ExportOptions, ExportResult, export
    from scconv_deploy.workflows.rewrite import RewriteOptions, RewriteResult, rewrite_onnx
    from scconv_deploy.workflows.verify import verify
    from scconv_deploy.zoo.embed import EmbedResult, embed
    from scconv_deploy.zoo.embed_spec import EmbedSpec

_HOMES = {
    "BuildOptions": "exporters.tensorrt.options",
    "EngineRequest": "workflows.build",
    "build_file": "workflows.build",
    "CRU": "nn",
    "SRU": "nn",
    "GroupBatchnorm2d": "nn",
    "ScConv": "nn",
    "Checks": "verification.options",
    "DeployResult": "workflows.deploy",
    "ExportOptions": "workflows.export",
    "ExportResult": "workflows.export",
    "deploy": "workflows.deploy",
    "export": "workflows.export",
    "verify": "workflows.verify",
    "ParityReport": "records.parity",
    "RewriteOptions": "workflows.rewrite",
    "RewriteResult": "workflows.rewrite",
    "rewrite_onnx": "workflows.rewrite",
    "DynamicAxis": "model.inputs",
    "InputSpec": "model.inputs",
    "ModelSpec": "model.spec",
    "load": "model.load",
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
