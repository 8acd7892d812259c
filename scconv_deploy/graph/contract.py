"""The operator contract: names, attributes, parameters and metadata of the domain ``scconv``. No onnx."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scconv_deploy.errors import UsageError

DOMAIN = "scconv"
PLUGIN_NAMESPACE = "scconv"
PLUGIN_VERSION = "1"
"""Version and namespace of the plugin, as node attributes. TensorRT's parser looks a plugin up by the node's type,
``plugin_version`` and ``plugin_namespace``; without the namespace TensorRT 10.15 and later prefer the function."""
STANDARD_DOMAINS = ("", "ai.onnx")
DOMAIN_VERSION = 1
OPERATORS = ("SRU", "SRUNorm", "SRUSoft")
"""Operators of the domain, in the order of their numbers in the C interface (``trt_plugins/sru/kernel/sru.h``)."""
ATTRIBUTES = ("num_groups", "ddof", "eps_var", "eps_std", "plugin_namespace", "plugin_version")
OPSETS = range(18, 24)
IR_VERSION = 10
LARGEST_PROTO_BYTES = 2**31 - 2**20
"""Largest ONNX file without external data, with room for added nodes."""
STRADDLE = "straddle"
"""Overload for groups whose borders lie inside a channel (C % G != 0). It is right for whole groups too, and used for
rows so long that their sums need compensation (:data:`.nodes.LONGEST_ROW`)."""
OPEN = "sru__open"
"""Name of the gate mask in every function body, bool ``[N, C, H, W]``; verification reads and replaces it."""
GATED = "sru__xf"
"""Name of the gates' input in every function body, float32: a runtime may skip the rounding to half before it."""
FORMULA, FORMULA_DOMAIN = "Formula", "scconv.formula"
"""Node that stands for a gate's formula in PyTorch; only in copies for an interpreter."""
SITE = "scconv.site"
VARIANT = "scconv.variant"
WEIGHT = "scconv.weight"
"""Metadata of a node whose gate weight is a constant of the file: its sum(gamma) was added in a runtime's order."""
REWRITTEN = "scconv_deploy.rewritten"
"""Metadata of a model: the sites (JSON) that were read from the graph because no module was recognised for them."""
CRU_FORM = "scconv_deploy.cru"
"""Metadata of a model: the form of its CRUs when it was exported."""
MODULE = "scconv.module"
"""Metadata of a node: the path in PyTorch of the module that computes it."""
LAYER = "scconv.layer"
"""Metadata of a Conv or Gemm: the path of the module whose weights it has, where their name does not say it."""
CruForm = Literal["as-is", "halves", "merged"]
"""Form of a CRU: as the exporter writes it, without the concatenation of 2C channels, or as two convolutions."""
MaskForm = Literal["where", "multiply"]
MASK_FORMS: tuple[MaskForm, ...] = ("where", "multiply")
PARAMETERS = {
    "SRU": ("sru__cut", "sru__sign"),
    "SRUNorm": ("sru__cut", "sru__sign", "sru__gamma", "sru__beta"),
    "SRUSoft": ("sru__cut", "sru__sign", "sru__scale", "sru__shift"),
}


@dataclass(frozen=True)
class FunctionKey:
    """Key of a function: everything that its body depends on."""

    operator: str
    straddle: bool
    mask_form: MaskForm
    opset: int

    @property
    def overload(self) -> str:
        return STRADDLE if self.straddle else ""


def check_opset(opset: int) -> None:
    """Refuse an opset for which there are no function bodies (UsageError)."""
    if opset not in OPSETS:
        raise UsageError(
            f"Opset {opset} is not supported; functions exist for {OPSETS[0]} to {OPSETS[-1]}.", "Use --opset 18."
        )


def node_attributes(num_groups: int, ddof: int, eps_var: float, eps_std: float) -> dict[str, int | float | str]:
    """All attributes of an SRU node. None is left to a default, which onnx.reference and onnx.inliner ignore."""
    return {
        "num_groups": num_groups,
        "ddof": ddof,
        "eps_var": eps_var,
        "eps_std": eps_std,
        "plugin_namespace": PLUGIN_NAMESPACE,
        "plugin_version": PLUGIN_VERSION,
    }


def mask_input(site: str) -> str:
    """The graph input through which :func:`.instrument.inject_gates` takes a site's gates."""
    return f"{site}::open"
