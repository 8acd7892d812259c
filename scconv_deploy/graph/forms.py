"""Other forms of a file with SRU nodes: another mask form, functions expanded, functions left out."""

from __future__ import annotations

import onnx
import onnx.inliner
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants

from scconv_deploy.errors import ModelError, first_line
from scconv_deploy.graph.contract import (
    DOMAIN,
    MASK_FORMS,
    OPERATORS,
    OPSETS,
    STANDARD_DOMAINS,
    STRADDLE,
    FunctionKey,
    MaskForm,
)
from scconv_deploy.graph.functions import fingerprint, function_proto

_FOLDINGS = 2


def change_mask_form(proto: onnx.ModelProto, form: MaskForm) -> tuple[list[str], list[tuple[str, str]]]:
    """Replace the bodies of the domain's functions by those of a mask form, in place.

    Returns:
        names of the replaced functions, and (function, reason) of those that were left as they are.
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
    """A copy with every function expanded, for runtimes that read none; it holds no node of the domain."""
    expanded = onnx.inliner.inline_local_functions(without_foreign_functions(proto))
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


def without_foreign_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every function of another domain expanded; the model itself where it has none.

    Expanded by onnx_ir, because onnx's own inliner drops the defaults of attributes (measured with onnx 1.23).

    Raises:
        ModelError: a function has another opset, in which its operators mean something else; or it calls itself.
    """
    if not any(is_foreign(function) for function in proto.functions):
        return proto
    model = ir.from_proto(proto)
    for function in model.functions.values():
        _adopt_opset(function, model.opset_imports.get(""))
    try:
        InlinePass(criteria=is_foreign)(model)
    except (ValueError, ir.passes.PassError) as error:
        reason = f"A function cannot be inlined: {first_line(error)}"
        raise ModelError(reason, "Export it without functions.") from error
    for identifier in [i for i, function in model.functions.items() if is_foreign(function)]:  # never called
        del model.functions[identifier]
    return ir.to_proto(model)


def is_foreign(function: onnx.FunctionProto | ir.Function) -> bool:
    """Whether a function is of another domain than ours. A function that redefines a standard operator is not."""
    if function.domain in STANDARD_DOMAINS:
        return not onnx.defs.has(function.name)
    return function.domain != DOMAIN


def _adopt_opset(function: ir.Function, opset: int | None) -> None:
    """Give a function the model's opset if its operators mean the same in both."""
    own = function.opset_imports.get("")
    if opset is None or own in (None, opset):
        return
    operators = {node.op_type for node in function.all_nodes() if node.domain in STANDARD_DOMAINS}
    known = [o for o in operators if onnx.defs.has(o, own) and onnx.defs.has(o, opset)]
    same = [onnx.defs.get_schema(o, own).since_version == onnx.defs.get_schema(o, opset).since_version for o in known]
    if len(known) == len(operators) and all(same):
        function.opset_imports[""] = opset


def folded(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy with constants folded and sequences of known length resolved; None where folding fails.

    TensorRT's parsers need axes, shapes and splits as constants. SRU nodes and their functions stay as they are.
    """
    model = ir.from_proto(proto)
    try:
        for _ in range(_FOLDINGS):  # a branch or sequence that was resolved gives more constants
            fold_constants(model, onnx_shape_inference=True, should_fold=_should_fold)
            RemoveUnusedNodesPass()(model)
    except Exception:  # onnxscript raises whatever an evaluator raises
        return None
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return ir.to_proto(model)


def _should_fold(node: ir.Node) -> bool | None:
    """False for the weights of a quantised model; None leaves the decision to onnxscript."""
    return False if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None


def without_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the domain's functions, so that only a plugin gives its nodes a meaning.

    TensorRT before 10.7 prefers a function to the plugin.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    kept = [function for function in copy.functions if function.domain != DOMAIN]
    del copy.functions[:]
    copy.functions.extend(kept)
    for node in copy.graph.node:
        if node.domain == DOMAIN:
            node.overload = ""  # parsers know plugins by their name alone
    return copy
