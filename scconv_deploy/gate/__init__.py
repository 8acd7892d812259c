"""The gate: variants, exact cut, rounding bound, recognition. No ONNX in it."""

from scconv_deploy.gate.bound import count_flips, gate_form
from scconv_deploy.gate.cut import GateParameters, gate_parameters, tau
from scconv_deploy.gate.outputs import changed_gates, compare_outputs, relative_l2
from scconv_deploy.gate.recognize import Recognition, RecognizedSRU, recognize
from scconv_deploy.gate.swap import SwappedSRU, replace_modules, site_name, swap, swap_reachable
from scconv_deploy.gate.variant import VARIANTS, GateVariant
from scconv_deploy.outcomes import FlipCount, Refusal

__all__ = [
    "VARIANTS",
    "FlipCount",
    "GateParameters",
    "GateVariant",
    "Recognition",
    "RecognizedSRU",
    "Refusal",
    "SwappedSRU",
    "changed_gates",
    "compare_outputs",
    "count_flips",
    "gate_form",
    "gate_parameters",
    "recognize",
    "relative_l2",
    "replace_modules",
    "site_name",
    "swap",
    "swap_reachable",
    "tau",
]
