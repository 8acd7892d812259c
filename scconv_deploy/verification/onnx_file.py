"""Reading an ONNX file that somebody else may have written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError, Message
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from scconv_deploy.errors import IntegrityError, ModelError, UsageError, first_line
from scconv_deploy.rewrite.functions import LARGEST_PROTO_BYTES


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read and check an ONNX file, its external data included.

    Raises:
        UsageError: no such file.
        IntegrityError: empty, truncated, not ONNX, or external data outside the model's folder.
        ModelError: with its external data it is larger than what onnx's tools can hold; or an input has no shape, or an
            output none that follows from the graph.
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
        raise IntegrityError(f"{path} is truncated or not ONNX.", "Export or copy it again.") from error
    if not model.ir_version or not model.graph.output:
        raise IntegrityError(
            f"{path} is truncated or not ONNX: it has no IR version or no outputs.", "Export or copy it again."
        )
    external = [tensor for tensor in _tensors(model) if uses_external_data(tensor)]
    for tensor in external:
        _check_external(tensor, path)
    size = len(data) + sum(_bytes_of(tensor) for tensor in external)
    if size > LARGEST_PROTO_BYTES:
        raise ModelError(
            f"{path} has {size / 2**30:.1f} GiB with its external data; checker, simplifier and runtime take 2 GiB.",
            "Give the part that holds the ScConvs alone.",
        )
    try:
        load_external_data_for_model(model, str(path.parent))
        _complete(model, path)
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        reason = first_line(error, type(error).__name__).rstrip(".")
        raise IntegrityError(f"{path} is damaged: {reason}.", "Export or copy it again.") from error
    left = next((tensor for tensor in _tensors(model) if uses_external_data(tensor)), None)
    if left is not None:  # onnx looks for external data in fewer places than a tensor can be
        raise IntegrityError(f"{path}: the tensor {left.name!r} cannot have external data.", "Do not use this file.")
    return model


def _complete(model: onnx.ModelProto, path: Path) -> None:
    """Give outputs that were written without a type or shape those that follow from the graph, as runtimes do.

    ONNX asks for both and some exporters leave them out; onnx's checker would call the file invalid.
    """
    if without := next((value for value in model.graph.input if not _described(value)), None):
        raise ModelError(
            f"{path}: the input {without.name!r} has no type or shape, so nobody knows what to feed it.",
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
    """Whether a tensor has its type and a shape, of open axes or not; what is no tensor is left to the checker."""
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return kind is not None
    return bool(value.type.tensor_type.elem_type) and value.type.tensor_type.HasField("shape")


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, wherever it is: in graphs, functions, attributes, sparse tensors."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in [value] if isinstance(value, Message) else value:
                yield from _tensors(child)


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """What the tensor takes in memory; 0 for a type that onnx does not know (its checker refuses it)."""
    try:
        item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        return 0
    return item * max(0, math.prod(tensor.dims))


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Only plain files inside the model's folder: no absolute path, no '..', no link of either kind."""
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
