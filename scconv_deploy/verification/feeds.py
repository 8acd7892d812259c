"""Inputs for an ONNX graph whose model is not at hand: seeded noise, or arrays from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from scconv_deploy.errors import IntegrityError, ModelError, UsageError

_OPEN_SIZE = {0: 2}  # of an axis without a size, by its place; the others are as wide as a small image
_OTHER_OPEN_SIZE = 64
_OPEN_SIZE_OF_VOLUMES = 16


def graph_inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs of a graph that are no initializers."""
    initializers = {tensor.name for tensor in proto.graph.initializer}
    return [value for value in proto.graph.input if value.name not in initializers]


def noise(proto: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    """Seeded inputs: normal numbers, or zeros for integers, which may be indices; one size for each symbol.

    Raises:
        ModelError: an input has no known rank.
    """
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in graph_inputs(proto):
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
            raise ModelError(f"Input {value.name} is no tensor of a known rank.", "Give --data.")
        other = _OPEN_SIZE_OF_VOLUMES if len(kind.shape.dim) > 4 else _OTHER_OPEN_SIZE
        shape = [axis.dim_value or _OPEN_SIZE.get(place, other) for place, axis in enumerate(kind.shape.dim)]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        feeds[value.name] = rng.normal(size=shape).astype(dtype) if dtype.kind == "f" else np.zeros(shape, dtype)
    return feeds


def load(source: str, proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Read an ``.npz`` with one array per input.

    Raises:
        UsageError: no such file, or other arrays in it, or of other shapes.
        IntegrityError: it is damaged.
    """
    inputs = graph_inputs(proto)
    names = [value.name for value in inputs]
    if not Path(source).is_file():
        raise UsageError(f"--data {source} is not a file.", "Give an .npz with one array per input.")
    try:
        with np.load(source, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except Exception as error:  # zipfile, zlib and NumPy each raise their own on a damaged file
        raise IntegrityError(f"--data {source} is damaged or not an .npz.", "Save it with np.savez.") from error
    if set(arrays) != set(names):
        raise UsageError(
            f"--data {source} holds {', '.join(arrays)}.", f"Save one array per input: {', '.join(names)}."
        )
    for value in inputs:
        _check(source, value, arrays[value.name])
    kinds = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in inputs}
    return {name: np.ascontiguousarray(array, dtype=kinds[name]) for name, array in arrays.items()}


def _check(source: str, value: onnx.ValueInfoProto, array: np.ndarray) -> None:
    """Refuse an array that the input cannot take."""
    sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param or "N" for d in value.type.tensor_type.shape.dim]
    open_or_equal = [isinstance(size, str) or size == found for size, found in zip(sizes, array.shape, strict=False)]
    if len(sizes) != array.ndim or not all(open_or_equal) or array.dtype.kind not in "biuf":
        found, expected = f"{array.dtype}{list(array.shape)}", ", ".join(map(str, sizes))
        raise UsageError(
            f"--data {source}: {value.name} is {found}, expected numbers [{expected}].", "Save it in the input's shape."
        )
