"""Check of activations that overflow or vanish in half, measured in the float32 model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from scconv_deploy.graph import instrument
from scconv_deploy.graph.types import ELEMENT, LARGEST, SMALLEST, UNIT_ROUNDOFF, HalfPrecision, graphs_of
from scconv_deploy.precision.float32 import as_ir, typed_float32
from scconv_deploy.records.parity import Check
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.reference.run import ReferenceRun

VANISHING = "vanishing in"
"""Start of the part of the reason that names vanishing tensors."""

_PREFIX = "scconv_range::"
_WORST = 4.0  # in unit roundoffs, as for constants: a tensor with a larger error is not rounded but lost

_TRANSPARENT = ("If", "Loop", "Scan")  # nodes whose subgraphs can return a number

Place = tuple[tuple[int, str], ...]
"""Path to a subgraph from the main graph (``()``): number of the node among those with subgraphs, attribute name."""


@dataclass(frozen=True)
class Extent:
    """Range of a tensor of the float32 model, in one or several runs.

    Attributes:
        largest: largest finite absolute value.
        lost: relative L2 error of the finite values stored in half; 0.0 unless above the rounding of normal numbers.
        not_finite: ``"NaN"`` or ``"infinity"`` if the float32 model has one there, else ``""``.
    """

    largest: float = 0.0
    lost: float = 0.0
    not_finite: str = ""

    def merged(self, other: Extent) -> Extent:
        """Range over the runs of both."""
        kinds = {self.not_finite, other.not_finite}
        kind = "NaN" if "NaN" in kinds else max(kinds)
        # the run with the largest values decides: what is lost of a nearly zero tensor does not matter
        lost = self.lost if self.largest >= other.largest else other.lost
        return Extent(max(self.largest, other.largest), lost, kind)


class RangeWatch:
    """Ranges in the float32 model of all tensors that the half model holds in half, subgraphs included.

    Each tensor is reduced to a few numbers inside the graph, so that memory does not grow with the number of tensors.
    Tensors that may vanish in half, or that are not finite, are measured again more closely.

    Args:
        float32_model: the model before the conversion.
        half: the same model in half.
        precision: type of the half model.

    Attributes:
        limit: largest value of the half type.

    Raises:
        ModelError: ONNX Runtime cannot run the float32 model.
    """

    def __init__(
        self,
        float32_model: onnx.ModelProto,
        half: onnx.ModelProto,
        precision: HalfPrecision,
        options: RuntimeOptions = RuntimeOptions(),
    ) -> None:
        self.limit, self._precision, self._options = LARGEST[precision], precision, options
        # below the smallest normal number the rounding error is absolute: uniform, up to half its last place
        error = SMALLEST[precision] * UNIT_ROUNDOFF[precision] * 2 / 12**0.5
        self._suspicious = error / (_WORST * UNIT_ROUNDOFF[precision])
        self._float32_model = ir.to_proto(typed_float32(as_ir(float32_model)))
        in_half = set(_of_type(half, ELEMENT[precision], or_cast=True))
        watched = [key for key in _of_type(self._float32_model, TensorProto.FLOAT) if key in in_half]
        self._extents = dict.fromkeys(watched, Extent())
        self._rough = _Watch(self._float32_model, watched, _rough, options) if watched else None
        self._close: dict[tuple[tuple[Place, str], ...], _Watch] = {}

    def add(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Run a sample, and again for tensors that need a closer measurement."""
        if self._rough is None:
            return
        closer: list[tuple[Place, str]] = []
        for key, (largest, rms) in self._rough.run(inputs).items():
            if not np.isfinite(largest) or np.isnan(rms) or (largest > 0 and rms < self._suspicious):
                closer.append(key)
            else:
                self._extents[key] = self._extents[key].merged(Extent(float(largest)))
        if not closer:
            return
        if tuple(closer) not in self._close:
            nodes = _closely(ELEMENT[self._precision])
            self._close[tuple(closer)] = _Watch(self._float32_model, closer, nodes, self._options)
        for key, (largest, error, norm, nan, infinite) in self._close[tuple(closer)].run(inputs).items():
            lost = error / norm if norm > 0 and largest <= self.limit else 0.0
            lost = lost if lost > _WORST * UNIT_ROUNDOFF[self._precision] else 0.0
            kind = "NaN" if nan else "infinity" if infinite else ""
            self._extents[key] = self._extents[key].merged(Extent(float(largest), float(lost), kind))

    @property
    def largest(self) -> dict[str, float]:
        """Largest finite absolute value by tensor, in the graph's order."""
        return {name: extent.largest for name, extent in self._by_name().items()}

    @property
    def beyond(self) -> dict[str, float]:
        """Largest absolute value by tensor, of tensors that overflow in half."""
        return {name: value for name, value in self.largest.items() if value > self.limit}

    @property
    def vanishing(self) -> dict[str, float]:
        """Largest absolute value by tensor, of tensors that vanish in half."""
        return {name: extent.largest for name, extent in self._by_name().items() if extent.lost}

    @property
    def not_finite(self) -> dict[str, str]:
        """``"NaN"`` or ``"infinity"`` by tensor, if the float32 model has one."""
        return {name: extent.not_finite for name, extent in self._by_name().items() if extent.not_finite}

    def check(self, module_of: Callable[[str], str], coverage: str) -> Check:
        """Make the check "range", which fails if a value of the float32 model overflows in half.

        Tensors that vanish are named and do not fail: the outputs show whether they matter.

        Args:
            module_of: path of the PyTorch module that computes a tensor; ``""`` if unknown.
            coverage: samples covered, as text.
        """

        def named(name: str) -> str:
            module = module_of(name)
            return f"{name} ({module})" if module else name

        def listed(names: Sequence[str], words: Callable[[str], str]) -> str:
            more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
            return ", ".join(map(words, names[:3])) + more

        largest, beyond, precision = self.largest, list(self.beyond), self._precision

        def reaches(name: str) -> str:
            return f"{named(name)} reaches {largest[name]:.3g}"

        if beyond:
            found = listed(beyond, reaches)
            text = f"{found}, which {precision} cannot hold; --keep leaves layers in float32"
            return Check("range", "failed", text)
        farthest = max(largest, key=largest.__getitem__)
        text = (
            f"{precision} holds the values of {len(largest)} tensors: {reaches(farthest)} of {self.limit:g}{coverage}"
        )
        if vanishing := list(self.vanishing):
            found = listed(vanishing, lambda name: f"{named(name)} (at most {largest[name]:.2g})")
            text += f"; {VANISHING} {precision}: {found}; --keep leaves layers in float32"
        if strange := self.not_finite:
            found = listed(list(strange), lambda name: f"{strange[name]} in {named(name)}")
            text += f"; the float32 model itself has {found}"
        return Check("range", "passed", text)

    def _by_name(self) -> dict[str, Extent]:
        """Ranges by tensor name; tensors of one name in several subgraphs are merged."""
        found: dict[str, Extent] = {}
        for (_, name), extent in self._extents.items():
            found[name] = found[name].merged(extent) if name in found else extent
        return found


class HalfRange(ArtifactCheck):
    """Check that no activation overflows in half."""

    def __init__(self, watch: RangeWatch, half: onnx.ModelProto, shared: Shared) -> None:
        self._watch, self._shared = watch, shared
        self._modules = {name: instrument.module_of(node) for node in half.graph.node for name in node.output}

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        if run.deep:
            self._watch.add(run.inputs)

    def checks(self) -> list[Check]:
        if not self._watch.largest:
            return []
        return [self._watch.check(lambda name: self._modules.get(name, ""), self._shared.samples.coverage)]


Measure = Callable[[str, str], tuple[list[onnx.NodeProto], list[str]]]
"""(tensor, prefix) -> nodes that reduce the tensor to float32 scalars of at least 0, and the names of the scalars."""


def _rough(name: str, prefix: str) -> tuple[list[onnx.NodeProto], list[str]]:
    """Nodes for the largest absolute value and the rms of a tensor."""
    absolute, square, mean, largest, rms = (f"{prefix}{part}" for part in ("abs", "square", "mean", "largest", "rms"))
    nodes = [
        helper.make_node("Abs", [name], [absolute]),
        helper.make_node("ReduceMax", [absolute], [largest], keepdims=0),
        helper.make_node("Mul", [name, name], [square]),
        helper.make_node("ReduceMean", [square], [mean], keepdims=0),
        helper.make_node("Sqrt", [mean], [rms]),
    ]
    return nodes, [largest, rms]


def _closely(kind: int) -> Measure:
    """Nodes for the finite values of a tensor (largest absolute value, L2 of the error in half, L2), and for whether it
    has NaN and infinity."""

    def measure(name: str, prefix: str) -> tuple[list[onnx.NodeProto], list[str]]:
        nodes: list[onnx.NodeProto] = []

        def put(op: str, *inputs: str, **attributes: Any) -> str:
            output = f"{prefix}{len(nodes)}"
            nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
            return output

        limit = put("Constant", value_float=float(np.finfo(np.float32).max))
        zero = put("Constant", value_float=0.0)
        finite = put("Where", put("LessOrEqual", put("Abs", name), limit), name, zero)
        wide = put("Cast", finite, to=TensorProto.DOUBLE)
        stored = put("Cast", put("Cast", finite, to=kind), to=TensorProto.FLOAT)
        change = put("Sub", put("Cast", stored, to=TensorProto.DOUBLE), wide)
        results = [put("ReduceMax", put("Abs", finite), keepdims=0)]
        # in double and scaled, because squares of tiny numbers are 0 in float32
        results += [put("Cast", put("ReduceL2", v, keepdims=0), to=TensorProto.FLOAT) for v in (change, wide)]
        for op in ("IsNaN", "IsInf"):
            results.append(put("ReduceMax", put("Cast", put(op, name), to=TensorProto.FLOAT), keepdims=0))
        return nodes, results

    return measure


class _Watch:
    """Session of a model whose outputs are replaced by numbers about its tensors."""

    def __init__(
        self, model: onnx.ModelProto, keys: Sequence[tuple[Place, str]], measure: Measure, options: RuntimeOptions
    ) -> None:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        del copy.graph.output[:]
        numbers = count()
        self._shown = _shown(copy.graph, (), set(keys), measure, numbers)
        for names in self._shown.values():
            copy.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, []) for n in names)
        self._runner = OnnxRuntimeRunner(copy, options)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[tuple[Place, str], list[float]]:
        found = self._runner.run(inputs)
        # the largest value of an empty tensor is -inf
        return {key: [max(float(found[n]), 0.0) if not np.isnan(found[n]) else np.nan for n in names]
                for key, names in self._shown.items()}  # fmt: skip


def _shown(
    graph: onnx.GraphProto, place: Place, keys: set[tuple[Place, str]], measure: Measure, numbers: Iterator[int]
) -> dict[tuple[Place, str], list[str]]:
    """Add nodes that compute the numbers, in a graph and its subgraphs; return the numbers' names in the graph."""
    shown: dict[tuple[Place, str], list[str]] = {}
    nodes: list[onnx.NodeProto] = []
    holders = count()
    for node in graph.node:
        nodes.append(node)
        if inside := graphs_of(node):
            number = next(holders)
            for attribute, body in inside.items() if node.op_type in _TRANSPARENT else ():
                below = _shown(body, (*place, (number, attribute)), keys, measure, numbers)
                for key, names in below.items():
                    shown[key] = [_lifted(node, inside, attribute, name, nodes, numbers) for name in names]
        for name in node.output:
            if (place, name) in keys:
                added, shown[place, name] = measure(name, f"{_PREFIX}{next(numbers)}::")
                nodes += added
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return shown


def _lifted(
    node: onnx.NodeProto,
    inside: Mapping[str, onnx.GraphProto],
    attribute: str,
    name: str,
    nodes: list[onnx.NodeProto],
    numbers: Iterator[int],
) -> str:
    """Return a number from a subgraph: from the branch taken (0 from the other), or the largest of all iterations."""
    loops = node.op_type == "Loop"  # the first output of its body is the condition
    missing = len(inside[attribute].output) - loops - len(node.output)
    node.output.extend([""] * missing)
    inside[attribute].output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
    lifted = f"{_PREFIX}{next(numbers)}"
    node.output.append(lifted)
    if node.op_type == "If":
        for other, branch in inside.items():
            if other != attribute:
                nothing = f"{_PREFIX}{next(numbers)}"
                branch.node.append(helper.make_node("Constant", [], [nothing], value_float=0.0))
                branch.output.append(helper.make_tensor_value_info(nothing, TensorProto.FLOAT, []))
        return lifted
    for given in node.attribute:  # attributes of Scan
        if given.name in ("scan_output_axes", "scan_output_directions"):
            given.ints.append(0)
    largest = f"{_PREFIX}{next(numbers)}"
    nodes.append(helper.make_node("ReduceMax", [lifted], [largest], keepdims=0))
    return largest


def _of_type(model: onnx.ModelProto, kind: int, *, or_cast: bool = False) -> list[tuple[Place, str]]:
    """Tensors of this type that nodes compute, in order; with ``or_cast`` also graph outputs that are float32 casts of
    one, because the half tensor has another name there."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    return list(dict.fromkeys(_in_graph(inferred, (), kind, or_cast)))


def _in_graph(graph: onnx.GraphProto, place: Place, kind: int, or_cast: bool) -> Iterator[tuple[Place, str]]:
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    outputs = {value.name for value in graph.output}
    holders = count()
    for node in graph.node:
        cast = or_cast and node.op_type == "Cast" and types.get(node.input[0]) == kind and node.output[0] in outputs
        for name in node.output:
            if types.get(name) == kind or (cast and types.get(name) == TensorProto.FLOAT):
                yield place, name
        if inside := graphs_of(node):
            number = next(holders)
            for attribute, body in inside.items():
                if node.op_type in _TRANSPARENT:
                    yield from _in_graph(body, (*place, (number, attribute)), kind, or_cast)
