"""Which rules there are, in the order in which they are applied."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript.rewriter import RewriteRule

from scconv_deploy.rewrite.functions import MaskForm
from scconv_deploy.rewrite.rules import gamma_sum, mask_arithmetic, sigmoid_threshold, sru

RULES: dict[str, Sequence[RewriteRule]] = {
    sru.NAME: sru.RULES,
    gamma_sum.NAME: gamma_sum.RULES,
    sigmoid_threshold.NAME: sigmoid_threshold.RULES,
    mask_arithmetic.NAME: mask_arithmetic.RULES,
}


def rules_for(mask_form: MaskForm) -> dict[str, Sequence[RewriteRule]]:
    """Those that a mask form asks for: products with a mask stay products in the form ``multiply``."""
    return {name: rules for name, rules in RULES.items() if mask_form == "where" or name != mask_arithmetic.NAME}
