"""Find, match, expose and inject gates of no known SRU in an ONNX graph.

A gate of the reference is found by behaviour: the node with the same decisions and operands on a sample. Names prove
nothing (exporters give new ones), and order is only a hint (simplifiers sort). A wrong match cannot pass, because a
decision injected in a wrong place moves the outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from scconv_deploy.gate.other_gates import Found, OtherGate, View, channel_axes
from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import DOMAIN, mask_input
from scconv_deploy.records.quantization import Levels

_COMPARISONS = {"Greater": "gt", "GreaterOrEqual": "ge", "Less": "lt", "LessOrEqual": "le", "Equal": "eq"}
_ROUNDINGS = {"Sign": "sign", "Round": "round", "Floor": "floor", "Ceil": "ceil"}
_LOOSE = ("ArgMax", "ArgMin", "TopK", "NonZero", "Unique", "Hardmax", "Mod", "Shrink", "ThresholdedRelu",
          "QuantizeLinear", "DynamicQuantizeLinear", "NonMaxSuppression")  # fmt: skip
"""Operators that jump and whose decisions cannot be injected in a replay."""
_CAST_LIKE = 15  # opset since which a number can be injected
_AT_MOST = 2**16  # entries on which two gates are compared
_ALIKE = 0.9
"""Lowest score of a match: agreement of the operands (1 less their relative L2) plus correlation of the decisions; 2 is
the same gate. Unrelated gates reach 0.1; a gate with another threshold, or with operands damaged by half their size, 1
and more."""
_OPERANDS_ALIKE = 0.5


@dataclass(frozen=True)
class Candidate:
    """A node that may decide a gate: its output, its operands, and its kind in :data:`.gate.other_gates.STEPS`."""

    value: str
    operands: tuple[str, ...]
    kind: str
    node: str


def candidates(model: onnx.ModelProto) -> list[Candidate]:
    """Comparisons and roundings of the main graph that depend on its inputs, in its order."""
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    found = _candidates(model.graph.node, inputs(model.graph))
    return [one for one in found if opset >= _CAST_LIKE or not _is_number(one.kind)]


def _candidates(nodes: Iterable[onnx.NodeProto], data: set[str]) -> Iterator[Candidate]:
    for node in nodes:
        if not data.intersection(read(node)):
            continue
        data.update(node.output)
        kind = _kind(node)
        if kind and node.domain == "":
            module = instrument.module_of(node)
            what = f"{module}: {node.op_type}" if module else node.op_type
            yield Candidate(node.output[0], tuple(node.input), kind, f"{what} {node.output[0]}")


def inputs(graph: onnx.GraphProto) -> set[str]:
    """Names of a graph's inputs; an input with a default counts as a constant."""
    return {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}


def read(node: onnx.NodeProto) -> set[str]:
    """Names of the values that a node reads, its subgraphs included."""
    inner = {name for graph in _subgraphs(node) for child in graph.node for name in read(child)}
    return inner | {name for name in node.input if name}


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [graph for a in node.attribute for graph in ([a.g] if a.HasField("g") else list(a.graphs))]


def _kind(node: onnx.NodeProto) -> str:
    if node.op_type == "Cast":
        to = next((a.i for a in node.attribute if a.name == "to"), TensorProto.FLOAT)
        whole = (TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8)
        return "ne" if to == TensorProto.BOOL else "trunc" if to in whole else ""
    return (_COMPARISONS | _ROUNDINGS).get(node.op_type, "")


def loose(model: onnx.ModelProto, known: Collection[str] = ()) -> list[str]:
    """What jumps and cannot be injected in a replay: other operators, and comparisons in subgraphs and functions.

    Args:
        known: values of quantisers that can be injected.
    """
    names = []
    for node in model.graph.node:
        if node.op_type in _LOOSE and node.output[0] not in known:
            names.append(f"{node.op_type} {node.output[0]}")
        names += [f"{inner} in {node.op_type} {node.output[0]}" for g in _subgraphs(node) for inner in _jumping(g.node)]
    functions = [f for f in model.functions if f.domain != DOMAIN]
    return names + [f"{inner} in function {f.name}" for f in functions for inner in _jumping(f.node)]


def _jumping(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        if node.op_type in (*_COMPARISONS, *_ROUNDINGS, *_LOOSE):
            yield node.op_type
        for graph in _subgraphs(node):
            yield from _jumping(graph.node)


# --- exposed and injected --------------------------------------------------------------------------------------------


def operand_output(name: str, index: int) -> str:
    """The graph output that holds an operand of a gate."""
    return f"{name}::operand{index}"


def shown(model: onnx.ModelProto, wanted: Sequence[Candidate]) -> onnx.ModelProto:
    """A copy in which candidates, under the names of their values, and their operands are graph outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    expose(copy, [as_found(one) for one in wanted])
    return copy


def as_found(one: Candidate) -> Found:
    """A candidate of the reference's own graph as a gate, named after its value."""
    return Found(one.value, one.value, one.operands, one.node, one.kind)


def expose(model: onnx.ModelProto, found: Iterable[Found]) -> None:
    """Add decisions (:func:`.instrument.gate_output`) and operands of gates to the graph outputs, in place."""
    for one in found:
        if _index_of(model, one) is not None:
            decided = instrument.gate_output(one.name)
            model.graph.node.append(helper.make_node("Identity", [one.value], [decided]))
            _show(model, one, decided)


def inject(model: onnx.ModelProto, found: Iterable[Found]) -> None:
    """Take decisions of gates from graph inputs (:func:`.instrument.mask_input`), in place; expose their own too.

    The input holds the reference's decisions: bool, float32 for a rounding. Where the node decides the complement, the
    graph inverts them.
    """
    decided_by: dict[str, str] = {}  # two sites of the reference may read one quantised value
    for one in found:
        decided = instrument.gate_output(one.name)
        if one.value in decided_by:
            model.graph.node.append(helper.make_node("Identity", [decided_by[one.value]], [decided]))
            _show(model, one, decided)
            continue
        index = _index_of(model, one)
        if index is None:
            continue
        node = model.graph.node[index]
        decided_by[one.value] = node.output[list(node.output).index(one.value)] = decided
        for more in reversed(_injection(one)):
            model.graph.node.insert(index + 1, more)
        taken = TensorProto.FLOAT if _is_number(one.kind) else TensorProto.BOOL
        model.graph.input.append(helper.make_tensor_value_info(mask_input(one.name), taken, None))
        _show(model, one, decided)


def _index_of(model: onnx.ModelProto, one: Found) -> int | None:
    return next((i for i, node in enumerate(model.graph.node) if one.value in node.output), None)


def _show(model: onnx.ModelProto, one: Found, decided: str) -> None:
    model.graph.output.append(onnx.ValueInfoProto(name=decided))
    for number, operand in enumerate(one.operands):
        place = operand_output(one.name, number)
        model.graph.node.append(helper.make_node("Identity", [operand], [place]))
        model.graph.output.append(onnx.ValueInfoProto(name=place))


def _is_number(kind: str) -> bool:
    return kind in _ROUNDINGS.values() or kind == "trunc"


def _injection(one: Found) -> list[onnx.NodeProto]:
    """The nodes from the injected input to the gate's value."""
    given, decided = mask_input(one.name), instrument.gate_output(one.name)
    if one.columns:
        rows, shape = f"{given}::rows", f"{given}::shape"
        joined = [
            helper.make_node("Constant", [], [shape], value_ints=[-1, one.columns]),
            helper.make_node("Reshape", [given, shape], [rows]),
        ]
        return [*joined, *_coded(one, rows, decided)]
    return _coded(one, given, decided)


def _coded(one: Found, given: str, decided: str) -> list[onnx.NodeProto]:
    """The nodes from a decision of the reference to the gate's value."""
    if one.levels is not None and one.levels.zero_point:
        zero, code = f"{given}::zero_point", f"{given}::code"
        return [
            helper.make_node("Constant", [], [zero], value_float=float(one.levels.zero_point)),
            helper.make_node("Add", [given, zero], [code]),
            helper.make_node("CastLike", [code, decided], [one.value]),
        ]
    if _is_number(one.kind):
        return [helper.make_node("CastLike", [given, decided], [one.value])]
    return [helper.make_node("Not" if one.complement else "Identity", [given], [one.value])]


def gates_of(wanted: Sequence[Candidate], values: Mapping[str, np.ndarray], noise: float) -> dict[str, OtherGate]:
    """Every candidate of a graph as a gate of a reference, by the name of its value.

    Args:
        values: outputs of :func:`shown`.
        noise: of margins, in units of ``|a| + |b|``.
    """
    found = {}
    for one in wanted:
        decided = values[instrument.gate_output(one.value)]
        operands = [values[operand_output(one.value, i)].astype(np.float32) for i in range(len(one.operands))]
        margin = np.broadcast_to(_margin(operands), decided.shape)
        size = np.broadcast_to(sum(np.abs(operand) for operand in operands), decided.shape)
        size = np.where(np.isfinite(size), size, 0.0)
        scale = size.max(axis=channel_axes(size.ndim), keepdims=True) if size.ndim and size.size else size
        kept = decided if decided.dtype == bool else decided.astype(np.float32)
        found[one.value] = OtherGate(one.value, one.kind, kept, (View(one.kind, margin, scale, noise * scale, noise),))
    return found


def decision(one: Found, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Decisions of an exposed gate and their margin, in the reference's sense (complement and swap undone)."""
    decided = values[instrument.gate_output(one.name)]
    operands = [values[operand_output(one.name, i)] for i in range(len(one.operands))]
    if one.levels is not None:
        x = operands[0] if len(operands) == 1 else np.concatenate(operands, one.axis)
        return decided.astype(np.float32) - np.float32(one.levels.zero_point), code_margin(x, one.levels)
    margin = _margin(operands)
    if decided.dtype == bool:
        return (~decided if one.complement else decided), (-margin if one.mirrored else margin)
    return decided.astype(np.float32), margin


def like(expected: np.ndarray, found: Found, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Arrays of a quantised matrix in the reference's shape, where the rows of the matrix are several axes."""
    rows = found.columns and expected.ndim > 2 and expected.shape[-1] == found.columns
    return tuple(a.reshape(expected.shape) if rows and a.size == expected.size else a for a in arrays)


def code_margin(x: np.ndarray, levels: Levels) -> np.ndarray:
    """x in units of the scale, cut off at the first and last code, float32; by PyTorch's formula, a reciprocal."""
    scaled = x.astype(np.float32) * (np.float32(1) / np.float32(levels.scale))
    return np.clip(scaled, levels.low - levels.zero_point, levels.high - levels.zero_point).astype(np.float32)


def _margin(operands: Sequence[np.ndarray]) -> np.ndarray:
    first = np.asarray(operands[0], np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return first - np.asarray(operands[1], np.float32) if len(operands) > 1 else first


# --- which is which --------------------------------------------------------------------------------------------------


def of_floats(wanted: Sequence[Candidate], values: Mapping[str, np.ndarray]) -> list[Candidate]:
    """The candidates whose operands were floating in a run of :func:`shown`."""
    return [one for one in wanted if values[operand_output(one.value, 0)].dtype.kind == "f"]


def align(
    gates: Mapping[str, OtherGate], wanted: Sequence[Candidate], values: Mapping[str, np.ndarray]
) -> tuple[list[Found], dict[str, str]]:
    """Match gates with the candidates that decide them.

    Args:
        values: outputs of :func:`shown` on the sample of the gates.

    Returns:
        the matches, and the names of the other gates with the reason.
    """
    scored = []
    for row, (name, gate) in enumerate(gates.items()):
        for column, one in enumerate(wanted):
            score, found = _compare(gate, one, values)
            if found is not None and (score >= _ALIKE or name == one.value):
                place = abs(row / len(gates) - column / len(wanted))
                scored.append(((name != one.value, -round(score, 3), found.complement, place), found))
    taken: set[str] = set()
    kept: dict[str, Found] = {}
    for _, found in sorted(scored, key=lambda pair: pair[0]):
        if found.name not in kept and found.value not in taken:
            kept[found.name] = found
            taken.add(found.value)
    missing = {name: gate for name, gate in gates.items() if name not in kept}
    unfound = {
        name: "no comparison in the graph makes its decisions" if wanted else "the graph holds no comparison"
        for name, gate in missing.items()
        if not any(_same(gate, gates[other]) for other in kept)  # the graph computes both once
    }
    return [kept[name] for name in gates if name in kept], unfound


def _compare(gate: OtherGate, one: Candidate, values: Mapping[str, np.ndarray]) -> tuple[float, Found | None]:
    """Score of a gate and a candidate, and how the candidate's decisions read as the gate's."""
    decided = values[instrument.gate_output(one.value)]
    number = gate.decided.dtype != bool
    if decided.shape != gate.decided.shape or (decided.dtype != bool) != number:
        return 0.0, None
    if number and one.kind != gate.kind:
        return 0.0, None
    operands = [values[operand_output(one.value, i)] for i in range(len(one.operands))]
    margin = np.broadcast_to(_margin(operands), decided.shape)
    ours, theirs = _some(gate.decided), _some(decided)
    agree = float(np.mean(ours == theirs)) if ours.size else 1.0
    close, view, mirrored = _nearest(gate, _some(margin), number)
    score = close + _correlation(ours, theirs)
    complement = not number and agree < 0.5
    return score, Found(
        gate.name, one.value, one.operands, one.node, one.kind, complement,
        view if close >= _OPERANDS_ALIKE else None, mirrored and not number,
    )  # fmt: skip


def _nearest(gate: OtherGate, margin: np.ndarray, number: bool) -> tuple[float, int | None, bool]:
    """Agreement of the operands (1 is equal), in which view, and whether they are swapped."""
    best: tuple[float, int | None, bool] = (0.0, None, False)
    for index, view in enumerate(gate.views):
        expected = _some(view.margin)
        for mirrored in (False,) if number else (False, True):
            found = -margin if mirrored else margin
            finite = np.isfinite(expected) & np.isfinite(found)
            size = float(np.linalg.norm(expected[finite].astype(np.float64)))
            off = float(np.linalg.norm(found[finite].astype(np.float64) - expected[finite]))
            close = 1.0 if off == 0.0 and finite.any() else 1 - min(off / size, 1.0) if size else 0.0
            if close > best[0]:
                best = close, index, mirrored
    return best


def _some(values: np.ndarray) -> np.ndarray:
    flat = np.ravel(values)
    return flat[:: max(flat.size // _AT_MOST, 1)]


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Absolute correlation of two gates' decisions; 0 where one of them never changes."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    a, b = a - a.mean() if a.size else a, b - b.mean() if b.size else b
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return abs(float(a @ b)) / size if size else 0.0


def _same(one: OtherGate, other: OtherGate) -> bool:
    """Whether two gates of the reference decide the same, or always the opposite."""
    if one.decided.shape != other.decided.shape or one.decided.dtype != other.decided.dtype:
        return False
    same = np.array_equal(one.decided, other.decided)
    opposite = one.decided.dtype == bool and np.array_equal(one.decided, ~other.decided)
    return bool(same or opposite)
