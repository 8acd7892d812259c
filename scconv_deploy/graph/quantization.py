"""Quantisers of an ONNX file, whoever wrote it: what they quantise, and where these places are in PyTorch.

Understood are a QuantizeLinear and DequantizeLinear pair before the input of a Conv or Gemm, before one input of an Add
or all inputs of a Concat, and a DequantizeLinear before weights: int8 ones, or float ones behind a QuantizeLinear.
Anything else is listed with the reason; a file with such quantisers cannot be proved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import numpy_helper

from scconv_deploy.errors import IntegrityError
from scconv_deploy.gate.other_gates import Found
from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import LAYER, STANDARD_DOMAINS
from scconv_deploy.graph.stored_weights import StoredWeights, stored_weights
from scconv_deploy.graph.types import all_graphs
from scconv_deploy.records.codec import DecodeError, decode, parse
from scconv_deploy.records.quantization import (
    LARGEST_CODE,
    METADATA,
    LayerPlan,
    Levels,
    QuantizationPlan,
    QuantizationRecord,
    SkipPlan,
    gate_of,
)

_DOMAINS = (*STANDARD_DOMAINS, "com.microsoft")
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_SUFFIXES = ("_quantized", "_q", "::int8")
_WEIGHT = ".weight"
NO_MODULE = "no module is known for its weights"
NO_ADDITION = "the file does not say in which module it stands"
"""Reasons for quantisers that are understood, and whose place in PyTorch nothing tells."""


@dataclass(frozen=True, eq=False)
class Quantizer:
    """A pair of quantisers on an activation.

    Attributes:
        value: value that is quantised; ``codes`` is the result of the QuantizeLinear node.
        node: name of that node.
        sources: the same before it was quantised a first time: inputs of a Concat that have the same levels, joined
            along ``axis``; or the value itself.
        columns: number of features, if a Gemm reads it: a matrix, whose rows may be several axes in PyTorch; else 0.
    """

    value: str
    codes: str
    levels: Levels
    node: str
    sources: tuple[str, ...]
    axis: int = 0
    columns: int = 0


@dataclass(frozen=True, eq=False)
class LayerSite:
    """A quantised Conv or Gemm.

    Attributes:
        path: path of its module in PyTorch; ``call`` counts its calls from 1.
        norm: path of the module that gives its output, if it is not ``path``: a folded BatchNorm.
        quantizer: of its input; None if that stays in float.
        node: its name in reports.
    """

    path: str
    call: int
    norm: str
    node: str
    quantizer: Quantizer | None
    weights: StoredWeights


@dataclass(frozen=True, eq=False)
class SkipSite:
    """A quantised input of an Add; see :class:`..records.quantization.SkipPlan`."""

    path: str
    addition: int
    operand: int
    node: str
    quantizer: Quantizer


@dataclass(eq=False)
class Quantization:
    """Quantisers of a file.

    Attributes:
        joined: levels of the quantised inputs of concatenations, by value; they change nothing.
        stored: int8 weights of all layers, of those without a known place too.
        unknown: node -> why it cannot be found in PyTorch.
        unsound: node -> what is wrong with its scale, whatever it quantises.
        reads: number of inputs that read a quantised value, by its name.
        record: origin of the scales, if the file holds it.
        named: quantisers that are modules of the model itself, by the names of their gates, in place of those of sites.
    """

    layers: list[LayerSite] = field(default_factory=list)
    skips: list[SkipSite] = field(default_factory=list)
    joined: dict[str, Levels] = field(default_factory=dict)
    stored: list[StoredWeights] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    unsound: dict[str, str] = field(default_factory=dict)
    reads: Counter[str] = field(default_factory=Counter)
    record: QuantizationRecord | None = None
    named: dict[str, Quantizer] = field(default_factory=dict)

    @property
    def misplaced(self) -> dict[str, str]:
        """Those of the unknown that are no layers: this tool puts no quantiser there."""
        return {node: why for node, why in self.unknown.items() if not why.startswith((NO_MODULE, NO_ADDITION))}

    @property
    def plan(self) -> QuantizationPlan:
        """The same for PyTorch."""
        calls: dict[str, list[LayerSite]] = {}
        for site in self.layers:
            calls.setdefault(site.path, []).append(site)
        layers = [
            LayerPlan(
                path,
                tuple(None if s.quantizer is None else s.quantizer.levels for s in found),
                tuple(map(float, found[0].weights.scales.ravel())),
                found[0].norm,
                found[0].weights.data,
                LARGEST_CODE if self.record is None else self.record.largest_code,
            )
            for path, found in calls.items()
        ]
        skips = [SkipPlan(s.path, s.addition, s.operand, s.quantizer.levels) for s in self.skips]
        return QuantizationPlan(tuple(layers), tuple(skips))

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Quantisers of activations by the names of their gates (:func:`..records.quantization.gate_of`)."""
        found = dict(self.named)
        numbers: Counter[str] = Counter()
        sites = [(site.path, site.quantizer) for site in self.layers] + [(s.path, s.quantizer) for s in self.skips]
        for path, quantizer in sites:
            if quantizer is not None:
                numbers[path] += 1
                found[gate_of(path, numbers[path])] = quantizer
        return found


def float_name(weight: str) -> str:
    """Name of a weight before it was quantised, from the name of its codes."""
    return next((weight.removesuffix(suffix) for suffix in _SUFFIXES if weight.endswith(suffix)), weight)


def layer_path(weight: str, stated: str) -> str:
    """Path of the module that has a layer's weights: as the node states it, else by the weights' name; "" if unknown.

    Args:
        weight: name of the initializer, without an ending of a quantiser.
        stated: the node's :data:`.contract.LAYER`, or "".
    """
    return stated or (weight.removesuffix(_WEIGHT) if weight.endswith(_WEIGHT) else "")


def read_quantization(model: onnx.ModelProto) -> Quantization:
    """Read the quantisers of a model's main graph."""
    return _Reader(model).read()


def read_trained(model: onnx.ModelProto) -> Quantization:
    """Read the quantisers of a file whose model in PyTorch has them as modules: each by the path of its module."""
    return _Reader(model).read_trained()


def record_of(model: onnx.ModelProto) -> QuantizationRecord | None:
    """Origin of a file's scales, from its metadata; None without (IntegrityError if it is damaged)."""
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA), "")
    if not text:
        return None
    try:
        return decode(QuantizationRecord, parse(text))
    except DecodeError as error:
        raise IntegrityError(
            f"The metadata {METADATA} are damaged: {error}.", "Quantise the float file again."
        ) from error


def as_found(name: str, one: Quantizer) -> Found:
    """A quantiser as a gate: it rounds ``x / scale``, cut off at the first and last code."""
    return Found(name, one.codes, one.sources, one.node, "round", levels=one.levels, axis=one.axis, columns=one.columns)


class _Reader:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._model, self._nodes = model, list(model.graph.node)
        self._producers = {output: node for node in self._nodes for output in node.output}
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self._nodes:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._outputs = {value.name for value in model.graph.output}
        self._has_modules = any(instrument.module_of(node) for node in self._nodes)
        self._calls: Counter[str] = Counter()
        self._additions: Counter[str] = Counter()
        self._found = Quantization(record=record_of(model), reads=self._reads())

    def _reads(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for node in self._nodes:
            rounding = self._producers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if rounding is not None and rounding.op_type == "QuantizeLinear":
                read = node.output[0]
                found[rounding.input[0]] += sum(list(one.input).count(read) for one in self._readers.get(read, ()))
        return found

    def read(self) -> Quantization:
        for node in self._nodes:
            if node.domain in _DOMAINS and node.op_type in (_QUANTIZE, _DEQUANTIZE):
                self._check_readers(node)
                self._check_scale(node)
                continue
            behind = {i: source for i, name in enumerate(node.input) if (source := self._dequantizer(name)) is not None}
            if node.op_type == "Add" and node.domain == "" and not any(map(self._is_constant, node.input)):
                self._additions[instrument.module_of(node)] += 1
            if behind:
                self._read(node, behind)
        for graph in all_graphs(self._model.graph):
            if graph is not self._model.graph and any(n.op_type in (_QUANTIZE, _DEQUANTIZE) for n in graph.node):
                self._found.unknown[graph.name or "a branch"] = "quantisers in a branch or loop"
        for function in self._model.functions:
            if any(n.op_type in (_QUANTIZE, _DEQUANTIZE) for n in function.node):
                self._found.unknown[f"{function.domain}::{function.name}"] = "quantisers in a function"
        for name in self._outputs:
            if self._dequantizer(name) is not None:
                self._found.unknown[name] = "an output is quantised"
        return self._found

    def read_trained(self) -> Quantization:
        """Layers with integer weights, and every pair under the name of its module; a reader may be any node."""
        layers = self.read().layers
        self._found = Quantization([replace(site, quantizer=None) for site in layers])
        calls: Counter[str] = Counter()
        for node in self._nodes:
            if not self._is(node, _QUANTIZE) or self._is_constant(node.input[0]):
                continue
            path, levels = instrument.module_of(node), self._levels(node)
            self._check_readers(node)
            if not path or levels is None:
                self._found.unknown[instrument.site_of(node)] = "no module is known for it, or it has several scales"
                continue
            if any(self._levels(reader) != levels for reader in self._readers.get(node.output[0], [])):
                self._found.unknown[instrument.site_of(node)] = "it is dequantised with another scale"
            calls[path] += 1
            one = Quantizer(node.input[0], node.output[0], levels, instrument.site_of(node), (node.input[0],))
            self._found.named[gate_of(path, calls[path])] = one
        return self._found

    def _check_readers(self, node: onnx.NodeProto) -> None:
        """Note codes that something else than a DequantizeLinear reads."""
        if node.op_type == _QUANTIZE:
            others = [n for n in self._readers.get(node.output[0], []) if not self._is(n, _DEQUANTIZE)]
            if others or node.output[0] in self._outputs:
                self._found.unknown[instrument.site_of(node)] = "its codes are not dequantised for every reader"

    def _check_scale(self, node: onnx.NodeProto) -> None:
        scale = self._constant(node.input[1])
        values = np.ones(1) if scale is None else scale.astype(np.float32)
        if not np.isfinite(values).all() or (values <= 0).any():
            least = values[~np.isfinite(values) | (values <= 0)].flat[0]
            self._found.unsound[instrument.site_of(node)] = f"a scale is {least:g}, expected above 0 and finite"

    def _read(self, node: onnx.NodeProto, behind: Mapping[int, onnx.NodeProto]) -> None:
        what = instrument.site_of(node)
        if node.op_type in ("Conv", "Gemm") and (weights := self._weights(node, behind.get(1))) is not None:
            self._found.stored.append(weights)
        if node.domain == "" and node.op_type in ("Conv", "Gemm") and set(behind) <= {0, 1}:
            problem = self._layer(node, behind)
        elif node.domain == "" and node.op_type in ("Conv", "Gemm"):
            problem = "its bias is quantised"
        elif node.domain == "" and node.op_type == "Add" and len(behind) == 1:
            problem = self._skip(node, behind)
        elif node.domain == "" and node.op_type == "Concat":
            problem = self._concat(node, behind)
        else:
            problem = f"{node.op_type} reads a quantised value"
        if problem:
            self._found.unknown[what] = problem

    def _layer(self, node: onnx.NodeProto, behind: Mapping[int, onnx.NodeProto]) -> str:
        quantizer = None
        if 0 in behind:
            quantizer = self._quantizer(behind[0])
            if quantizer is None:
                return "its input is quantised otherwise than by a pair with one scale"
        weights = self._weights(node, behind.get(1))
        if weights is None:
            return "its weights are not stored as int8" if 1 not in behind else "its weights are dequantised otherwise"
        path = layer_path(float_name(weights.name), instrument.metadata_of(node, LAYER))
        if not path:
            return f"{NO_MODULE} {weights.name}"
        self._calls[path] += 1
        module = instrument.module_of(node)
        norm = module if module not in ("", path) else ""
        self._found.layers.append(
            LayerSite(path, self._calls[path], norm, instrument.site_of(node), quantizer, weights)
        )
        return ""

    def _skip(self, node: onnx.NodeProto, behind: Mapping[int, onnx.NodeProto]) -> str:
        ((index, source),) = behind.items()
        quantizer = self._quantizer(source)
        if quantizer is None:
            return "its input is quantised otherwise than by a pair with one scale"
        if not self._has_modules:
            return NO_ADDITION
        path = instrument.module_of(node)
        site = SkipSite(path, self._additions[path], index, instrument.site_of(node), quantizer)
        self._found.skips.append(site)
        return ""

    def _concat(self, node: onnx.NodeProto, behind: Mapping[int, onnx.NodeProto]) -> str:
        """Quantised inputs of a Concat change nothing if all readers of its result quantise it with the same levels."""
        readers = self._readers.get(node.output[0], [])
        if node.output[0] in self._outputs or not all(self._is(n, _QUANTIZE) for n in readers) or not readers:
            return "its result is read in float"
        inputs = [self._quantizer(source) for source in behind.values()]
        self._found.joined |= {found.value: found.levels for found in inputs if found is not None}
        levels = {found.levels if found else None for found in inputs}
        levels |= {self._levels(reader) for reader in readers}
        return "" if len(levels) == 1 and None not in levels else "its inputs and its result have several scales"

    # --- nodes -------------------------------------------------------------------------------------------------------

    def _is(self, node: onnx.NodeProto | None, operator: str) -> bool:
        return node is not None and node.op_type == operator and node.domain in _DOMAINS

    def _dequantizer(self, name: str) -> onnx.NodeProto | None:
        node = self._producers.get(name)
        return node if self._is(node, _DEQUANTIZE) else None

    def _quantizer(self, dequantize: onnx.NodeProto) -> Quantizer | None:
        """The pair that ends in a DequantizeLinear node; None if it is no pair with one scale."""
        node = self._producers.get(dequantize.input[0])
        if node is None or not self._is(node, _QUANTIZE):
            return None
        levels = self._levels(node)
        if levels is None or levels != self._levels(dequantize):
            return None
        value = node.input[0]
        axis, sources = self._sources(value, levels)
        columns = self._columns(dequantize.output[0])
        return Quantizer(value, node.output[0], levels, instrument.site_of(node), sources, axis, columns)

    def _columns(self, value: str) -> int:
        """Features of a value that a Gemm reads as its data; 0 if none does."""
        for node in self._readers.get(value, []):
            behind = self._dequantizer(node.input[1]) if node.op_type == "Gemm" and node.input[0] == value else None
            weights = self._weights(node, behind)
            if weights is not None:
                return int(weights.codes.shape[1])
        return 0

    def _sources(self, value: str, levels: Levels) -> tuple[int, tuple[str, ...]]:
        """Inputs of a Concat before they were quantised with the levels of its result, and its axis."""
        joined = self._producers.get(value)
        if joined is None or joined.op_type != "Concat":
            return 0, (value,)
        inputs = [None if (n := self._dequantizer(name)) is None else self._quantizer(n) for name in joined.input]
        if any(found is None or found.levels != levels for found in inputs):
            return 0, (value,)
        axis = next((a.i for a in joined.attribute if a.name == "axis"), 0)
        nested = [found for found in inputs if found is not None]
        if any(len(found.sources) > 1 and found.axis != axis for found in nested):
            return 0, (value,)
        return axis, tuple(source for found in nested for source in found.sources)

    def _levels(self, node: onnx.NodeProto) -> Levels | None:
        """Levels of a node with one scale; None for other types than int8 and uint8, or with several scales."""
        scale = self._constant(node.input[1])
        zero = self._constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros((), np.uint8)
        if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.dtype not in (np.int8, np.uint8):
            return None
        if any(a.name == "block_size" and a.i for a in node.attribute):
            return None
        return Levels(float(scale.ravel()[0]), int(zero.ravel()[0]), zero.dtype == np.int8)

    def _weights(self, node: onnx.NodeProto, dequantize: onnx.NodeProto | None) -> StoredWeights | None:
        """Weights of a layer behind a DequantizeLinear; see :func:`.stored_weights.stored_weights`."""
        if dequantize is None:
            return None
        producer = self._producers.get(dequantize.input[0])
        return stored_weights(node, dequantize, producer if self._is(producer, _QUANTIZE) else None, self._constant)

    def _constant(self, name: str) -> np.ndarray | None:
        if name in self._stored:
            return numpy_helper.to_array(self._stored[name])
        node = self._producers.get(name)
        if node is not None and node.op_type == "Constant":
            return next((numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"), None)
        return None

    def _is_constant(self, name: str) -> bool:
        return self._constant(name) is not None


def quantizer_values(found: Quantization) -> Iterator[str]:
    """Values that hold the codes of known quantisers."""
    yield from dict.fromkeys(one.codes for one in found.quantizers.values())
