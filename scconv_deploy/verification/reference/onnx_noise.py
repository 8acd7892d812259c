"""Noise of an ONNX reference file, in float32 and in the arithmetic of a half file.

A file has no float64 form and no other order of summation, but its values can be moved: each rounded result is
multiplied by a number between 1 - u and 1 + u. In float32, u is a unit in the last place, and the noise is the distance
of two such runs from the usual one. In half, every value is rounded where the artifact reads a half value, and the
noise is the distance of two runs whose values move by half a unit before they are rounded. A small value moves by no
less than its place does: the last place of a float16 below 2^-14 is that of 2^-14, and a sigmoid is a fraction added to
0.5 (:data:`.model.orders.SIGMOID_PLACE`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx.shape_inference
from onnx import TensorProto, helper, numpy_helper

from scconv_deploy.graph import gates as onnx_gates
from scconv_deploy.graph import instrument
from scconv_deploy.graph.gates import Candidate
from scconv_deploy.graph.types import ELEMENT, NUMPY, HalfPrecision
from scconv_deploy.model.orders import LAST_PLACE, SIGMOID_PLACE
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification import metrics
from scconv_deploy.verification.detections import align_rows
from scconv_deploy.verification.reference.noise import Floors, Value, of_kind, spread_of
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun, RoundedRun

_EXACT = frozenset({
    "Abs", "ArgMax", "ArgMin", "Cast", "CastLike", "Ceil", "Clip", "Compress", "Concat", "Constant", "ConstantOfShape",
    "DepthToSpace", "Dropout", "EyeLike", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND",
    "Identity", "If", "IsInf", "IsNaN", "Loop", "Max", "MaxPool", "Min", "Neg", "NonMaxSuppression", "NonZero",
    "OneHot", "Pad", "PRelu", "LeakyRelu", "Range", "Relu", "Reshape", "Resize", "ReverseSequence", "Round", "Scan",
    "Scatter", "ScatterElements", "ScatterND", "Shape", "Sign", "Size", "Slice", "SpaceToDepth", "Split",
    "SplitToSequence", "SequenceAt", "Squeeze", "Tile", "TopK", "Transpose", "Trilu", "Unique", "Unsqueeze", "Where",
})  # fmt: skip
"""Operators without rounding (the result is exact, or one of the inputs), and operators with subgraphs."""
_PREFIX = "scconv_noise::"
"""Prefix of the names of inserted values; no exporter uses it."""
_SEEDS = (1.0, 2.0)
_DIGITS = 65537.3
"""Factor that takes pseudo-random digits from a value; they differ between numbers from 1e-5 to 256."""
_FINER = 2.0**16
"""Further factor, for numbers from 1e-9 to 1e-3 (a subnormal float16 is 6e-8 and more)."""
_PRECISION: dict[str, HalfPrecision] = {"float16": "fp16", "bfloat16": "bf16"}


class OnnxNoise:
    """Noise of a reference file.

    Args:
        proto: float32 reference file.
        sites: names of its SRUs.
        gates: its gates of no known SRU; those that a run holds (:attr:`.ReferenceRun.others`) are fixed too.
    """

    def __init__(
        self, proto: onnx.ModelProto, sites: Iterable[str], gates: Sequence[Candidate], options: RuntimeOptions
    ) -> None:
        self._with_srus = instrument.inject_gates(proto, list(sites))
        self._gates, self._options = gates, options
        self._with_all: onnx.ModelProto | None = None
        self._disturbed: list[OnnxRuntimeRunner] | None = None
        self._moved: set[str] = set()
        self._in_half: dict[str, list[OnnxRuntimeRunner]] = {}

    def _forced(self, run: ReferenceRun) -> onnx.ModelProto:
        """Reference file with all gates injected, as in the artifact's replay."""
        if self._with_all is None:  # only a run shows which operands are floating
            fixed = [onnx_gates.as_found(one) for one in self._gates if one.value in run.others]
            self._with_all = _copy(self._with_srus)
            onnx_gates.inject(self._with_all, fixed)
        return self._with_all

    def floors(self, run: ReferenceRun, exact: bool = False) -> Floors:
        """Measure the float32 noise of a sample, with its gates injected.

        Args:
            exact: the run's values are float64's: the noise is then that about ONNX Runtime's own values, for an error
                of the runtime must not count as noise.
        """
        if self._disturbed is None:
            models = [disturbed(self._forced(run), seed) for seed in _SEEDS]
            self._moved = _following(
                models[0], (n for node in models[0].graph.node for n in node.output if _is_put_in(n))
            )
            self._disturbed = [OnnxRuntimeRunner(model, self._options) for model in models]
        usual = {**run.outputs, **{instrument.gate_input(n): s.x for n, s in run.sites.items() if s.x is not None}}
        if exact:
            with OnnxRuntimeRunner(self._forced(run), self._options) as runner:
                found = runner.run(run.feeds(runner.inputs))
            usual = {name: found[name] for name in usual if name in found}
        # skip float values that no disturbance reaches: they were not measured (indices and masks are exact then)
        usual = {name: value for name, value in usual.items() if name in self._moved or value.dtype.kind != "f"}
        parts = metrics.parts_of({name: y for name, y in run.outputs.items() if name in usual})
        apart = _apart([runner.run(run.feeds(runner.inputs)) for runner in self._disturbed], usual, parts)
        floors = {value: max(distances) for value, distances in apart.items()}
        return Floors(
            {name: floors.get(("output", name)) for name in run.outputs},
            of_kind("site", floors),
            spread_of(apart),
            parts=of_kind("part", floors),
        )

    def rounded(self, run: ReferenceRun, artifact: onnx.ModelProto, data: str) -> RoundedRun | None:
        """Run a sample with every value rounded that the artifact reads in half; None if no such node is found.

        Args:
            data: ``float16`` or ``bfloat16``.
        """
        if data not in self._in_half:
            forced, kind = self._forced(run), _PRECISION[data]
            read = rounded_inputs(forced, artifact)
            seeds = (0, *_SEEDS) if any(inputs for number, inputs in read.items() if number >= 0) else ()
            self._in_half[data] = [OnnxRuntimeRunner(rounded(forced, read, kind, s), self._options) for s in seeds]
        if not self._in_half[data]:
            return None
        base, *others = self._in_half[data]
        found = base.run(run.feeds(base.inputs))
        apart = _apart(
            [runner.run(run.feeds(runner.inputs)) for runner in others], found, metrics.parts_of(run.outputs, found)
        )
        floors = {value: max(distances) for value, distances in apart.items()}
        inputs = {name: found[key] for name in run.sites if (key := instrument.gate_input(name)) in found}
        return RoundedRun(
            {name: found[name] for name in run.outputs},
            {name: floors.get(("output", name)) for name in run.outputs},
            inputs,
            {name: floors["site", name] for name in inputs if ("site", name) in floors},
            spread_of(apart),
            part_floors=of_kind("part", floors),
        )


def _apart(runs: Sequence[Arrays], usual: Arrays, parts: Mapping[str, metrics.Part]) -> dict[Value, list[float]]:
    found: dict[Value, list[float]] = defaultdict(list)
    suffix = instrument.gate_input("")
    for run in runs:
        if any(run[name].shape != value.shape for name, value in usual.items() if name in run):
            continue
        run = align_rows({name: run[name] for name in usual if name in run}, usual)
        for name, value in run.items():
            kind = ("site", name.removesuffix(suffix)) if name.endswith(suffix) else ("output", name)
            distance = metrics.distance(value, usual[name])
            if np.isfinite(distance):
                found[kind].append(distance)
        for name, part in parts.items():
            distance = metrics.relative_l2(part.of(run[part.output]), part.of(usual[part.output]))
            if np.isfinite(distance):
                found["part", name].append(distance)
    return found


def disturbed(model: onnx.ModelProto, seed: float) -> onnx.ModelProto:
    """Copy a model so that every float result that depends on the inputs moves by up to a unit in its last place.

    Results that depend on integer inputs move too; results inside If and Loop do not.
    """
    copy = _copy(model)
    floats = _of_types(copy, {TensorProto.FLOAT})
    data = _following(copy, onnx_gates.inputs(copy.graph))
    kept = {value.name for value in copy.graph.input}
    nodes = []
    for node in copy.graph.node:
        nodes.append(node)
        if node.op_type in _EXACT:
            continue
        for index, name in enumerate(node.output):
            if name in floats and name in data and name not in kept:
                node.output[index] = _exact(name)
                least, digits = (SIGMOID_PLACE, node.input[0]) if node.op_type == "Sigmoid" else (0.0, "")
                nodes += _moved(node.output[index], name, LAST_PLACE, seed + len(nodes), least, digits)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def rounded(
    model: onnx.ModelProto, read: Mapping[int, Sequence[int]], precision: HalfPrecision, seed: float = 0
) -> onnx.ModelProto:
    """Copy a model so that the given inputs of nodes are rounded to half; with a seed, moved by half a unit before.

    Args:
        read: index of a node -> indices of its inputs, see :func:`rounded_inputs`; -1 stands for the graph's outputs.
    """
    copy = _copy(model)
    graph = copy.graph
    producers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    unit = float(np.finfo(np.float16).eps) / 2 if precision == "fp16" else 2.0**-8
    least = float(np.finfo(np.float16).smallest_normal) if precision == "fp16" else 0.0
    made: dict[str, list[onnx.NodeProto]] = {}

    def rounding(name: str) -> str:
        if name in constants:
            if _put_in(name, "rounded") not in constants:
                array = numpy_helper.to_array(constants[name])
                near = array.astype(NUMPY[precision]).astype(np.float32)
                constants[_put_in(name, "rounded")] = numpy_helper.from_array(near, _put_in(name, "rounded"))
                graph.initializer.append(constants[_put_in(name, "rounded")])
        elif name not in made:
            steps, source = [], name
            if seed and not (name in producers and producers[name].op_type in _EXACT):
                source = _put_in(name, "moved")
                steps += _moved(name, source, unit, seed + len(made), least)
            half = _put_in(name, "half")
            steps.append(helper.make_node("Cast", [source], [half], to=ELEMENT[precision]))
            steps.append(helper.make_node("Cast", [half], [_put_in(name, "rounded")], to=TensorProto.FLOAT))
            made[name] = steps
        return _put_in(name, "rounded")

    for number, node in enumerate(graph.node):
        for index in read.get(number, ()):
            node.input[index] = rounding(node.input[index])
    nodes = [*(step for value in graph.input for step in made.get(value.name, ()))]
    last = {graph.output[index].name for index in read.get(-1, ())}
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name in last:
                node.output[index] = _exact(name)
        nodes.append(node)
        for name in node.output:
            given = name.removeprefix(_exact(""))
            if given in last and name != given:
                half = _put_in(given, "last")
                nodes.append(helper.make_node("Cast", [name], [half], to=ELEMENT[precision]))
                nodes.append(helper.make_node("Cast", [half], [given], to=TensorProto.FLOAT))
            nodes += made.get(given, ())
    del graph.node[:]
    graph.node.extend(nodes)
    return copy


def rounded_inputs(model: onnx.ModelProto, artifact: onnx.ModelProto) -> dict[int, list[int]]:
    """Inputs of a float32 model's nodes that the same nodes of a half artifact read in half.

    Two nodes are the same if they compute a value of one name. In the artifact, a graph output that is half inside has
    the name ``NAME_half``.

    Returns:
        Index of the node -> indices of its inputs; -1 -> indices of the graph's outputs.
    """
    halves = _of_types(artifact, set(ELEMENT.values()))
    halves |= {t.name for t in artifact.graph.initializer if t.data_type in ELEMENT.values()}
    producers = {name: node for node in artifact.graph.node for name in node.output}

    def is_rounded(name: str) -> bool:
        node = producers.get(name)
        return name in halves or (node is not None and node.op_type == "Cast" and node.input[0] in halves)

    floats = _of_types(model, {TensorProto.FLOAT})
    floats |= {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    found: dict[int, list[int]] = {}
    for number, node in enumerate(model.graph.node):
        names = [n for output in node.output for n in (f"{output}_half", output) if n in producers]
        twin = producers[names[0]] if names else None
        if twin is None or len(twin.input) > len(node.input):
            continue
        if twin.op_type == "Cast" != node.op_type:  # the cast of an output back to float32: its input has another name
            continue
        pairs = enumerate(zip(node.input, twin.input, strict=False))
        found[number] = [index for index, (name, other) in pairs if name in floats and other and is_rounded(other)]
    found[-1] = [i for i, value in enumerate(model.graph.output) if value.name in floats and is_rounded(value.name)]
    return found


def _moved(
    source: str, name: str, relative: float, seed: float, least: float = 0.0, digits: str = ""
) -> list[onnx.NodeProto]:
    """Nodes for ``source * (1 + relative * r)``, with r in [-1, 1) from source's last digits: 2 frac(k * source) - 1.

    ONNX Runtime 1.32 has no RandomUniformLike of opset 22, and these nodes need no state.

    Args:
        least: a smaller source moves as a value of this size does.
        digits: another value of source's shape, whose digits are taken.
    """
    steps: list[onnx.NodeProto] = []

    def step(operator: str, *inputs: str) -> str:
        output = _put_in(name, str(len(steps)))
        steps.append(helper.make_node(operator, inputs, [output]))
        return output

    def number(x: float) -> str:
        output = _put_in(name, str(len(steps)))
        tensor = helper.make_tensor(output, TensorProto.FLOAT, [], [x])
        steps.append(helper.make_node("Constant", [], [output], value=tensor))
        return output

    scale = _DIGITS * (1 + 0.37 * seed % 1)
    value = step("Add", step("Mul", digits or source, number(scale)), number(0.29 * seed % 1))
    if least and not digits:  # two numbers below 1e-5 have the same digits
        finer = step("Mul", source, number(scale * _FINER))
        value = step("Add", value, step("Sub", finer, step("Floor", finer)))
    fraction = step("Sub", value, step("Floor", value))
    if not least:
        factor = step("Add", step("Mul", fraction, number(2 * relative)), number(1 - relative))
        return [*steps, helper.make_node("Mul", [source, factor], [name])]
    share = step("Sub", step("Mul", fraction, number(2 * relative)), number(relative))
    size = step("Clip", step("Abs", source), number(least), number(float(np.finfo(np.float32).max)))  # infinities stay
    shift = step("Mul", size, share)
    return [*steps, helper.make_node("Add", [source, shift], [name])]


def _put_in(name: str, what: str) -> str:
    return f"{_PREFIX}{what}::{name}"


def _is_put_in(name: str) -> bool:
    return name.startswith(_PREFIX)


def _exact(name: str) -> str:
    return _put_in(name, "exact")


def _following(model: onnx.ModelProto, sources: Iterable[str]) -> set[str]:
    """Values of a graph that depend on the contents, not only the shapes, of the sources."""
    found = set(sources)
    for node in model.graph.node:
        if node.op_type not in ("Shape", "Size") and found.intersection(onnx_gates.read(node)):
            found.update(node.output)
    return found


def _of_types(model: onnx.ModelProto, kinds: set[int]) -> set[str]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type in kinds}


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
