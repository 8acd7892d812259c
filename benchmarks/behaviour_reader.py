"""SRUs of an ONNX graph read by behaviour: each region between an x and a crossed Concat is cut out and identified.

A prototype beside :mod:`scconv_deploy.rewrite.reader`, which reads the nodes. ``read_by_behaviour`` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import combinations
from typing import Any, Literal
from unittest import mock

import networkx
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.utils import Extractor
from torch import Tensor, nn
from torch.nn import functional

from scconv_deploy.gate import hypotheses as hypothesising
from scconv_deploy.gate import identify as identifying
from scconv_deploy.gate import trial_run
from scconv_deploy.gate.candidates import Candidate
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.hypotheses import Hypothesis
from scconv_deploy.gate.identify import Identified, identify
from scconv_deploy.gate.planes import RANKS
from scconv_deploy.gate.probes import probes
from scconv_deploy.gate.trial_run import NotIdentifiedError

_COMPARISONS = ("GreaterOrEqual", "Greater", "Less", "LessOrEqual")
_STATISTICS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "InstanceNormalization", "GroupNormalization")
_INPUTS_TRIED = 2
_LOOSE = 1e-5  # relative L2 of values that are normalised or weighted in another order; identify allows 1e-6
_NO_EPS_HELPS = ("normal", "near-threshold", "small near-threshold", "large-mean", "large", "rectified", "recorded")
_SOURCE = ""


Mode = Literal["ort", "torch", "adapted"]
"""Regions run in ONNX Runtime, or in torch's arithmetic; ``adapted``: likewise, and identify is loosened for graphs."""


class Sigmoid(OpRun):  # onnx.reference finds an operator by the name of its class
    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (torch.sigmoid(torch.tensor(x)).numpy(),)


class ReduceSum(OpRun):
    op_domain = ""

    def _run(self, x: np.ndarray, axes: Any = None, keepdims: int = 1, **_: Any) -> tuple[np.ndarray]:
        dims = tuple(range(x.ndim)) if axes is None else tuple(int(a) for a in np.ravel(axes))
        return (torch.tensor(x).sum(dim=dims, keepdim=bool(keepdims)).numpy(),)


class GroupNormalization(OpRun):  # of opset 21 and later: gamma and beta by channel
    op_domain = ""

    def _run(self, x: np.ndarray, *affine: np.ndarray, num_groups: int, epsilon: float, **_: Any) -> tuple[np.ndarray]:
        return (functional.group_norm(torch.tensor(x), num_groups, *map(torch.tensor, affine), epsilon).numpy(),)


_OF_TORCH: list[type[OpRun]] = [Sigmoid, ReduceSum, GroupNormalization]


class Region(nn.Module):
    """What a graph computes between x and y, on any size of x; its attributes are the numbers that it holds."""

    def __init__(self, proto: onnx.ModelProto, mode: Mode) -> None:
        super().__init__()
        self.x, self.y = proto.graph.input[0].name, proto.graph.output[0].name
        runtime: Any = _session(proto) if mode == "ort" else ReferenceEvaluator(proto, new_ops=_OF_TORCH)
        self.compute = runtime.run
        self.arrays: list[np.ndarray] = []
        for index, value in enumerate(_constants(proto)):
            if value.size == 1 and value.dtype == np.float32:  # an eps or a threshold, as its author wrote it
                setattr(self, f"number{index}", float(str(value.reshape(-1)[0])))
            self.arrays.append(value)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.array(self.compute([self.y], {self.x: x.numpy()})[0]))

    def affine_pairs(self, channels: int) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """What may be gamma and beta: constants of C numbers, then the ones and zeros that a simplifier drops."""
        found = {
            a.tobytes(): a
            for a in self.arrays
            if a.dtype == np.float32 and a.size == max(a.shape, default=0) == channels
        }
        given = [a.reshape(-1) for a in found.values()]
        dropped = [np.ones(channels, np.float32), np.zeros(channels, np.float32)]
        pairs = [*combinations(given, 2), *((g, d) for g in given for d in dropped)]
        for one, other in pairs:
            yield nn.Parameter(torch.tensor(one)), nn.Parameter(torch.tensor(other))


def read(proto: onnx.ModelProto, mode: Mode, seed: int = 0) -> tuple[list[Gate], list[str]]:
    """The gates of a graph's SRUs, and a reason for each crossed Concat that is none.

    Args:
        mode: what runs the regions.
    """
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    gates, reasons = [], []
    flow = _flow(proto)
    dominators = networkx.immediate_dominators(flow, _SOURCE)
    for concat in proto.graph.node:
        if concat.op_type == "Concat" and concat.output[0] in dominators and _is_gated(proto, concat):
            try:
                gates.append(_read_one(proto, concat.output[0], flow, dominators, mode, seed))
            except NotIdentifiedError as error:
                reasons.append(error.reason)
    return gates, reasons


def _read_one(proto: onnx.ModelProto, y: str, flow: Any, dominators: dict[str, str], mode: Mode, seed: int) -> Gate:
    types = {v.name: v for v in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)}
    x, tried, refusal = y, 0, NotIdentifiedError("nothing before it is its input")
    while tried < _INPUTS_TRIED and (x := dominators[x]) != _SOURCE:
        inside = networkx.descendants(flow, x) & (networkx.ancestors(flow, y) | {y})
        nodes = [n for n in proto.graph.node if inside & set(n.output)]
        shape = types[x].type.tensor_type.shape.dim if x in types else ()
        if len(shape) not in RANKS or not any(n.op_type in _STATISTICS for n in nodes):
            continue  # between the normalisation and the gate
        if y in types and shape[1] != types[y].type.tensor_type.shape.dim[1]:
            continue  # groups
        tried += 1
        try:
            if types[x].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
                raise NotIdentifiedError("its data are not float32")
            _refuse_if_needed_elsewhere(proto, flow, nodes, y)
            recorded, region = _cut(proto, x, y)
            module = Region(region, mode)
            with _for_graphs(module) if mode == "adapted" else nullcontext():
                return _identify(module, recorded, seed).gate
        except NotIdentifiedError as error:
            refusal = error if "nothing before" in refusal.reason or "not an SRU" in refusal.reason else refusal
    raise refusal


@contextmanager
def _for_graphs(region: Region) -> Iterator[None]:
    """Identification for graphs: values may round otherwise, gamma and the weight be one constant, and where no eps is
    left, 1e-10 is assumed."""
    hypotheses = hypothesising._hypotheses

    def and_folded(candidate: Candidate) -> Iterator[Hypothesis]:
        for one in hypotheses(candidate):
            yield one
            if one.variant.weighting == "softmax":
                yield replace(one, variant=replace(one.variant, weighting="none"))

    changes: dict[str, Any] = {"_hypotheses": and_folded}
    of_probes: dict[str, Any] = {"_CLEAR": identifying._CLEAR}
    if not any(isinstance(v, float) and 0 < v <= 0.1 for v in vars(region).values()):
        changes["_COMMON_EPS"] = (1e-10,)
        changes["_EPS_SCALES"] = ()
        of_probes["probes"] = lambda *given: (found for found in probes(*given) if found[0] in _NO_EPS_HELPS)
    with (
        mock.patch.multiple(hypothesising, **changes),
        mock.patch.multiple(identifying, **of_probes),
        mock.patch.object(trial_run, "VALUE_TOLERANCE", _LOOSE),
    ):
        yield


def _identify(region: Region, recorded: Tensor, seed: int) -> Identified:
    best, refusal = None, NotIdentifiedError("it holds no gamma and beta")
    for affine in region.affine_pairs(recorded.shape[1]):
        try:
            found = identify(Candidate("", region, affine, None, ("none",)), recorded, seed, None)
        except NotIdentifiedError as error:
            if "not an SRU" not in error.reason or "holds no" in refusal.reason:
                refusal = error
            continue
        if best is None or found.flips < best.flips:
            best = found
        if not found.flips:
            break
    if best is None:
        raise refusal
    return best


def _flow(proto: onnx.ModelProto) -> Any:
    """Which tensor is computed from which; a size is no data."""
    flow = networkx.DiGraph()
    constants = {t.name for t in proto.graph.initializer}
    flow.add_edges_from((_SOURCE, v.name) for v in proto.graph.input if v.name not in constants)
    for node in proto.graph.node:
        if node.op_type not in ("Shape", "Size"):
            flow.add_edges_from((i, o) for i in node.input if i and i not in constants for o in node.output)
    return flow


def _is_gated(proto: onnx.ModelProto, concat: onnx.NodeProto) -> bool:
    """Whether a compared sigmoid lies before it, with nothing of another layer between."""
    producers = {o: n for n in proto.graph.node for o in n.output}
    queue, compared = [(concat.output[0], False)], False
    for name, below in queue:
        node = producers.get(name)
        if node is None or (node.op_type == "Sigmoid" and below):
            compared = compared or node is not None
        elif node.op_type in ("Concat", "Add", "Mul", "Sub", "Split", "Slice", "Where", "Cast", "Not", *_COMPARISONS):
            queue += [(i, node.op_type in _COMPARISONS) for i in node.input] if len(queue) < 500 else []
    return compared


def _refuse_if_needed_elsewhere(proto: onnx.ModelProto, flow: Any, nodes: list[onnx.NodeProto], y: str) -> None:
    own = {o for n in nodes for o in n.output}
    for sigmoid in (n.output[0] for n in nodes if n.op_type == "Sigmoid"):
        gate = (networkx.descendants(flow, sigmoid) | {sigmoid}) & networkx.ancestors(flow, y)
        for value in gate:
            if value in {v.name for v in proto.graph.output} or not set(flow.successors(value)) <= own:
                raise NotIdentifiedError(f"its {value} is also needed elsewhere")


def _cut(proto: onnx.ModelProto, x: str, y: str) -> tuple[Tensor, onnx.ModelProto]:
    """An x of the whole graph on noise, and the graph from x to y; sizes read outside are those of that run."""
    producers = {o: n for n in proto.graph.node for o in n.output}
    queue, outside = [y], []
    for name in queue:
        node = producers.get(name)
        if name == x or node is None:
            continue
        if node.op_type == "Shape" and node.input[0] not in queue and node.input[0] != x:
            outside.append(name)
        else:
            queue += [i for i in node.input if i and i not in queue]
    values = dict(zip([x, *outside], _run_whole(proto, [x, *outside]), strict=True))
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for node in copy.graph.node:
        if node.output[0] in outside:
            value = numpy_helper.from_array(values[node.output[0]])
            node.CopyFrom(helper.make_node("Constant", [], [node.output[0]], value=value))
    region = Extractor(copy).extract_model([x], [y])
    for info in (*region.graph.input, *region.graph.output):
        for dim in info.type.tensor_type.shape.dim:
            dim.Clear()
    del region.graph.value_info[:]
    return torch.from_numpy(values[x]), region


def _run_whole(proto: onnx.ModelProto, wanted: list[str]) -> list[np.ndarray]:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    names = [w for w in wanted if w not in {v.name for v in proto.graph.input}]
    copy.graph.output.extend(onnx.ValueInfoProto(name=w) for w in names)
    generator, feeds = np.random.default_rng(0), {}
    constants = {t.name for t in proto.graph.initializer}
    for value in proto.graph.input:
        sizes = [d.dim_value or (2, 8)[i > 0] for i, d in enumerate(value.type.tensor_type.shape.dim)]
        if value.name not in constants:
            kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feeds[value.name] = generator.standard_normal(sizes).astype(kind)
    results = dict(feeds)
    if names:
        results |= zip(names, _session(copy).run(names, feeds), strict=True)
    return [np.array(results[w]) for w in wanted]


def _session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(proto.SerializeToString(), options)


def _constants(proto: onnx.ModelProto) -> list[np.ndarray]:
    of_nodes = [a.t for n in proto.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    attributes = [np.float32(a.f) for n in proto.graph.node for a in n.attribute if a.type == onnx.AttributeProto.FLOAT]
    return [*(numpy_helper.to_array(t) for t in (*proto.graph.initializer, *of_nodes)), *map(np.asarray, attributes)]
