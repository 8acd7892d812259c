"""Kind of a checkpoint or weights file, told from its bytes before anything reads it."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, NamedTuple

from scconv_deploy.errors import IntegrityError, ModelError, UntrustedError, UsageError

ReadableKind = Literal["pickle", "safetensors", "unknown"]
"""Kinds that can be read; what is wrong with an ``unknown`` one, torch.load says."""

_START_BYTES = 512
_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_TORCH_PICKLE = (
    b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch's own magic number, pickled; what torch.save wrote before 1.6
)
_LARGEST_HEADER = 100_000_000  # bytes; of safetensors, its own limit
_MOST_FIELDS = 10_000  # of a ModelProto itself: a handful, and one for each function and entry of its metadata
_PROTOBUF_IR_VERSION = b"\x08"  # how an ONNX file that names its IR version first begins

_STARTS = (
    (b"\x89HDF", "an HDF5 file (Keras, TensorFlow)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"ftrt", "a TensorRT engine"),
    (b"\x7fELF", "a shared library or program"),
)
"""First bytes of files that are neither PyTorch's nor safetensors."""


class _Frozen(NamedTuple):
    """A file of torch's that holds a model without its Python modules.

    Attributes:
        name, short: what it is called, in full and when named again.
        lost: what has become of its modules.
        exported: arguments that give ``torch.onnx.export`` its model.
        state: expression for its state dict, with a place for the path.
    """

    name: str
    short: str
    lost: str
    exported: str
    state: str


_TORCHSCRIPT = _Frozen(
    "a TorchScript archive", "archive", "cannot be taken apart",
    "torch.jit.load(...), ..., dynamo=False", "torch.jit.load({}).state_dict()",
)  # fmt: skip
_EXPORTED_PROGRAM = _Frozen(
    "an exported program (torch.export.save)", "program", "are gone",
    "torch.export.load(...), dynamo=True", "torch.export.load({}).state_dict",
)  # fmt: skip


def readable_kind(path: Path, what: str) -> ReadableKind:
    """The way to read a checkpoint or weights file.

    Args:
        path: an existing file.
        what: ``Checkpoint`` (a MODEL) or ``Weights file``; what messages begin with.

    Raises:
        UsageError: it is of another command's kind, for example an ONNX file.
        ModelError: it is TorchScript or an exported program, which hold a model, but not one that can be used here.
        IntegrityError: it is of a kind that nothing here reads, or damaged.
    """
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    if not start:
        raise IntegrityError(f"{what} {path} is empty.", "Copy it again.")
    if start.startswith(b"version https://git-lfs"):
        raise IntegrityError(f"{what} {path} is a Git LFS pointer, not the file itself.", "Run git lfs pull.")
    if start.startswith(_ZIP):
        return _zip_kind(path, what)
    if _is_safetensors(path, start):  # before the others: the length of its header may begin as they do
        return "safetensors"
    if start.startswith(_PICKLE):
        if start[2 : 2 + len(_TORCH_PICKLE)] != _TORCH_PICKLE:
            raise UntrustedError(
                f"{what} {path} is a pickle that torch.save did not write; reading it would execute code.",
                "Read it where it was written, and save the state dict with torch.save.",
            )
        return "pickle"
    if _is_onnx(path, start):
        raise _onnx(path, what)
    other = _other(start)
    if other:
        raise IntegrityError(f"{what} {path} is {other}, not a PyTorch file.", "Give the file that torch.save wrote.")
    return "unknown"


def has_checkpoint_start(path: Path) -> bool:
    """Whether a file begins like one of torch.save, whatever its name."""
    with path.open("rb") as file:
        return file.read(4).startswith((_ZIP, _PICKLE))


def holds_weights_alone(path: Path) -> bool:
    """Whether a pickle makes tensors and no module, told from the names in it without executing it."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        with path.open("rb") as file:
            pickled = file.read(_LARGEST_HEADER)
    return b"_rebuild_tensor" in pickled and not (b"_modules" in pickled and b"_parameters" in pickled)


def _zip_kind(path: Path, what: str) -> ReadableKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise IntegrityError(
            f"{what} {path} is damaged: it begins as a PyTorch file (a zip archive), but its end is missing.",
            "Copy it again.",
        ) from error
    inner = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in names}  # below the archive's own folder
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        raise _frozen_error(path, what, _TORCHSCRIPT)
    if {"archive_format", "models/model.json"} & inner or "serialized_exported_program.json" in names:
        raise _frozen_error(path, what, _EXPORTED_PROGRAM)
    if "data.pkl" in inner:
        return "pickle"
    raise IntegrityError(
        f"{what} {path} is {_archive(names)}, not a PyTorch file.", "Give the file that torch.save wrote."
    )


def _archive(names: Iterable[str]) -> str:
    names = list(names)
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)"
    if "model.weights.h5" in names:
        return "a Keras model"
    shown = ", ".join(names[:3])
    return f"a zip archive (of {shown}{', ...' if len(names) > 3 else ''})" if names else "an empty zip archive"


def _frozen_error(path: Path, what: str, frozen: _Frozen) -> ModelError:
    if what == "Checkpoint":
        return ModelError(
            f"{path} is {frozen.name}, whose modules {frozen.lost}.",
            f"Give the Python module that it was made from; or export the {frozen.short} with "
            f"torch.onnx.export({frozen.exported}) and give that file to scconv-deploy rewrite.",
        )
    state = frozen.state.format(repr(str(path)))
    return ModelError(
        f"{what} {path} is {frozen.name}, not a state dict.", f"Save its weights: torch.save({state}, 'weights.pt')."
    )


def _onnx(path: Path, what: str) -> UsageError:
    if what == "Checkpoint":
        return UsageError(
            f"{path} is an ONNX file, expected a PyTorch model.",
            "Give it to scconv-deploy rewrite, convert or build, under a name that ends in .onnx.",
        )
    return UsageError(
        f"{what} {path} is an ONNX file, not a state dict.", "Give what torch.save(model.state_dict()) wrote."
    )


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Whether the length of a JSON header comes first, and then the header."""
    header = int.from_bytes(start[:8], "little")
    return start[8:9] == b"{" and header <= min(path.stat().st_size - 8, _LARGEST_HEADER)


def _is_onnx(path: Path, start: bytes) -> bool:
    """Whether the fields of a ModelProto stand one after the other up to the end of the file, a graph among them."""
    if not start.startswith(_PROTOBUF_IR_VERSION):
        return False
    size = path.stat().st_size
    fields: list[int] = []
    with path.open("rb") as file:
        while file.tell() < size and len(fields) < _MOST_FIELDS:
            field, wire = divmod(_varint(file), 8)
            fields.append(field)
            if wire not in (0, 2):
                return False  # a ModelProto has numbers and messages only
            length = _varint(file)
            if wire == 2:
                if file.tell() + length > size:
                    return False
                file.seek(length, 1)
    return {1, 7, 8} <= set(fields)  # ir_version, graph, opset_import


def _varint(file: BinaryIO) -> int:
    """The next number of a protobuf message; 0 at the end of the file."""
    value = shift = 0
    while (byte := (file.read(1) or b"\0")[0]) & 0x80 and shift < 63:
        value |= (byte & 0x7F) << shift
        shift += 7
    return value | byte << shift


def _other(start: bytes) -> str:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page (what the server answered in place of the file: a login, a warning or an error)"
    if text.startswith((b"{", b"[")):
        index = b'"weight_map"' in text or b'"metadata"' in text
        return "the index of weights in several files: join them first" if index else "JSON text"
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite model"
    return next((name for magic, name in _STARTS if start.startswith(magic)), "")
