"""Guard of a rewrite: the original file against the rewritten file, in ONNX Runtime.

The input x of every SRU is read from a run of the original. On this x three masks are compared gate by gate: PyTorch's
formula (the specification), the original's mask, and the rewritten node's mask. Then the original's masks are injected
into the rewritten graph: with equal gates the rest is continuous, and the outputs must be equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.other_gates import Found, count_flips
from scconv_deploy.gate.planes import as_planes
from scconv_deploy.graph import gates as onnx_gates
from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import mask_input
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, Link
from scconv_deploy.records.tolerances import ALL, REWRITE
from scconv_deploy.rewrite.apply import Applied, Fused
from scconv_deploy.runtimes.half import float_arithmetic
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.metrics import distance
from scconv_deploy.verification.reference.run import Arrays

REWRITE_LINK = "rewrite"
REPLAY_LIMIT = REWRITE["rewrite_replay"].value
NAIVE_LIMIT = REWRITE["rewrite_gates"].value
"""Limit in z for groups of up to ``_LARGE_GROUP`` elements; for larger groups, in proportion to their size."""
_LARGE_GROUP = 2**16
SigmoidInputs = Mapping[str, str]


@dataclass(frozen=True)
class GateComparison:
    """Gates of one SRU on the original's x, summed over the samples.

    Attributes:
        file: flips of the original's mask against PyTorch's formula.
        rewritten: flips of the rewritten node's mask against PyTorch's formula.
        file_beyond: flips of the original farther than ``file_limit`` from the threshold, in z.
        file_largest_z: largest distance of a flip of the original from the threshold, in z.
        undefined: gates of constant groups, where the original lost its eps and divides 0 by 0.
    """

    site: str
    file: FlipCount
    rewritten: FlipCount
    file_beyond: int = 0
    file_largest_z: float = 0.0
    file_limit: float = NAIVE_LIMIT
    undefined: int = 0


@dataclass(frozen=True)
class GuardReport:
    """Result of the guard; true if the files compute the same.

    Attributes:
        gates: comparison of the gates of each SRU.
        thresholds: other thresholds that were rewritten: (name, elements, changed).
        others: gates of no known SRU in both files, on the same input: (name, elements, changed, unexplained).
        outputs: (name, relative L2 with the original's gates injected, relative L2 free-running); empty if the original
            divides 0 by 0 in every sample.
        samples: names of the samples.
        not_run: why nothing could be compared; "" if it could.
        unread: (SRU, reason) of SRUs whose gates cannot be read from the original.
    """

    gates: tuple[GateComparison, ...] = ()
    thresholds: tuple[tuple[str, int, int], ...] = ()
    others: tuple[tuple[str, int, int, int], ...] = ()
    outputs: tuple[tuple[str, float, float], ...] = ()
    samples: tuple[str, ...] = ()
    not_run: str = ""
    unread: tuple[tuple[str, str], ...] = field(default=())

    @property
    def failures(self) -> tuple[str, ...]:
        """Differences that are not allowed."""
        found = []
        for gate in self.gates:
            if gate.rewritten.unexplained:
                found.append(f"{gate.site}: {gate.rewritten.unexplained} gates differ from PyTorch beyond rounding")
            if gate.file_beyond:
                found.append(
                    f"{gate.site}: {gate.file_beyond} gates of the file lie {gate.file_largest_z:.1e} from the "
                    f"threshold in z (limit {gate.file_limit:.2g}), so it is another gate"
                )
        found += [
            f"{name}: {unexplained} of {elements} decisions differ from the file's beyond rounding"
            for name, elements, _, unexplained in self.others
            if unexplained
        ]
        # not (>), so that NaN fails
        found += [
            f"output {name} differs by {forced:.1e} relative L2 with the same gates (limit {REPLAY_LIMIT:g})"
            for name, forced, _ in self.outputs
            if not forced <= REPLAY_LIMIT
        ]
        return tuple(found)

    def __bool__(self) -> bool:
        return not self.failures

    @property
    def file_changed(self) -> int:
        """Number of gates that the original decides otherwise than PyTorch."""
        others = sum(changed for _, _, changed in self.thresholds)
        return sum(gate.file.flips + gate.file.ill_conditioned for gate in self.gates) + others

    @property
    def rewritten_changed(self) -> int:
        return sum(gate.rewritten.flips + gate.rewritten.ill_conditioned for gate in self.gates)

    @property
    def sentence(self) -> str:
        """Flip counts of both files in one line; "" if no gate was compared."""
        if not self.gates and not self.thresholds:
            return ""
        ours = f"the rewritten file {self.rewritten_changed:,}"
        text = f"your file changed {self.file_changed:,} gates on this input; {ours}"
        undefined = sum(gate.undefined for gate in self.gates)
        if undefined:
            text += f"; your file lost its eps: in {undefined:,} (groups without spread) it divides 0 by 0"
        return text

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": "not run" if self.not_run else "passed" if self else "failed",
            "sentence": self.sentence,
            "failures": list(self.failures),
            "tolerances": {name: asdict(tolerance) for name, tolerance in REWRITE.items()},
            **asdict(self),
        }


def link_of(guard: GuardReport) -> Link:
    """Link of a report's chain from the user's file to the rewritten one."""
    if guard.not_run:
        return Link(REWRITE_LINK, "not run", guard.not_run)
    if guard.failures:
        return Link.of(REWRITE_LINK, [Check("rewrite", "failed", failure) for failure in guard.failures])
    worst = max((forced for _, forced, _ in guard.outputs), default=0.0)
    parts = [guard.sentence, f"outputs with your file's gates within {worst:.1e} relative L2"]
    return Link.of(REWRITE_LINK, [Check("rewrite", "passed", "; ".join(part for part in parts if part))])


def compare_graphs(
    original: onnx.ModelProto,
    rewritten: onnx.ModelProto,
    applied: Applied,
    thresholds: SigmoidInputs,
    samples: Mapping[str, Mapping[str, np.ndarray]],
) -> GuardReport:
    """Compare an original file and its rewritten form.

    Args:
        original, rewritten: models below 2 GiB; the rewritten one with its functions.
        thresholds: name of the mask of each rewritten sigmoid threshold -> name of the sigmoid's argument.
        samples: name of the sample -> inputs by name.
    """
    tensors = _tensor_names(original)
    readable = [f for f in applied.fused if f.x in tensors and f.mask in tensors]
    unread = tuple(
        (f.site, "the file names its tensors otherwise than its simplified form")
        for f in applied.fused
        if f not in readable
    )
    masks = {name: z for name, z in thresholds.items() if name in tensors and z in tensors}
    wanted = {f.x for f in readable} | {f.mask for f in readable} | set(masks) | set(masks.values())
    others = _other_gates(original, rewritten, set(masks))
    exposed = _exposing(original, wanted)
    onnx_gates.expose(exposed, [found for found, _ in others])
    options = float_arithmetic(original, RuntimeOptions())
    try:
        fixed = _forced(rewritten, readable, list(masks), [found for _, found in others])
        with (
            OnnxRuntimeRunner(exposed, options) as before,
            OnnxRuntimeRunner(rewritten, options) as after,
            OnnxRuntimeRunner(fixed, options) as forced,
        ):
            return _compare(original, rewritten, readable, masks, others, samples, (before, after, forced), unread)
    except ModelError as error:
        if _runs(exposed, samples):
            raise ModelError(
                f"The rewritten file does not run, and the original does: {error.message}",
                "This is a fault of the rewrite: please report it with the file.",
            ) from error
        return GuardReport(not_run=str(error), unread=unread)


def _runs(model: onnx.ModelProto, samples: Mapping[str, Mapping[str, np.ndarray]]) -> bool:
    try:
        with OnnxRuntimeRunner(model) as runner:
            for feeds in samples.values():
                runner.run(feeds)
    except ModelError:
        return False
    return True


def _compare(
    original: onnx.ModelProto,
    rewritten: onnx.ModelProto,
    fused: Sequence[Fused],
    thresholds: SigmoidInputs,
    others: Sequence[tuple[Found, Found]],
    samples: Mapping[str, Mapping[str, np.ndarray]],
    runners: tuple[OnnxRuntimeRunner, OnnxRuntimeRunner, OnnxRuntimeRunner],
    unread: tuple[tuple[str, str], ...],
) -> GuardReport:
    before, after, forced = runners
    nodes = instrument.sites(rewritten)
    gates: dict[str, GateComparison] = {}
    changed = dict.fromkeys(thresholds, (0, 0))
    counts = {found.name: FlipCount(0) for found, _ in others}
    outputs: dict[str, tuple[float, float]] = {}
    bounds = {name: _bound(rewritten, name) for name in thresholds}
    for feeds in samples.values():
        seen = before.run(feeds)
        injected = dict(feeds)
        here: list[GateComparison] = []
        for one in fused:
            x = as_planes(torch.from_numpy(seen[one.x]))
            mask = as_planes(torch.from_numpy(seen[one.mask]) == one.mask_opened)
            here.append(_gates(rewritten, nodes[one.site], one, x, mask))
            gates[one.site] = _sum(gates.get(one.site), here[-1])
            injected[mask_input(one.site)] = mask.numpy()
        for name, z in thresholds.items():
            injected[_injected_threshold(name)] = seen[name]
            differs = int((seen[name] != bounds[name](seen[z])).sum())
            changed[name] = (changed[name][0] + seen[name].size, changed[name][1] + differs)
        for other, _ in others:
            injected[mask_input(other.name)], _ = onnx_gates.decision(other, seen)
        if any(one.undefined for one in here) and any(np.isnan(seen[o.name]).any() for o in original.graph.output):
            continue  # the original's own NaN
        free = after.run(feeds)
        same_gates = forced.run({name: value for name, value in injected.items() if name in forced.inputs})
        for both in others:
            counts[both[0].name] += _other_flips(both, seen, same_gates)
        for name in (output.name for output in original.graph.output):
            worst = outputs.get(name, (0.0, 0.0))
            pair = distance(same_gates[name], seen[name]), distance(free[name], seen[name])
            outputs[name] = max(worst[0], pair[0]), max(worst[1], pair[1])
    return GuardReport(
        tuple(gates.values()),
        tuple((name, *found) for name, found in changed.items()),
        tuple((name, count.gates, count.flips, count.unexplained) for name, count in counts.items()),
        tuple((name, *worst) for name, worst in outputs.items()),
        tuple(samples),
        unread=unread,
    )


def _other_gates(
    original: onnx.ModelProto, rewritten: onnx.ModelProto, thresholds: Collection[str]
) -> list[tuple[Found, Found]]:
    """Gates of no known SRU with the same name in both files, without those that a rule fused or rewrote."""
    here = {one.value: one for one in onnx_gates.candidates(rewritten)}
    return [
        (_found(one), _found(here[one.value]))
        for one in onnx_gates.candidates(original)
        if one.value in here and one.value not in thresholds and one.kind != "trunc"
    ]


def _found(one: onnx_gates.Candidate) -> Found:
    return Found(one.value, one.value, one.operands, one.node, one.kind)


def _other_flips(pair: tuple[Found, Found], seen: Arrays, forced: Arrays) -> FlipCount:
    """Count the flips of one gate of no known SRU, with the original's gates injected; none for integer operands."""
    theirs, ours = pair
    candidate = onnx_gates.Candidate(theirs.value, theirs.operands, theirs.kind, theirs.node)
    if not onnx_gates.of_floats([candidate], seen):
        return FlipCount(0)
    limit, floor = ALL["other_gates"].value, ALL["assumed_floor"].value
    gate = onnx_gates.gates_of([candidate], seen, floor)[theirs.value]
    decided, margin = onnx_gates.decision(ours, forced)
    return count_flips(gate, ours, decided, margin, limit, np.dtype(np.float32))


def _gates(model: onnx.ModelProto, node: onnx.NodeProto, fused: Fused, x: Tensor, mask: Tensor) -> GateComparison:
    """Compare three masks of one SRU on the same x: PyTorch's formula, the original's, the rewritten node's."""
    gate, expected = fused.gate, fused.gate.mask(x)
    probe = instrument.gate_probe(model, node)
    if probe is None:
        raise ModelError(f"{fused.site}: its function hides its gates.", "Leave --inline out to compare.")
    with OnnxRuntimeRunner(probe) as runner:
        ours = torch.from_numpy(runner.run({instrument.PROBE_X: x.numpy()})[instrument.PROBE_OPEN])
    differs = mask != expected
    of_file, of_ours = gate.count_flips(differs, x), gate.count_flips(ours != expected, x)
    undefined = _without_spread(x, fused) if fused.note else torch.zeros_like(mask)
    if not differs.any():
        return GateComparison(fused.site, of_file, of_ours, undefined=int(undefined.sum()))
    found = gate.margins(x)
    slope = (gate.gamma * gate.weight).abs().double().reshape(1, -1, 1, 1).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (np.abs(found.margin) / found.spread * slope)[(differs & ~undefined).numpy() & ~found.ill]
    limit = NAIVE_LIMIT * max(1.0, x[0].numel() / gate.variant.num_groups / _LARGE_GROUP)
    beyond = int((~(z <= limit)).sum())
    return GateComparison(
        site=fused.site,
        file=of_file,
        rewritten=of_ours,
        file_beyond=beyond,
        file_largest_z=float(z.max(initial=0.0)),
        file_limit=limit,
        undefined=int(undefined.sum()),
    )


def _without_spread(x: Tensor, fused: Fused) -> Tensor:
    """Elements whose group is constant; bool, of x's shape."""
    groups = x.reshape(x.shape[0], fused.gate.variant.num_groups, -1)
    constant = groups.amax(dim=2, keepdim=True) == groups.amin(dim=2, keepdim=True)
    return constant.expand_as(groups).reshape(x.shape)


def _sum(one: GateComparison | None, other: GateComparison) -> GateComparison:
    if one is None:
        return other
    return replace(
        one,
        file=one.file + other.file,
        rewritten=one.rewritten + other.rewritten,
        file_beyond=one.file_beyond + other.file_beyond,
        file_largest_z=max(one.file_largest_z, other.file_largest_z),
        file_limit=max(one.file_limit, other.file_limit),
        undefined=one.undefined + other.undefined,
    )


def _tensor_names(proto: onnx.ModelProto) -> set[str]:
    return {v.name for v in proto.graph.input} | {name for node in proto.graph.node for name in node.output if name}


def _exposing(proto: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """Copy a model and add these tensors to its outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    present = {o.name for o in copy.graph.output}
    known = {v.name: v for v in (*copy.graph.value_info, *copy.graph.input)}
    for name in sorted(names - present):
        copy.graph.output.append(known.get(name, onnx.ValueInfoProto(name=name)))
    return copy


def _injected_threshold(name: str) -> str:
    return f"scconv_guard::{name}"


def _forced(
    proto: onnx.ModelProto, fused: Sequence[Fused], thresholds: Sequence[str], others: Sequence[Found]
) -> onnx.ModelProto:
    """Copy the rewritten graph with all gates and rewritten thresholds injected, and other gates among its outputs."""
    copy = instrument.inject_gates(proto, [f.site for f in fused])
    del copy.graph.output[:]
    copy.graph.output.extend(proto.graph.output)
    onnx_gates.inject(copy, others)
    for node in copy.graph.node:
        for index, name in enumerate(node.input):
            if name in thresholds:
                node.input[index] = _injected_threshold(name)
    boolean = TensorProto.BOOL
    for name in thresholds:
        copy.graph.input.append(helper.make_tensor_value_info(_injected_threshold(name), boolean, None))
    return copy


def _bound(proto: onnx.ModelProto, name: str) -> Any:
    """The rewritten comparison as a function of the sigmoid's argument."""
    node = next(n for n in proto.graph.node if name in n.output)
    stored = next(t for t in proto.graph.initializer if t.name == node.input[1])
    tau = onnx.numpy_helper.to_array(stored)
    return (lambda z: z >= tau) if node.op_type == "GreaterOrEqual" else (lambda z: z < tau)
