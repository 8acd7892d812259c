"""Prepare an ONNX file for the rules: convert the opset, inline functions, fold constants, infer shapes."""

from __future__ import annotations

import ast
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import onnxsim
import torch
from onnx import helper, numpy_helper

from scconv_deploy.errors import ModelError, first_line
from scconv_deploy.graph.contract import DOMAIN, LARGEST_PROTO_BYTES, OPSETS, SITE, STANDARD_DOMAINS, check_opset
from scconv_deploy.graph.forms import is_foreign, without_foreign_functions
from scconv_deploy.graph.types import quantization_of
from scconv_deploy.graph.unknown import move_apart, move_back, unknown_operators
from scconv_deploy.records.stage import OpenStage

_FOLDS_GAMMA = "eliminate_nop_with_unit"
"""Skipped pass of onnxsim: where beta is 0 it drops an Add; then gamma * w becomes one constant, and gamma is lost."""
_SCOPES = "pkg.torch.onnx.name_scopes"


def opset_of(proto: onnx.ModelProto) -> int:
    """Opset version that a model imports for standard operators; 0 without one."""
    return next((o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS), 0)


def target_opset(proto: onnx.ModelProto, wanted: int | None) -> int:
    """Opset of the result: the wanted one, else the file's own, but at least 18.

    Raises:
        UsageError: there are no functions for the wanted opset.
        ModelError: there are none for the file's own.
    """
    if wanted is not None:
        check_opset(wanted)
        return wanted
    current = opset_of(proto)
    if current > OPSETS[-1]:
        raise ModelError(
            f"The file has opset {current}; functions exist for {OPSETS[0]} to {OPSETS[-1]}.",
            f"Export it with opset {OPSETS[-1]} or lower.",
        )
    return max(current, OPSETS[0])


def prepare(proto: onnx.ModelProto, opset: int, stage: OpenStage) -> ir.Model:
    """A copy of the model, ready for the rules.

    Args:
        proto: external data loaded.
        opset: of the result; see :func:`target_opset`.
        stage: record that gets the steps done and skipped.

    Raises:
        ModelError: too large for one ONNX file, or its opset cannot be converted.
    """
    if proto.ByteSize() > LARGEST_PROTO_BYTES:
        raise ModelError(
            f"The model has {proto.ByteSize() / 2**30:.1f} GiB, more than an ONNX file can hold (2 GiB).",
            "Rewrite only the part of the model that holds the ScConvs.",
        )
    sites = _sites(proto)
    working = onnx.ModelProto()
    working.CopyFrom(proto)
    if foreign := unknown_operators(working):
        stage.skipped.append((", ".join(foreign), "no operator of ONNX; left as it is"))
    move_apart(working)
    if opset_of(working) != opset:
        working = _convert(working, opset, stage)
    working = _inline_foreign(working, stage)
    _drop_initializer_inputs(working, stage)
    _fold_sums(working)
    working = _simplify(working, stage)
    working = _infer_shapes(working, stage)
    move_back(working)
    model = ir.from_proto(working)
    _restore(model, proto)
    for node in model.graph:
        name = next((sites[o.name] for o in node.outputs if o.name and o.name in sites), sites.get(f"node:{node.name}"))
        if name and node.domain != DOMAIN:
            node.metadata_props[SITE] = name
    return model


def strip_sites(model: ir.Model) -> None:
    """Remove the site marks of :func:`prepare` from nodes that are no SRU."""
    for node in model.graph:
        if node.domain != DOMAIN:
            node.metadata_props.pop(SITE, None)


def _convert(proto: onnx.ModelProto, opset: int, stage: OpenStage) -> onnx.ModelProto:
    current = opset_of(proto)
    if proto.functions:
        raise ModelError(
            f"The file has opset {current} and functions, which onnx's version converter drops.",
            f"Export it with opset {OPSETS[0]} to {OPSETS[-1]}, or leave --opset out.",
        )
    try:
        converted = onnx.version_converter.convert_version(proto, opset)
    except Exception as error:  # onnx raises ConvertError, RuntimeError and IndexError
        reason = first_line(error, type(error).__name__)
        raise ModelError(
            f"The file has opset {current}, which cannot be converted to {opset}: {reason}",
            f"Export it with opset {OPSETS[0]} or higher.",
        ) from error
    stage.applied.append(f"opset {current} -> {opset}")
    return converted


def _inline_foreign(proto: onnx.ModelProto, stage: OpenStage) -> onnx.ModelProto:
    """Inline functions of other domains, which may hold SRUs."""
    foreign = [function for function in proto.functions if is_foreign(function)]
    if foreign:
        stage.applied.append(f"{len(foreign)} functions inlined")
    return without_foreign_functions(proto)


def _drop_initializer_inputs(proto: onnx.ModelProto, stage: OpenStage) -> None:
    """Remove initializers from the inputs. Older exporters list them there; hosts do not use that to override them."""
    names = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.input if value.name not in names]
    dropped = len(proto.graph.input) - len(kept)
    if dropped:
        stage.applied.append(f"{dropped} initializers are no longer inputs")
        del proto.graph.input[:]
        proto.graph.input.extend(kept)


def _fold_sums(proto: onnx.ModelProto) -> None:
    """Replace each ReduceSum of a constant by the result of ``torch.sum``, before a simplifier adds in its own order.

    Where gamma nearly cancels, the order of the sum flips gates. A chain of additions already fixes its order.
    """
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
        given = [constants[name] for name in node.input if name in constants]
        if node.op_type != "ReduceSum" or node.domain not in ("", "ai.onnx"):
            continue
        if len(given) != len(node.input):
            continue
        values, *axes = [numpy_helper.to_array(tensor) for tensor in given]
        if values.dtype != np.float32:
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        named = [int(axis) for axis in axes[0].reshape(-1)] if axes else []
        if not named and attributes.get("noop_with_empty_axes", 0):
            continue
        over = named or list(range(values.ndim))
        total = torch.from_numpy(values.copy()).sum(dim=over, keepdim=bool(attributes.get("keepdims", 1)))
        folded = numpy_helper.from_array(total.numpy(), node.output[0])
        node.CopyFrom(helper.make_node("Constant", [], [node.output[0]], name=node.name, value=folded))


def _simplify(proto: onnx.ModelProto, stage: OpenStage) -> onnx.ModelProto:
    before = len(proto.graph.node)
    try:
        with _without_stderr():
            # a quantised weight behind its DequantizeLinear is a constant too, and would be folded to float
            quantized = bool(quantization_of(proto))
            simplified, same = onnxsim.simplify(
                proto, skipped_optimizers=[_FOLDS_GAMMA], skip_constant_folding=quantized
            )
    except Exception as error:  # onnxsim raises RuntimeError and its runtime's own types
        reason = first_line(error, type(error).__name__)
        stage.skipped.append(("onnxsim", f"it refuses the graph: {reason}"))
        return proto
    if not same:
        stage.skipped.append(("onnxsim", "it changes what the graph computes"))
        return proto
    stage.applied.append(f"onnxsim: {before} -> {len(simplified.graph.node)} nodes")
    return simplified


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Silence stderr: onnxsim writes a line for every node that it does not fold at first. Errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _infer_shapes(proto: onnx.ModelProto, stage: OpenStage) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception as error:  # onnx raises InferenceError, RuntimeError and ValueError
        reason = first_line(error, type(error).__name__)
        stage.skipped.append(("shape inference", reason))
        return proto


def _restore(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Restore the file's metadata, names and comments, which converters and simplifiers change."""
    model.metadata_props.clear()
    model.metadata_props.update({entry.key: entry.value for entry in proto.metadata_props})
    model.graph.name, model.graph.doc_string = proto.graph.name, proto.graph.doc_string or None
    model.producer_name, model.producer_version = proto.producer_name or None, proto.producer_version or None
    model.domain, model.doc_string = proto.domain or None, proto.doc_string or None
    model.model_version = proto.model_version or None


def _sites(proto: onnx.ModelProto) -> Mapping[str, str]:
    """Module paths that the exporter wrote down, by output name and by ``node:NAME`` of the node."""
    found: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type != "Concat":  # where an SRU ends
            continue
        scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
        site = _of_scopes(scopes) if scopes else _of_name(node.name)
        if site:
            found |= dict.fromkeys(node.output, site)
            if node.name:
                found[f"node:{node.name}"] = site
    return found


def _of_scopes(text: str) -> str:
    """Module path from torch.export's scopes, such as ``['', 'layer1', 'layer1.0', 'layer1.0.SRU', 'cat']``."""
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""


def _of_name(name: str) -> str:
    """Module path from a TorchScript node name, such as ``/layer1/layer1.0/SRU/Concat_1``.

    A module of a Sequential repeats its parent's name.
    """
    if not name.startswith("/"):
        return ""
    path: list[str] = []
    for part in name.split("/")[1:-1]:
        if path and part.startswith(f"{path[-1].split('.')[0]}."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)
