"""SRUs of ONNX graphs read from their nodes, and by behaviour: which forms each reads, refuses, or takes for another.

The forms are those of ``tests/rewrite/rules/test_sru.py``, with what each computes known: exports of six variants, what
only looks like an SRU, and one graph changed at one place. An SRU is read right if the operator would get the variant's
comparison, threshold, groups, eps and ddof, and its cuts to the rounding of float32.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxsim
import torch
from onnx import helper, numpy_helper
from torch import nn

from benchmarks import behaviour_reader, rewrite_forms, whose_sum
from benchmarks.harness import Row, write
from scconv_deploy.errors import ScconvDeployError
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS, GateVariant, Weighting
from scconv_deploy.rewrite.apply import apply_rules
from scconv_deploy.rewrite.reader.variant import weight_error
from tests import wild
from tests.gate.plain import Choices, PlainSRU
from tests.rewrite import naive
from tests.rewrite.rules import test_sru

ROOT = Path(__file__).parent.parent
_ROUNDING = 4 * 2.0**-24  # of a cut, relative to its terms
_READERS = {
    "nodes": "scconv_deploy/rewrite/reader/*.py",
    "behaviour (ort)": "benchmarks/behaviour_reader.py",
    "behaviour (torch)": "benchmarks/behaviour_reader.py",
    "behaviour (adapted)": "benchmarks/behaviour_reader.py",
}
_ORDERS = "orders of sum(gamma)"
"""Of these forms the gate weight must be read to the bit, unless a ReduceSum computes it, which has no order."""
_VERDICTS = ("right", "wrongly refused", "rightly refused", "wrong")
_COLUMNS = {"forms": "forms", "reader": "reader", "files": "files", **{v: v for v in _VERDICTS}, "median": "median_s",
            "slowest": "slowest_s", "lines": "lines"}  # fmt: skip
_OF_VARIANT = {
    "groupbn-hard": VARIANTS["groupbn-hard"],
    "groupbn-hard-normalized": replace(VARIANTS["groupbn-hard-normalized"], weighting="torch_sum"),
    "groupnorm-soft": VARIANTS["groupnorm-soft"],
    "groupbn-hard-softmax": replace(VARIANTS["groupbn-hard"], weighting="softmax"),
    "groupbn-hard-strict": replace(VARIANTS["groupbn-hard"], weighting="torch_sum", comparison=">"),
    "groupstd-hard": replace(VARIANTS["groupbn-hard"], weighting="torch_sum", statistics="biased_deviation"),
    "groupvar-hard": replace(VARIANTS["groupbn-hard"], weighting="torch_sum", statistics="unbiased_variance", eps=1e-5),
}


@dataclass(frozen=True)
class Form:
    """A file, and the gates that a reader should find in it."""

    kind: str
    name: str
    proto: onnx.ModelProto
    truth: Sequence[Gate] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draws", type=int, default=12, help="of parameters, as the test draws them (default 12)")
    parser.add_argument("--only", metavar="KIND", help="this kind of forms alone")
    parser.add_argument("--each", action="store_true", help="print a line for each form")


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    readers: dict[str, Callable[[onnx.ModelProto], list[Gate]]] = {
        "nodes": _by_nodes,
        "behaviour (ort)": lambda proto: behaviour_reader.read(proto, "ort", options.seed)[0],
        "behaviour (torch)": lambda proto: behaviour_reader.read(proto, "torch", options.seed)[0],
        "behaviour (adapted)": lambda proto: behaviour_reader.read(proto, "adapted", options.seed)[0],
    }
    verdicts: dict[tuple[str, str], Counter[str]] = {}
    seconds: dict[tuple[str, str], list[float]] = {}
    not_right: dict[tuple[str, str], list[str]] = {}
    for form in _forms(options):
        for name, read in readers.items():
            if name == "behaviour (ort)" and form.kind != "variants":
                continue  # these say enough
            key = form.kind, name
            start = time.perf_counter()
            verdict = _verdict(read, form)
            seconds.setdefault(key, []).append((time.perf_counter() - start) / max(1, len(form.truth)))
            verdicts.setdefault(key, Counter())[verdict] += 1
            if "right" not in verdict.split() and "rightly" not in verdict:
                not_right.setdefault(key, []).append(f"{verdict}: {form.name}")
            if options.each:
                print(f"{form.kind}: {form.name}: {name}: {verdict}", flush=True)
        rows = _rows(verdicts, seconds, not_right)
        write(options.results, rows, _COLUMNS, table=False, seconds="of each SRU, one thread")
    write(options.results, _rows(verdicts, seconds, not_right), _COLUMNS, seconds="of each SRU, one thread")


def _rows(
    verdicts: Mapping[tuple[str, str], Counter[str]],
    seconds: Mapping[tuple[str, str], Sequence[float]],
    not_right: Mapping[tuple[str, str], Sequence[str]],
) -> list[Row]:
    return [
        {
            "forms": kind, "reader": name, "files": sum(counts.values()), **{v: counts[v] for v in _VERDICTS},
            "median_s": float(np.median(seconds[kind, name])), "slowest_s": max(seconds[kind, name]),
            "lines": sum(len(path.read_text().splitlines()) for path in ROOT.glob(_READERS[name])),
            "not right": not_right.get((kind, name), []),
        }
        for (kind, name), counts in verdicts.items()
    ]  # fmt: skip


def _by_nodes(proto: onnx.ModelProto) -> list[Gate]:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    return [fused.gate for fused in apply_rules(model, "multiply", proto.opset_import[0].version).fused]


def _verdict(read: Callable[[onnx.ModelProto], list[Gate]], form: Form) -> str:
    found = read(form.proto)
    loosely = form.kind == _ORDERS and any(node.op_type == "ReduceSum" for node in form.proto.graph.node)
    unmatched = [gate for gate in found if not any(_same(gate, truth, loosely) for truth in form.truth)]
    if form.kind == _ORDERS and not loosely:
        unmatched += [gate for gate in found if not torch.equal(gate.weight, form.truth[0].weight)]
    if unmatched:
        return "wrong"
    if len(found) < len(form.truth):
        return "wrongly refused"
    return "right" if form.truth else "rightly refused"


def _same(found: Gate, truth: Gate, loosely: bool) -> bool:
    """Whether the operator would compute the same; loosely: to what rounding a sum of gamma can cost."""

    def choices(variant: GateVariant) -> tuple[object, ...]:
        return (
            variant.operator, variant.num_groups, variant.ddof, variant.eps_var, variant.eps_std, variant.comparison,
            variant.threshold,
        )  # fmt: skip

    if choices(found.variant) != choices(truth.variant) or not np.array_equal(found.form.sign, truth.form.sign):
        return False
    rounding = weight_error(truth.gamma.double().numpy()) if loosely else _ROUNDING
    if not np.all(np.abs(found.form.cut - truth.form.cut) <= rounding * truth.form.reach):
        return False
    inputs = zip(list(found.operator_inputs().values())[2:], list(truth.operator_inputs().values())[2:], strict=True)
    return all(torch.allclose(one, other, rtol=1e-5, atol=0) for one, other in inputs)


def _forms(options: argparse.Namespace) -> Iterator[Form]:
    kinds = {
        "network": _networks,
        "variants": _variants,
        "sizes and parameters": lambda: _parameters(options.draws),
        "near misses": _near_misses,
        "changed at one place": _changed,
        "beta = 0": _fresh,
        _ORDERS: _orders,
    }
    for kind, forms in kinds.items():
        if options.only in (None, kind):
            for name, proto, truth in forms():
                yield Form(kind, name, proto, truth)


_Made = Iterator[tuple[str, onnx.ModelProto, Sequence[Gate]]]


def _truth(module: nn.Module, variant: GateVariant) -> Gate:
    return Gate(variant, *list(module.parameters())[:2])


def _simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    return onnxsim.simplify(proto)[0]


def _variants() -> _Made:
    for parameter in test_sru.forms():
        name, dynamo, dynamic = parameter.values
        module, proto = test_sru.exported(name, dynamo, dynamic)
        truth = [_truth(module, replace(_OF_VARIANT[name], num_groups=4))]
        yield str(parameter.id), proto, truth
        yield f"{parameter.id}, simplified", _simplified(proto), truth
    for opset in (19, 21, 23):
        module, proto = test_sru.exported("groupnorm-soft", True, False, opset)
        yield f"opset {opset}", proto, [_truth(module, _OF_VARIANT["groupnorm-soft"])]


def _parameters(draws: int) -> _Made:
    straddling = wild.randomize(wild.OriginalSRU(6, 4))
    groups_of_4 = replace(VARIANTS["groupbn-hard"], num_groups=4)
    yield "straddling", naive.export(straddling, naive.noise(2, 6, 4, 6), True), [_truth(straddling, groups_of_4)]
    for threshold in (0.3, 0.5, 0.7):
        module = wild.randomize(wild.StrictSRU(8, 4, threshold))
        variant = replace(_OF_VARIANT["groupbn-hard-strict"], num_groups=4, threshold=threshold)
        yield f"> {threshold}", naive.export(module, naive.noise(2, 8, 4, 6), False), [_truth(module, variant)]
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        channels, groups = int(rng.choice([4, 8, 24])), int(rng.choice([1, 2, 4]))
        threshold, spread = float(rng.choice([0.4, 0.5, 0.52])), float(rng.choice([0.0, 0.1, 3.0]))
        size = [(4, 4), (2, 8), (6, 4)][int(rng.integers(3))]
        module = wild.OriginalSRU(channels, groups, threshold).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            module.gn.gamma.copy_(1 + torch.randn(channels, 1, 1, generator=generator) * 0.5)
            module.gn.beta.copy_(torch.randn(channels, 1, 1, generator=generator) * spread)
        variant = replace(VARIANTS["groupbn-hard"], num_groups=groups, threshold=threshold)
        proto = naive.export(module, naive.noise(2, channels, *size), False)
        yield f"draw {seed}: C={channels} {variant} beta={spread}", proto, [_truth(module, variant)]
    for eps in (1e-12, 1e-7, 3e-9, 1e-4, 1e-2):
        module, groups_of_2 = wild.randomize(wild.OriginalSRU(8, 8)), replace(groups_of_4, num_groups=8, eps=eps)
        module.gn.eps = eps
        proto = naive.export(module, naive.noise(2, 8, 2, 1), False)
        yield f"groups of two, eps {eps:g}", proto, [_truth(module, groups_of_2)]


def _near_misses() -> _Made:
    x, groups_of_4 = naive.noise(2, 8, 4, 6), replace(VARIANTS["groupbn-hard"], num_groups=4)

    class Computed(wild.OriginalSRU):
        def forward(self, x):
            gamma = self.gn.gamma * (1 + x.mean())
            r = torch.sigmoid(wild.OriginalGroupBatchnorm2d.forward(self.gn, x) * (gamma / sum(gamma)))
            return wild.cross((r >= 0.5) * x, (r < 0.5) * x)

    for dynamo in (False, True):
        yield f"computed gamma {dynamo}", _simplified(naive.export(wild.randomize(Computed(8, 4)), x, dynamo)), []
        half = wild.randomize(wild.OriginalSRU(8, 4)).half()
        yield f"half {dynamo}", _simplified(naive.export(half, x.half(), dynamo)), []
    for kind in (wild.InvertedSRU, wild.UncrossedSRU, wild.ClampedSRU):
        module = wild.randomize(kind(8, 4))
        truth = [_truth(module, groups_of_4)] if kind is wild.ClampedSRU else []
        yield kind.__name__, _simplified(naive.export(module, x, False)), truth
    module = wild.randomize(wild.OriginalSRU(8, 4))
    twice = nn.Sequential(module, nn.ReLU(), module)
    yield "shared constants", _simplified(naive.export(twice, x, False)), [_truth(module, groups_of_4)] * 2
    halved = nn.Sequential(_Rounded(), module, _Rounded())
    yield "float32 gate on half data", _simplified(naive.export(halved, x, False)), [_truth(module, groups_of_4)]

    yield "data clipped at 65504", naive.export(_clipped(), x, False), []


def _clipped() -> nn.Module:
    """No SRU where half precision would overflow, and only there."""

    class Clipped(wild.OriginalSRU):
        def forward(self, x):
            w = self.gn.gamma / sum(self.gn.gamma)
            r = torch.sigmoid(self.gn(x) * w)
            kept = x.clamp(-65504, 65504)
            return wild.cross((r >= 0.5) * kept, (r < 0.5) * kept)

    return wild.randomize(Clipped(8, 4))


def _fresh() -> _Made:
    """As in a network that was not trained: the simplifier drops the addition and folds gamma into the weight."""
    for name, build in test_sru.SRUS.items():
        for dynamo in (False, True):
            module = wild.randomize(build())
            with torch.no_grad():
                list(module.parameters())[1].zero_()
            truth = [_truth(module, replace(_OF_VARIANT[name], num_groups=4))]
            proto = naive.export(module, naive.noise(2, 8, 4, 6), dynamo)
            yield f"{name} {'torch.export' if dynamo else 'TorchScript'}", proto, truth
            yield f"{name} {'torch.export' if dynamo else 'TorchScript'}, simplified", _simplified(proto), truth


def _orders() -> _Made:
    """Gammas that nearly cancel, so that Python's sum and torch's give other weights."""
    apart = [seed for seed in range(200) if whose_sum.distance(whose_sum.draw(seed)) > whose_sum.APART]
    for seed, order, dynamo in product(apart[:4], ("python", "torch"), (False, True)):
        module = PlainSRU(Choices(whose_sum.CHANNELS, whose_sum.GROUPS, weight=order, threshold=0.45))
        with torch.no_grad():
            module.gamma.copy_(whose_sum.draw(seed).reshape(-1, 1, 1))
        weighting: Weighting = "sum" if order == "python" else "torch_sum"
        truth = _truth(module, replace(VARIANTS["groupbn-hard"], threshold=0.45, weighting=weighting))
        proto = naive.export(module, naive.noise(2, whose_sum.CHANNELS, 8, 8), dynamo)
        # torch.export's constant folding adds in an order of its own
        constants = [torch.from_numpy(numpy_helper.to_array(t).copy()).reshape(-1) for t in proto.graph.initializer]
        held = [c for c in constants if c.shape == truth.weight.shape and torch.allclose(c, truth.weight, rtol=1e-3)]
        truth = replace(truth, file_weight=held[0]) if held else truth
        yield f"{order}'s, draw {seed}, {'torch.export' if dynamo else 'TorchScript'}", proto, [truth]


class _Rounded(nn.Module):
    def forward(self, x):
        return x.half().float()


def _networks() -> _Made:
    x = naive.noise(2, 3, 32, 32)
    module = rewrite_forms.naive_resnet20()
    truth = [_truth(m, VARIANTS["groupbn-hard"]) for name, m in module.named_modules() if name.endswith(".sru")]
    yield "ScConv-ResNet-20", _simplified(naive.export(module, x, False)), truth


def _changed() -> _Made:
    """The original SRU, simplified, changed at one place."""
    module, exported = test_sru.exported()
    base = _simplified(exported)
    original = replace(VARIANTS["groupbn-hard"], num_groups=4)
    gamma, beta = (p.detach().reshape(-1).clone() for p in list(module.parameters())[:2])
    weight = gamma / sum(gamma)
    true = [Gate(original, gamma, beta)]

    def changed(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
        copy = test_sru.copy_of(base)
        change(copy)
        del copy.graph.value_info[:]
        return copy

    at_least, less = (
        next(i for i, n in enumerate(base.graph.node) if n.op_type == t) for t in ("GreaterOrEqual", "Less")
    )
    for one in ("GreaterOrEqual", "Greater", "Less", "LessOrEqual"):
        for other in ("GreaterOrEqual", "Greater", "Less", "LessOrEqual"):

            def compare(proto, one=one, other=other):
                proto.graph.node[at_least].op_type, proto.graph.node[less].op_type = one, other

            right = {
                ("GreaterOrEqual", "Less"): true,
                ("Greater", "LessOrEqual"): [Gate(replace(original, comparison=">"), gamma, beta)],
            }
            yield f"{one}, {other}", changed(compare), right.get((one, other), [])
    for index, tensor in enumerate(base.graph.initializer):
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            yield from _with_constant(changed, index, value, original, (gamma, beta, weight))
    yield from _with_nodes(changed, base, true)


def _with_constant(changed, index: int, value: np.ndarray, original: GateVariant, parameters) -> _Made:
    gamma, beta, weight = parameters
    role = next((r for r, p in zip(("gamma", "beta", "weight"), parameters, strict=True)
                 if value.size == p.numel() and np.allclose(value.reshape(-1), p, rtol=1e-6)), "")  # fmt: skip
    factors = [0.5, 0.999, 1.001, -1.0]
    moves: list[tuple[str, np.ndarray]] = [(f"times {f}", value * np.float32(f)) for f in factors]
    if role:
        one = value.copy()
        one.reshape(-1)[3] *= np.float32(1.001)
        moves.append(("one channel times 1.001", one))
    elif value.size == 1 and abs(value.item() - 0.5) < 1e-9:
        role = "threshold"
        ulps = [(f"one ulp {name}", np.nextafter(value, np.float32(to))) for name, to in (("up", 1), ("down", 0))]
        moves = [*moves[:3], *ulps]
    elif value.size == 1 and value.item() < 1e-5:
        role = "eps"
        moves = [*moves[:3], *((f"{e:g}", np.full_like(value, e)) for e in (1e-3, 1e-5, 3e-9))]
    for name, moved in moves:
        new = torch.from_numpy(np.array(moved)).reshape(-1)
        number = float(str(np.float32(new[0])))
        truth: list[Gate] = []
        try:
            if role == "threshold":
                truth = [Gate(replace(original, threshold=number), gamma, beta, weight)]
            elif role == "eps":
                truth = [Gate(replace(original, eps=number), gamma, beta, weight)]
            elif role:
                given = {"gamma": gamma, "beta": beta, "weight": weight, role: new}
                truth = [Gate(original, given["gamma"], given["beta"], given["weight"])]
        except ScconvDeployError:
            truth = []

        def move(proto, moved=moved):
            tensor = proto.graph.initializer[index]
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(moved, np.float32), tensor.name))

        yield f"{role or 'factor'} {name}", changed(move), truth


def _with_nodes(changed, base: onnx.ModelProto, true: list[Gate]) -> _Made:
    nodes = base.graph.node
    splits = [o for n in nodes if n.op_type == "Split" for o in n.output]
    for index, node in enumerate(nodes):
        if node.op_type in ("Mul", "Add"):
            yield f"operands of {node.name}", changed(lambda p, i=index: p.graph.node[i].input.reverse()), true
        if node.op_type in ("Sub", "Sigmoid", "Div", "Sqrt"):

            def scale(proto, i=index):
                old, proto.graph.node[i].output[0] = proto.graph.node[i].output[0], "scaled"
                proto.graph.node.insert(i + 1, helper.make_node("Tanh", ["scaled"], [old]))

            yield f"Tanh after {node.name}", changed(scale), []
        if node.op_type == "Add" and set(node.input) <= set(splits):
            for place in (0, 1):
                for other in set(splits) - {node.input[place]}:

                    def halve(proto, i=index, p=place, other=other):
                        proto.graph.node[i].input[p] = other

                    yield f"input {place} of {node.name} is {other}", changed(halve), []
        if node.op_type in ("Sigmoid", "Cast", "GreaterOrEqual", "Sqrt", "Sub"):
            needed = node.op_type not in ("Sqrt", "Sub")
            used = node.output[0]

            def consume(proto, used=used):
                proto.graph.node.append(helper.make_node("Identity", [used], ["z"], "other"))
                proto.graph.output.append(onnx.ValueInfoProto(name="z"))

            yield f"{node.name} needed elsewhere", changed(consume), [] if needed else true
        if node.op_type == "Split":

            def from_behind(proto, i=index):
                next(a for a in proto.graph.node[i].attribute if a.name == "axis").i = -3

            yield f"axis -3 of {node.name}", changed(from_behind), true
        if node.op_type == "ReduceMean":
            for axis in (1, -1):

                def reduce(proto, i=index, axis=axis):
                    name = f"axes_{axis}"
                    proto.graph.initializer.append(numpy_helper.from_array(np.array([axis]), name))
                    proto.graph.node[i].input[1] = name

                yield f"axis {axis} of {node.name}", changed(reduce), true if axis == -1 else []
