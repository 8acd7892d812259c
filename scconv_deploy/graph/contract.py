"""The operator contract: names, attributes, parameters and metadata of the domain ``scconv``. No onnx."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scconv_deploy.errors import UsageError

DOMAIN = "scconv"
PLUGIN_NAMESPACE = "scconv"
PLUGIN_VERSION = "1"
"""What a node must carry so that TensorRT's parser binds the plugin, which it looks up by the node's type and the
attributes ``plugin_version`` and ``plugin_namespace``; without the namespace TensorRT 10.15 and later prefer the
function."""
STANDARD_DOMAINS = ("", "ai.onnx")
DOMAIN_VERSION = 1
OPERATORS = ("SRU", "SRUNorm", "SRUSoft")
"""In the order of the numbers that the C interface has for them (``trt_plugins/sru/kernel/sru.h``)."""
ATTRIBUTES = ("num_groups", "ddof", "eps_var", "eps_std", "plugin_namespace", "plugin_version")
OPSETS = range(18, 24)
IR_VERSION = 10
LARGEST_PROTO_BYTES = 2**31 - 2**20
"""What one ONNX file without external data can hold, with room for what is added."""
STRADDLE = "straddle"
"""The overload for groups whose borders lie inside a channel (C % G != 0); right for whole groups too, and taken for
rows so long that their sums need compensation (:data:`.nodes.LONGEST_ROW`)."""
OPEN = "sru__open"
"""The bool ``[N, C, H, W]`` in every body that holds the gates; verification reads and replaces it."""
GATED = "sru__xf"
"""The input in float32 as the gates see it, in every body: a runtime may leave out a rounding to half before it."""
SITE = "scconv.site"
VARIANT = "scconv.variant"
WEIGHT = "scconv.weight"
"""Metadata of a node whose gate weight is the file's own constant: its sum(gamma) in a runtime's order."""
REWRITTEN = "scconv_deploy.rewritten"
"""Metadata of a model: the sites (JSON) that were read from the graph, for recognition knew no module for them."""
MODULE = "scconv.module"
"""Metadata of a node: the path in PyTorch of the module that computes it."""
MaskForm = Literal["where", "multiply"]
MASK_FORMS: tuple[MaskForm, ...] = ("where", "multiply")
PARAMETERS = {
    "SRU": ("sru__cut", "sru__sign"),
    "SRUNorm": ("sru__cut", "sru__sign", "sru__gamma", "sru__beta"),
    "SRUSoft": ("sru__cut", "sru__sign", "sru__scale", "sru__shift"),
}


@dataclass(frozen=True)
class FunctionKey:
    """Which function: everything that a body depends on."""

    operator: str
    straddle: bool
    mask_form: MaskForm
    opset: int

    @property
    def overload(self) -> str:
        return STRADDLE if self.straddle else ""


def check_opset(opset: int) -> None:
    """Refuse an opset for which no bodies are generated (UsageError)."""
    if opset not in OPSETS:
        raise UsageError(
            f"Opset {opset} is not supported; functions exist for {OPSETS[0]} to {OPSETS[-1]}.", "Use --opset 18."
        )


def node_attributes(num_groups: int, ddof: int, eps_var: float, eps_std: float) -> dict[str, int | float | str]:
    """Every attribute of a node; none is left to a default, which onnx.reference and onnx.inliner ignore."""
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
