"""Read, check and write ONNX files, whoever wrote them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, Message
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from scconv_deploy.errors import IntegrityError, ModelError, UsageError, first_line
from scconv_deploy.graph.contract import (
    IR_VERSION,
    LARGEST_PROTO_BYTES,
    MODULE,
    STANDARD_DOMAINS,
)
from scconv_deploy.graph.hygiene import tidy
from scconv_deploy.graph.order import sort_nodes
from scconv_deploy.graph.unknown import set_apart, with_inner

_MARK_OF_DAMAGE = "TensorProto (tensor name:"
"""In the checker's message about data that is not as long as its shape says."""

_OTHER_FILES = {
    b"\x1f\x8b": ("compressed by gzip", "Unpack it first: gunzip."),
    b"PK\x03\x04": ("a zip archive, such as a checkpoint", "Unpack it, or name it as a MODEL."),
    b"version https://git-lfs": ("a pointer of Git LFS", "Fetch the file itself: git lfs pull."),
}


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read and check an ONNX file, its external data included.

    Raises:
        UsageError: no such file.
        IntegrityError: empty, truncated, not ONNX, data of a wrong length, or external data outside the model's folder.
        ModelError: larger than 2 GiB with its external data; not a valid graph; of a newer ONNX; an input without a
            shape, or an output whose shape does not follow from the graph.
    """
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise UsageError(f"{path} {problem}.", "Check the path.")
    data = path.read_bytes()
    if not data:
        raise IntegrityError(f"{path} is empty.", "Export it again.")
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError) as error:
        raise _not_onnx(path, data) from error
    if not model.ir_version or not (model.graph.output or model.opset_import):
        raise _not_onnx(path, data, ": it has no IR version or no outputs")
    external = [tensor for tensor in _tensors(model) if uses_external_data(tensor)]
    for tensor in external:
        _check_external(tensor, path)
    size = len(data) + sum(_bytes_of(tensor) for tensor in external)
    if size > LARGEST_PROTO_BYTES:
        raise ModelError(
            f"{path} has {size / 2**30:.1f} GiB with its external data; checker, simplifier and runtime take 2 GiB.",
            "Give only the part of the model that holds the ScConvs.",
        )
    try:
        load_external_data_for_model(model, str(path.parent))
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        raise _damaged(path, error) from error
    if not model.graph.output:
        raise ModelError(f"{path} is not a valid graph: it has no outputs.", "Export it again.")
    if not model.opset_import:  # it comes after the graph in a file
        raise _damaged(path, ValueError("it ends before its opset_import"))
    sort_nodes(model, str(path))
    _import_domains(model, path)
    _complete(model, path)
    _check(model, path)
    left = next((tensor for tensor in _tensors(model) if uses_external_data(tensor)), None)
    if left is not None:  # onnx looks for external data in fewer places than a tensor can be
        raise IntegrityError(f"{path}: the tensor {left.name!r} cannot have external data.", "Do not use this file.")
    return model


def _not_onnx(path: Path, data: bytes, why: str = "") -> IntegrityError:
    for start, (what, remedy) in _OTHER_FILES.items():
        if data.startswith(start):
            return IntegrityError(f"{path} is truncated or not ONNX: it is {what}.", remedy)
    return IntegrityError(f"{path} is truncated or not ONNX{why}.", "Export or copy it again.")


def _damaged(path: Path, error: Exception) -> IntegrityError:
    return IntegrityError(f"{path} is damaged: {_line(error)}.", "Export or copy it again.")


def _line(error: Exception) -> str:
    return first_line(error, type(error).__name__).rstrip(".")


def _check(model: onnx.ModelProto, path: Path) -> None:
    """Run onnx's checker without the operators that it does not know; runtimes and rewriter judge those."""
    newest = max(onnx.helper.VERSION_TABLE, key=lambda row: row[1])[1]
    if model.ir_version > newest:
        raise ModelError(
            f"{path} has IR version {model.ir_version}, written by a newer ONNX; this one reads up to {newest}.",
            f"Export it with IR version {IR_VERSION} or lower, or update the onnx package.",
        )
    try:
        with set_apart(model):
            onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = _line(error)
        if _MARK_OF_DAMAGE in reason:
            raise _damaged(path, error) from error
        remedy = "Export it again, or with another --opset."
        raise ModelError(f"{path} is not a valid graph: {reason}.", remedy) from error


def _import_domains(model: onnx.ModelProto, path: Path) -> None:
    """Import the newest known version of each domain that a file uses without an import, as runtimes do.

    The opset of standard operators is not guessed, because their meaning depends on it (ModelError).
    """
    for holder in (model, *model.functions):
        nodes = holder.graph.node if isinstance(holder, onnx.ModelProto) else holder.node
        named = {entry.domain for entry in holder.opset_import}
        opset = next((entry.version for entry in holder.opset_import if entry.domain in STANDARD_DOMAINS), 0)
        if opset < 1 and (node := next((n for n in with_inner(nodes) if n.domain in STANDARD_DOMAINS), None)):
            raise ModelError(
                f"{path} is not a valid graph: it imports no opset for its {node.op_type}.",
                "Export it again.",
            )
        for domain in sorted({node.domain for node in with_inner(nodes)} - named - set(STANDARD_DOMAINS)):
            versions = [s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.domain == domain]
            holder.opset_import.append(onnx.helper.make_opsetid(domain, max(versions, default=1)))


def _complete(model: onnx.ModelProto, path: Path) -> None:
    """Infer the types and shapes of outputs that were written without them, as runtimes do.

    ONNX asks for both, and onnx's checker refuses a file without them; some exporters leave them out.
    """
    if without := next((value for value in model.graph.input if not _described(value)), None):
        raise ModelError(
            f"{path}: the input {without.name!r} has no type or shape, so no data can be made for it.",
            "Export it with the shapes of its inputs, open axes included.",
        )
    lacking = {value.name for value in model.graph.output if not _described(value)}
    if not lacking:
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph.output
    except onnx.shape_inference.InferenceError:
        inferred = model.graph.output
    for value, found in zip(model.graph.output, inferred, strict=True):
        if value.name in lacking and not _described(found):
            raise ModelError(
                f"{path}: the output {value.name!r} has no type or shape, and none follows from the graph.",
                "Export it with the shapes of its outputs.",
            )
        value.CopyFrom(found)


def _described(value: onnx.ValueInfoProto) -> bool:
    """Whether a tensor has a type and a shape, open axes included; the checker judges other kinds of values."""
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return kind is not None
    return bool(value.type.tensor_type.elem_type) and value.type.tensor_type.HasField("shape")


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: in graphs, functions, attributes and sparse tensors."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in [value] if isinstance(value, Message) else value:
                yield from _tensors(child)


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """Size of the tensor in memory; 0 for a type that onnx does not know (its checker refuses it)."""
    try:
        item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        return 0
    return item * max(0, math.prod(tensor.dims))


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Refuse external data that is not a plain file inside the model's folder: absolute paths, '..', links."""
    location = next((entry.value for entry in reversed(tensor.external_data) if entry.key == "location"), "")
    name = f"{path}: the external data {location!r} of {tensor.name!r}"
    pure = PurePosixPath(location.replace("\\", "/"))
    if not pure.parts or pure.is_absolute() or ":" in location or ".." in pure.parts:
        raise IntegrityError(f"{name} lies outside the model's folder.", "Do not use this file.")
    place = path.parent
    for part in pure.parts:
        place = place / part
        if place.is_symlink():
            raise IntegrityError(f"{name} is a symbolic link.", "Replace it by the file itself.")
    if not place.is_file():
        raise IntegrityError(f"{name} is missing.", "Copy it next to the model.")
    if os.stat(place).st_nlink > 1:
        raise IntegrityError(f"{name} is a hard link.", "Replace it by a copy.")


def check(proto: onnx.ModelProto, name: str = "exported graph") -> None:
    """Run the full checker, shape inference included (ModelError, which names the node and its module).

    Args:
        name: of the graph in the error: the stage that made it, or its file.
    """
    try:
        with set_apart(proto):
            onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        node = _refused_node(proto)
        where, remedy = f"The {name}", "Export it again with another --opset."
        if node is not None:
            module = next((entry.value for entry in node.metadata_props if entry.key == MODULE), "")
            where = f"The {node.op_type} of {module or node.name or node.output[0]} in the {name}"
            remedy = "Write it with other operators, or leave its axes static."
        raise ModelError(f"{where} is invalid: {first_line(error)}", remedy) from error


def _refused_node(proto: onnx.ModelProto) -> onnx.NodeProto | None:
    """The first node that shape inference refuses, found by bisection over prefixes of the graph; None without one."""

    def refuses(count: int) -> bool:
        start = onnx.ModelProto()
        start.CopyFrom(proto)
        del start.graph.node[count:], start.graph.output[:]
        try:
            with set_apart(start):
                onnx.shape_inference.infer_shapes(start, check_type=True, strict_mode=True)
        except onnx.shape_inference.InferenceError:
            return True
        return False

    low, high = 0, len(proto.graph.node)
    if not refuses(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if refuses(middle) else (middle, high)
    return proto.graph.node[high - 1]


def serialize(model: ir.Model) -> bytes:
    """The bytes of ``model.onnx``: the same model gives the same bytes."""
    proto = ir.to_proto(model)
    tidy(proto)
    return proto.SerializeToString(deterministic=True)
