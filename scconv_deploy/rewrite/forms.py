"""Other forms of a file with SRU nodes: another mask form, functions expanded, functions left out."""

from __future__ import annotations

import onnx
import onnx.inliner

from scconv_deploy.errors import ModelError
from scconv_deploy.rewrite.functions import (
    DOMAIN,
    MASK_FORMS,
    OPERATORS,
    OPSETS,
    STRADDLE,
    FunctionKey,
    MaskForm,
    fingerprint,
    function_proto,
)


def change_mask_form(proto: onnx.ModelProto, form: MaskForm) -> tuple[list[str], list[tuple[str, str]]]:
    """Replace the bodies of the domain's functions in place by those of a form.

    Returns:
        which were replaced, and (function, reason) of those that were not ours to replace.
    """
    replaced, skipped = [], []
    for function in proto.functions:
        if function.domain != DOMAIN:
            continue
        opset = next((o.version for o in function.opset_import if o.domain in ("", "ai.onnx")), 0)
        name = f"{function.name} {function.overload}".strip()
        if opset not in OPSETS or function.name not in OPERATORS:
            skipped.append((name, f"no body is known for it at opset {opset}"))
            continue
        straddle = function.overload == STRADDLE
        bodies = {known: function_proto(FunctionKey(function.name, straddle, known, opset)) for known in MASK_FORMS}
        prints = {known: fingerprint(body) for known, body in bodies.items()}
        present = fingerprint(function)
        if present not in prints.values():
            skipped.append((name, "its body is not the one of the contract"))
        elif present != prints[form]:
            function.CopyFrom(bodies[form])
            replaced.append(name)
    return replaced, skipped


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every function expanded: for runtimes that read none. The domain's nodes are gone from it."""
    expanded = onnx.inliner.inline_local_functions(proto)
    left = sorted({node.op_type for node in expanded.graph.node if node.domain == DOMAIN})
    if left:
        raise ModelError(
            f"Nodes {', '.join(left)} have no function, so they cannot be expanded.",
            "Give a file that still has its functions.",
        )
    kept = [entry for entry in expanded.opset_import if entry.domain != DOMAIN]
    del expanded.opset_import[:]
    expanded.opset_import.extend(kept)
    return expanded


def without_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose SRU nodes have no meaning but a plugin's: TensorRT before 10.7 would prefer the function to it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    kept = [function for function in copy.functions if function.domain != DOMAIN]
    del copy.functions[:]
    copy.functions.extend(kept)
    for node in copy.graph.node:
        if node.domain == DOMAIN:
            node.overload = ""  # it named a function; a parser knows operators by their name alone
    return copy
