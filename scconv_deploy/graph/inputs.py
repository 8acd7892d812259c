"""Inputs for an ONNX graph whose model is not at hand: seeded noise, or arrays from a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from scconv_deploy.errors import IntegrityError, ModelError, UsageError
from scconv_deploy.graph.reach import Reach, reaches

Feed = dict[str, np.ndarray]
"""Arrays by the names of inputs."""

Run = Callable[[Feed], object]
"""Function that runs a model; it raises ModelError where the model refuses its inputs."""

Sizes = Mapping[str, int]
"""Sizes of open axes by their symbols."""

_FEW, _MANY = 4, 4096  # largest drawn size, and largest drawn count where no table limits it
_LARGEST = 4099  # of an open axis: further than float16 can count, and odd
_ELEMENTS = 2**16  # most elements of an input whose axes are made large
_SMALL = (64, 224, 32, 2)  # sizes of all open axes but the first, tried in this order
_OF_VOLUMES = 16  # the same for inputs with three spatial axes, which then have about as many elements
_OTHER = (67, 96, 48)  # the first is odd, as images are; networks that halve and double need multiples
_SHARES = (1.0, 0.25, 0.0)  # of the range of integers, tried in this order
_FACTOR = 4  # a third sample is worth its time if it has an axis this much larger


def graph_inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs of a graph that are no initializers."""
    initializers = {tensor.name for tensor in proto.graph.initializer}
    return [value for value in proto.graph.input if value.name not in initializers]


def samples(proto: onnx.ModelProto, seed: int, run: Run) -> dict[str, Feed]:
    """Seeded inputs by the name of the sample: a small one, another, and a large one where an axis is open.

    Floats are drawn from a normal distribution. Integers have the range that the graph allows: indices to the end of
    their table, counts to some thousands, sizes to a few. Floats that become an index have it from the second sample
    on. An open axis has one size wherever its symbol stands. A sample that the model refuses is drawn again from a
    smaller range.

    Args:
        proto: external data loaded.
        run: runs the model in the runtime that judges it.

    Raises:
        ModelError: an input is not a numeric tensor of a known rank.
    """
    inputs, reach = graph_inputs(proto), reaches(proto)
    for value in inputs:
        _require_numbers(value)
    found: dict[str, Feed] = {}
    for number, (name, sizes) in enumerate(_plans(inputs).items()):
        found |= _first_that_runs(name, inputs, sizes, reach, run, (seed, number))
    if not found:  # nothing runs: the run that follows reports the model's own message
        found["seeded noise"] = _draw(inputs, _sizes(inputs, 2, _SMALL[0]), reach, (seed, 0), 0.0)
    return found


def noise(proto: onnx.ModelProto, seed: int, run: Run) -> Feed:
    """The first of :func:`samples`."""
    inputs = graph_inputs(proto)
    for value in inputs:
        _require_numbers(value)
    tame = not any(_symbols(value) or _dtype(value).kind != "f" for value in inputs)
    found = samples(proto, seed, (lambda feed: None) if tame else run)
    return next(iter(found.values()))


def _plans(inputs: Sequence[onnx.ValueInfoProto]) -> dict[str, list[Sizes]]:
    """Samples by name, and the sizes to try for each."""
    small: list[Sizes] = [_sizes(inputs, 2, size) for size in _SMALL]
    other: list[Sizes] = [_bounded(inputs, _sizes(inputs, _OTHER[0], size)) for size in _OTHER]
    plans: dict[str, list[Sizes]] = {"seeded noise": small, "more seeded noise": [*other, *small]}
    axes = list(dict.fromkeys(symbol for value in inputs for symbol in _symbols(value).values()))
    if axes:
        last = axes[-1]
        large = _bounded(inputs, _sizes(inputs, 1, _SMALL[0]) | {last: _LARGEST})
        even = large | {last: large[last] // 32 * 32}
        narrow = _bounded(inputs, dict.fromkeys(axes, 1) | {last: _LARGEST})
        plans["seeded noise of a large size"] = [
            sizes for sizes in (large, even, narrow) if sizes[last] >= _FACTOR * other[0][last]
        ]
    return plans


def _first_that_runs(
    name: str,
    inputs: Sequence[onnx.ValueInfoProto],
    plans: Sequence[Sizes],
    reach: Mapping[str, Reach],
    run: Run,
    seed: tuple[int, int],
) -> dict[str, Feed]:
    """The first draw that the model takes, under this name; nothing if it takes none."""
    ranged = any(_dtype(value).kind in "iu" or reach.get(value.name, Reach()).table is not None for value in inputs)
    for sizes in dict.fromkeys(tuple(plan.items()) for plan in plans):
        for share in _SHARES if ranged else _SHARES[:1]:  # floats alone are the same for every share
            feed = _draw(inputs, dict(sizes), reach, seed, share)
            try:
                run(feed)
            except ModelError:
                continue
            return {name: feed}
    return {}


def _draw(
    inputs: Sequence[onnx.ValueInfoProto],
    sizes: Sizes,
    reach: Mapping[str, Reach],
    seed: tuple[int, int],
    share: float,
) -> Feed:
    """One sample of seeded inputs.

    Args:
        seed: the user's, and the number of the sample.
        share: of the range of integers that is used; 0.0 makes indices and counts 0, and sizes 1.
    """
    rng = np.random.default_rng(seed)
    feed = {}
    for value in inputs:
        symbols = _symbols(value)
        axes = value.type.tensor_type.shape.dim
        shape = [sizes[symbols[i]] if i in symbols else axis.dim_value for i, axis in enumerate(axes)]
        dtype, found = _dtype(value), reach.get(value.name, Reach())
        if dtype.kind in "iu":
            feed[value.name] = _integers(shape, dtype, found, rng, share)
        elif dtype.kind != "b" and found.table is not None and seed[1] > 0 and share:
            feed[value.name] = rng.integers(0, max(1, int(found.table * share)), shape).astype(dtype)
        else:
            feed[value.name] = random_array(shape, dtype, rng)
    return feed


def random_array(shape: Sequence[int], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Seeded values: normal for floating types, 0 and 1 for others; :func:`.model.signature.random_tensor` in NumPy."""
    if dtype.kind in "iub":
        return rng.integers(0, 2, tuple(shape)).astype(dtype)
    return rng.normal(size=tuple(shape)).astype(dtype)


def _integers(
    shape: Sequence[int], dtype: np.dtype, reach: Reach, rng: np.random.Generator, share: float
) -> np.ndarray:
    if reach.is_size:
        return rng.integers(1, int(_FEW * share) + 2, shape).astype(dtype)
    below = min(reach.table or _MANY, int(np.iinfo(dtype).max) + 1)
    large = rng.integers(0, max(1, int(below * share)), shape)
    if reach.table is not None or not share:
        return large.astype(dtype)
    small = rng.integers(0, 2, shape)
    if reach.is_counted or len(shape) < 2 or dtype.itemsize == 1:  # a step in time, a length, a pixel
        return np.where(rng.random(shape) < 0.25, small, large).astype(dtype)
    return small.astype(dtype)  # most likely a mask, whose complement 1 - mask is taken


def _sizes(inputs: Sequence[onnx.ValueInfoProto], first: int, others: int) -> dict[str, int]:
    """Sizes of all symbols: ``first`` for those at axis 0 of any input, ``others`` for the rest."""
    found: dict[str, int] = {}
    for value in inputs:
        largest = _OF_VOLUMES if len(value.type.tensor_type.shape.dim) > 4 else others
        for axis, symbol in _symbols(value).items():
            found[symbol] = first if axis == 0 else found.get(symbol, min(others, largest))
    return found


def _bounded(inputs: Sequence[onnx.ValueInfoProto], sizes: dict[str, int]) -> dict[str, int]:
    """The sizes with the batch, then the longest axis, reduced until each input has at most ``_ELEMENTS`` elements."""
    for value in inputs:
        symbols = _symbols(value)
        axes = value.type.tensor_type.shape.dim
        longest = max(symbols.values(), key=lambda symbol: sizes[symbol], default="")
        for symbol in (symbols.get(0, ""), longest):
            shape = [sizes[symbols[i]] if i in symbols else axis.dim_value for i, axis in enumerate(axes)]
            if symbol and (count := math.prod(shape)) > _ELEMENTS:
                sizes[symbol] = min(sizes[symbol], max(3, sizes[symbol] * _ELEMENTS // count))
    return sizes


def _symbols(value: onnx.ValueInfoProto) -> dict[int, str]:
    """Open axes of an input with their symbols; an axis without a symbol gets its own."""
    axes = value.type.tensor_type.shape.dim
    is_open = [not axis.HasField("dim_value") or axis.dim_value < 0 for axis in axes]  # -1 as runtimes read it
    return {i: a.dim_param or f"{value.name}:{i}" for i, a in enumerate(axes) if is_open[i]}


def _require_numbers(value: onnx.ValueInfoProto) -> None:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise ModelError(f"Input {value.name} is no tensor of a known rank.", "Give --data.")
    if kind.elem_type == onnx.TensorProto.STRING:
        raise ModelError(f"Input {value.name} takes strings, for which there is no noise.", "Give --data.")


def _dtype(value: onnx.ValueInfoProto) -> np.dtype:
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def load(source: str, proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Read an ``.npz`` with one array per input.

    Raises:
        UsageError: no such file; or its arrays have other names or shapes than the inputs.
        IntegrityError: the file is damaged.
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
