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
    """The model with every function of another domain expanded; itself where it has none.

    onnx_ir's inliner, for onnx's own forgets the defaults of a function's attributes (measured with onnx 1.23).

    Raises:
        ModelError: a function of another opset, in which its operators mean something else; or one that calls itself.
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
    """Whether a function is somebody else's; standard operators keep their meaning, whatever a file says of them."""
    if function.domain in STANDARD_DOMAINS:
        return not onnx.defs.has(function.name)
    return function.domain != DOMAIN


def _adopt_opset(function: ir.Function, opset: int | None) -> None:
    """Let a function have the model's opset if its operators mean the same in both."""
    own = function.opset_imports.get("")
    if opset is None or own in (None, opset):
        return
    operators = {node.op_type for node in function.all_nodes() if node.domain in STANDARD_DOMAINS}
    known = [o for o in operators if onnx.defs.has(o, own) and onnx.defs.has(o, opset)]
    same = [onnx.defs.get_schema(o, own).since_version == onnx.defs.get_schema(o, opset).since_version for o in known]
    if len(known) == len(operators) and all(same):
        function.opset_imports[""] = opset


def folded(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy with constants computed and sequences of known length resolved; None where the folder fails on it.

    Parsers of engines want axes, shapes and splits as constants. SRU nodes and their functions stay as they are.
    """
    model = ir.from_proto(proto)
    try:
        for _ in range(_FOLDINGS):  # a branch or sequence that was resolved gives more constants
            fold_constants(model, onnx_shape_inference=True, should_fold=_should_fold)
            RemoveUnusedNodesPass()(model)
    except Exception:  # onnxscript raises whatever an evaluator raises; the model as it is was refused already
        return None
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return ir.to_proto(model)


def _should_fold(node: ir.Node) -> bool | None:
    """Not the weights of a quantised model; of everything else the folder decides."""
    return False if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None


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
