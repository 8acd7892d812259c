"""Read an SRU from a graph of any exporter, from the Concat at its end back to its input x.

The nodes between are evaluated as meanings (:mod:`.meaning`) at several sizes of x, so that computed and constant
shapes read the same. The Concat's meaning is then an SRU, or the reason why it is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.planes import RANKS
from scconv_deploy.rewrite.reader.call import Call
from scconv_deploy.rewrite.reader.meaning import (
    Centred,
    Constant,
    Crossed,
    Crossing,
    Deviation,
    GroupMean,
    Groups,
    Half,
    Input,
    Known,
    Mask,
    Meaning,
    Normalized,
    Part,
    Shape,
    Sigmoid,
    SoftMask,
    Squares,
    Unknown,
)
from scconv_deploy.rewrite.reader.operators import apply
from scconv_deploy.rewrite.reader.sizes import SAMPLES, Sizes
from scconv_deploy.rewrite.reader.variant import LARGE_GROUPS, Interpreted, UnreadableError, interpret

COMPARISONS = ("GreaterOrEqual", "Greater", "Less", "LessOrEqual")
_GATE_SIDE = frozenset(
    (*COMPARISONS, "Add", "Mul", "Sub", "Split", "Slice", "Where", "Cast", "CastLike", "Not", "Identity")
)
_TO_CONCAT = frozenset((*_GATE_SIDE, "QuantizeLinear", "DequantizeLinear", "Concat"))
_LARGEST_REGION = 4000
"""Most nodes of an SRU. Usual are 50; an unsimplified sum over gamma adds two for each channel."""

_NAMES = {
    Constant: "a constant", Input: "its input", Groups: "its groups", GroupMean: "their mean", Centred: "centred data",
    Squares: "squares", Deviation: "a deviation", Normalized: "normalised data", Sigmoid: "its sigmoid", Mask: "a mask",
    SoftMask: "a soft mask", Part: "masked data", Half: "half of the channels", Crossed: "crossed halves",
    Crossing: "an SRU's output",
}  # fmt: skip
_OF_THE_GATE = (Sigmoid, Mask, SoftMask, Part, Half, Crossed)
_COMPUTED = (
    "its gamma, beta or gate weight is computed in the graph ({reason}); cut and sign must be constants, because they "
    "are computed in float64, which TensorRT lacks, and a sum in another order flips gates"
)
Sample = tuple[Shape, Sizes]  # x's shape, and the sizes of every other tensor


@dataclass(frozen=True, eq=False)
class SRUReading:
    """An SRU read from a graph.

    Attributes:
        x: its input, ``[N, C, *]`` float32.
        gate: its variant with gamma and beta.
        notes: assumptions of the reading.
        region: its nodes, producers first, those of its constants included.
        mask: output of the comparison that decides its gates, bool; they are open where it equals ``mask_opened``.
        gate_values: its sigmoid, masks and masked data, which nothing outside the SRU may read.
    """

    x: ir.Value
    gate: Gate
    notes: tuple[str, ...]
    region: tuple[ir.Node, ...]
    mask: ir.Value
    mask_opened: bool
    gate_values: tuple[ir.Value, ...]


def is_thresholded(node: ir.Node) -> bool:
    """Whether a node is a sigmoid whose result is compared, in half precision behind a Cast."""
    if node.op_type != "Sigmoid":
        return False
    readers = [use.node for use in node.outputs[0].uses()]
    readers += [use.node for cast in readers if cast.op_type == "Cast" for use in cast.outputs[0].uses()]
    return any(reader.op_type in COMPARISONS for reader in readers)


def find_sigmoid(concat: ir.Node) -> ir.Node | None:
    """The thresholded sigmoid that a Concat's inputs depend on; None if there is none."""
    seen: set[int] = set()
    queue = [concat]
    for node in queue:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is None or id(producer) in seen or len(seen) > _LARGEST_REGION:
                continue
            seen.add(id(producer))
            if is_thresholded(producer):
                return producer
            if producer.op_type in _GATE_SIDE:
                queue.append(producer)
    return None


def quantizer_inside(sigmoid: ir.Node) -> ir.Node | None:
    """The first QuantizeLinear between a thresholded sigmoid and a Concat; None without one, or without a Concat."""
    found, queue, seen = None, [sigmoid], {id(sigmoid)}
    for node in queue:
        if node.op_type == "Concat":
            return found
        if node.op_type == "QuantizeLinear":
            found = found or node
        readers = [use.node for value in node.outputs for use in value.uses() if use.node.op_type in _TO_CONCAT]
        queue += [reader for reader in readers if id(reader) not in seen and len(seen) <= _LARGEST_REGION]
        seen |= {id(reader) for reader in readers}
    return None


def read_sru(concat: ir.Node, sigmoid: ir.Node) -> SRUReading:
    """Read the SRU that ends in this Concat.

    Raises:
        UnreadableError: with the reason and the node.
    """
    refusal: UnreadableError | None = None
    for x in _find_inputs(sigmoid):
        try:
            return _read_between(x, concat)
        except UnreadableError as error:
            refusal = refusal or error
    raise refusal or UnreadableError("no group normalisation was found before its sigmoid", sigmoid.name or "")


def _read_between(x: ir.Value, concat: ir.Node) -> SRUReading:
    graph = concat.graph
    samples = _samples(x, concat.outputs[0], [] if graph is None else list(graph.inputs))
    region = _region(concat, x)
    constants: dict[int, np.ndarray | None] = {}
    found = None
    for sample, sizes in samples:
        meanings = _evaluate(region, x, (sample, sizes), constants)
        crossing = meanings[id(concat.outputs[0])]
        if isinstance(crossing, Unknown):
            raise UnreadableError(crossing.reason, crossing.node)
        if not isinstance(crossing, Crossing):
            raise UnreadableError("its Concat is no cross reconstruction", concat.name or "")
        read = interpret(crossing, sample)
        if found is not None and not _same_variant(found, read):
            raise UnreadableError(
                f"at another input size it is another variant ({found[0].variant} and {read[0].variant})"
            )
        found = read if found is None or _is_assumed(found) else found
    if found is None:
        raise UnreadableError("no input size fits it")
    gate_values = tuple(
        value for node in region for value in node.outputs
        if node is not concat and isinstance(meanings.get(id(value)), _OF_THE_GATE)
    )  # fmt: skip
    masks = [(v, m.opened) for v in gate_values if isinstance(m := meanings[id(v)], Mask) and not m.number]
    return SRUReading(x, *found, tuple(region), *masks[0], gate_values)


def _is_assumed(read: Interpreted) -> bool:
    return any(note.startswith(LARGE_GROUPS) for note in read[1])


def _same_variant(one: Interpreted, other: Interpreted) -> bool:
    """Whether two sizes of x read as one variant; where float32 cannot tell L from L - 1, the statistics are open."""
    ours, theirs = one[0].variant, other[0].variant
    if _is_assumed(one) or _is_assumed(other):
        return replace(ours, statistics=theirs.statistics) == theirs
    return ours == theirs


def _find_inputs(sigmoid: ir.Node) -> Iterator[ir.Value]:
    """Values that may be x: the input of the nearest normalisation before the sigmoid, before its Reshape into groups.

    A simplifier may have removed that Reshape: of a signal with a group for each channel it changes nothing.
    """
    seen: set[int] = set()
    queue = [sigmoid]
    for node in queue:
        given = node.inputs[0] if node.inputs else None
        if given is not None and node.op_type == "GroupNormalization":
            yield given
            return
        if given is not None and node.op_type == "Reshape" and _is_normalized(node.outputs[0]):
            yield given
            yield node.outputs[0]
            return
        if given is not None and node.op_type in ("Sub", "InstanceNormalization") and _is_normalized(given):
            producer = given.producer()
            if producer is None or producer.op_type != "Reshape":
                yield given
                return
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and id(producer) not in seen and len(seen) < 200:
                seen.add(id(producer))
                queue.append(producer)


def _is_normalized(value: ir.Value) -> bool:
    kinds = {use.node.op_type for use in value.uses()}
    return "InstanceNormalization" in kinds or {"ReduceMean", "Sub"} <= kinds


def _samples(x: ir.Value, y: ir.Value, inputs: Sequence[ir.Value]) -> list[tuple[Shape, Sizes]]:
    """Concrete sizes of x: its own where they are fixed, several where they are open."""
    if x.dtype not in (None, ir.DataType.FLOAT):
        raise UnreadableError(f"its data is {x.dtype}, which rounds its gates; rewrite the float32 model")
    shape = x.shape if x.shape is not None else y.shape
    if shape is None or len(shape) not in RANKS:
        raise UnreadableError(f"its input {x.name} has {'no known shape' if shape is None else f'shape {shape}'}")
    channels = shape[1]
    if not isinstance(channels, int):
        raise UnreadableError(f"the number of channels of its input {x.name} is not known")
    samples: list[Sample] = []
    for index in range(SAMPLES):
        sizes = Sizes(inputs, index)
        known = sizes.of(x if x.shape is not None else y) or (None,) * len(shape)
        sample = tuple(sizes.place(axis) if size is None else size for axis, size in enumerate(known))
        samples.append((sample, sizes))
    return samples if any(not isinstance(d, int) for d in shape) else samples[:1]


def _region(concat: ir.Node, x: ir.Value) -> list[ir.Node]:
    """All nodes that the Concat depends on, back to x and constants; producers first."""
    order: list[ir.Node] = []
    state: dict[int, bool] = {}
    stack = [concat]
    while stack:
        node = stack[-1]
        if state.get(id(node)):
            stack.pop()
            continue
        producers = [v.producer() for v in node.inputs if v is not None and v is not x]
        waiting = [p for p in producers if p is not None and id(p) not in state]
        if waiting and id(node) not in state:
            state[id(node)] = False
            stack += waiting
        elif not waiting:
            state[id(node)] = True
            order.append(node)
            stack.pop()
        else:
            stack += waiting
        if len(state) > _LARGEST_REGION:
            raise UnreadableError(f"more than {_LARGEST_REGION} nodes lie between its input and its Concat")
    return order


def _evaluate(
    region: Sequence[ir.Node], x: ir.Value, sample: Sample, constants: dict[int, np.ndarray | None]
) -> dict[int, Meaning]:
    """Meaning of every value of the region by id; ``constants`` caches those that do not depend on x's size."""
    meanings: dict[int, Meaning] = {id(x): Input(sample[0])}
    for node in region:
        inputs: list[Meaning | None] = []
        for value in node.inputs:
            if value is not None and id(value) not in meanings:
                meanings[id(value)] = _leaf(value, constants)
            inputs.append(None if value is None else meanings[id(value)])
        for value, meaning in zip(node.outputs, _node(node, inputs, sample, constants), strict=True):
            meanings[id(value)] = meaning
    return meanings


def _leaf(value: ir.Value, constants: dict[int, np.ndarray | None]) -> Meaning:
    if id(value) not in constants:
        constants[id(value)] = None if value.const_value is None else value.const_value.numpy()
    array = constants[id(value)]
    if array is None:
        return Unknown(f"it needs {value.name}, which is neither its input nor a constant", value.name or "")
    return Constant(array)


def _node(
    node: ir.Node, inputs: list[Meaning | None], sample: Sample, constants: dict[int, np.ndarray | None]
) -> list[Meaning]:
    name = node.name or node.outputs[0].name or node.op_type
    if node.op_type == "Shape" and isinstance(inputs[0], Unknown) and node.inputs[0] is not None:
        sizes = _shape_of(node, sample[1].of(node.inputs[0]))
        return [inputs[0] if sizes is None else Constant(sizes)]
    unknown = next((m for m in inputs if isinstance(m, Unknown)), None)
    if unknown is not None:
        if node.op_type in ("Mul", "Add") and any(isinstance(m, Normalized) for m in inputs):
            unknown = Unknown(_COMPUTED.format(reason=unknown.reason), unknown.node)
        return [unknown] * len(node.outputs)
    known: list[Known | None] = [m for m in inputs if not isinstance(m, Unknown)]
    if node.domain not in ("", "ai.onnx"):
        return [Unknown(f"{node.domain}::{node.op_type} is not part of an SRU", name)] * len(node.outputs)
    if node.op_type in ("Shape", "Size") and known[0] is not None:
        given: np.ndarray = np.broadcast_to(np.float32(0), known[0].shape)
        return [Constant(v) for v in _compute(node, [given])]
    if all(m is None or isinstance(m, Constant) for m in known):
        fixed = all(v is None or v.const_value is not None or id(v) in constants for v in node.inputs)
        if not fixed or id(node.outputs[0]) not in constants:
            results = _compute(node, [m.value if isinstance(m, Constant) else None for m in known])
            if not fixed:
                return [Constant(v) for v in results]
            constants.update({id(v): r for v, r in zip(node.outputs, results, strict=True)})
        stored = [constants[id(v)] for v in node.outputs]
        return [Constant(v) for v in stored if v is not None]
    attributes = {a.name: a.value for a in node.attributes.values() if isinstance(a, ir.Attr) and not a.is_ref()}
    found = apply(Call(node.op_type, known, attributes, sample[0], len(node.outputs)))
    if found is None:
        return [Unknown(_why(node, known), name)] * len(node.outputs)
    return list(found)


def _shape_of(node: ir.Node, sizes: tuple[int | None, ...] | None) -> np.ndarray | None:
    """Output of a Shape node for a tensor outside the SRU, of which only the sizes are known."""
    if sizes is None:
        return None
    first = node.attributes["start"].as_int() if "start" in node.attributes else 0
    last = node.attributes["end"].as_int() if "end" in node.attributes else len(sizes)
    wanted = sizes[first:last]
    return None if None in wanted else np.array(wanted, dtype=np.int64)


def _why(node: ir.Node, known: Sequence[Known | None]) -> str:
    if node.op_type == "Concat" and all(isinstance(m, Crossed) for m in known):
        return "its Concat puts the halves together in another order: closed gates where an SRU's are open"
    if node.op_type == "Add" and all(isinstance(m, Half) for m in known):
        return "its halves are not crossed: x1's lower half with x2's upper one, and the other way round"
    kinds = " and ".join(_NAMES.get(type(m), "other data") for m in known if m is not None)
    return f"{node.op_type} of {kinds} is not part of an SRU"


def _compute(node: ir.Node, values: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    """Run one node on constants.

    Raises:
        UnreadableError: onnx.reference cannot run it.
    """
    if node.op_type == "Expand" and values[0] is not None and values[0].size == 1 and values[1] is not None:
        return [np.broadcast_to(values[0], np.broadcast_shapes(values[0].shape, tuple(values[1])))]  # no copy
    if node.op_type == "ConstantOfShape" and values[0] is not None:
        value = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
        return [np.broadcast_to(value.reshape(()), tuple(values[0]))]  # no copy
    proto: onnx.NodeProto = ir.to_proto(node)
    feeds = {name: value for name, value in zip(proto.input, values, strict=True) if name and value is not None}
    graph = node.graph
    version = graph.opset_imports.get("", 18) if graph is not None else 18
    try:
        return [np.asarray(v) for v in ReferenceEvaluator(proto, opsets={"": version}).run(None, feeds)]
    except Exception as error:  # onnx.reference raises whatever numpy raises
        raise UnreadableError(f"{node.op_type} of constants cannot be computed: {error}", node.name or "") from error
