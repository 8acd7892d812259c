"""Reading an ONNX file that somebody else may have written."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import _get_all_tensors, uses_external_data

from scconv_deploy.errors import IntegrityError, UsageError


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read and check an ONNX file, its external data included.

    Raises:
        UsageError: no such file.
        IntegrityError: empty, truncated, not ONNX, or external data outside the model's folder.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist." if not path.exists() else f"{path} is not a file.")
    if path.stat().st_size == 0:
        raise IntegrityError(f"{path} is empty.", "Export it again.")
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} is truncated or not ONNX.", "Export or copy it again.") from error
    if not model.ir_version or not model.graph.output:
        raise IntegrityError(f"{path} is not an ONNX model: it has no IR version or no outputs.")
    for tensor in _get_all_tensors(model):
        if uses_external_data(tensor):
            _check_external(tensor, path)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        raise IntegrityError(f"{path} is damaged: {str(error).splitlines()[0]}", "Export or copy it again.") from error
    return model


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Only plain files inside the model's folder: no absolute path, no '..', no link of either kind."""
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    name = f"{path}: the external data {location!r} of {tensor.name!r}"
    pure = PurePosixPath(location.replace("\\", "/"))
    if not location or pure.is_absolute() or ":" in location or ".." in pure.parts:
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
