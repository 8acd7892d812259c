"""The gate: variants, exact cut, rounding bound, recognition. No ONNX in it."""

from scconv_deploy.gate.bound import FlipCount, count_flips
from scconv_deploy.gate.cut import GateParameters, gate_parameters, tau
from scconv_deploy.gate.outputs import changed_gates, compare_outputs, relative_l2
from scconv_deploy.gate.recognize import Recognition, RecognizedSRU, Refusal, recognize
from scconv_deploy.gate.swap import SwappedSRU, replace_modules, site_name, swap, swap_reachable
from scconv_deploy.gate.variant import VARIANTS, GateVariant

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
    "gate_parameters",
    "recognize",
    "relative_l2",
    "replace_modules",
    "site_name",
    "swap",
    "swap_reachable",
    "tau",
]
