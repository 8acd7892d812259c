"""A small ScConv-ResNet in int8, and damage to its file; used by the tests and by ``benchmarks/mutations.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import FunctionKey
from scconv_deploy.graph.file import serialize
from scconv_deploy.graph.functions import function_text
from scconv_deploy.graph.hygiene import tidy
from scconv_deploy.graph.quantization import read_quantization
from scconv_deploy.model.fake_quantize import quantized_weights
from scconv_deploy.model.prepare import Reference, reference_from_module
from scconv_deploy.nn import ScConv
from scconv_deploy.precision.calibration import Calibration, Method, Observer
from scconv_deploy.precision.int8 import prepared, quantized
from scconv_deploy.precision.placement import PlacementOptions
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.quantization import LARGEST_CODE, METADATA, Target
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.half import runner_of
from scconv_deploy.verification.onnx.chain import verify_artifact
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from scconv_deploy.verification.reference.onnx_file import NamedArrays, OnnxReference
from scconv_deploy.verification.samples import Sample
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests.mutations import SITE, edit, two_heads

LAYER = "net.layer2.0.conv1"
"""A convolution with a BatchNorm folded in."""
SIDE = 16


def image(seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def reference(blocks: int = 1) -> tuple[Reference, onnx.ModelProto]:
    """The network, and its float32 file."""
    found, log = reference_from_module(two_heads(blocks, SIDE), image())
    return found, onnx.load_model_from_string(serialize(export_to_ir(found, ExportOptions(), log)))


def quantize(
    proto: onnx.ModelProto, target: Target = "gpu", largest_code: int = LARGEST_CODE, **placement: tuple[str, ...]
) -> onnx.ModelProto:
    """A float file in int8, calibrated on seeded images."""
    found = prepared(proto, PlacementOptions(**placement))
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    known = {value.name for value in proto.graph.output}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in found.values if name not in known)
    observer = Observer(Method())
    with runner_of(exposed) as runner:
        for seed in range(3):
            values = runner.run({name: image(seed).numpy() for name in runner.inputs})
            observer.add({name: values[name] for name in found.values}, f"seed {seed}")
    made = Calibration("max", 6, "seeded", "", "", observer.ranges())
    model = ir.to_proto(quantized(found, made.ranges, made.record(target, largest_code)))
    tidy(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def judge_against_float(floats: onnx.ModelProto, proto: onnx.ModelProto) -> ParityReport:
    """The report of a file on one sample without the model: against its float file."""
    artifact = Artifact(proto, "model.onnx", proto.SerializeToString())
    source = OnnxReference("float.onnx", floats, measured=False)
    return verify_artifact(source, artifact, [NamedArrays("seeded", {"image": image(9).numpy()})], StageLog())


def judge(of: Reference, proto: onnx.ModelProto) -> ParityReport:
    """The report of a file on one sample."""
    artifact = Artifact(proto, "model.onnx", proto.SerializeToString())
    return verify_onnx(of, artifact, [Sample("seeded", dict.fromkeys(of.signature.names, image(9)))], StageLog())


class Mixed(nn.Module):
    """What networks hold besides: a Concat of two layers, reflected padding, a layer called twice, depthwise and linear
    ones, a squeeze and excitation, a transposed convolution, sums of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 16, 1),
        )
        self.bn = nn.BatchNorm2d(16)
        self.dw, self.pw = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 16, 1)
        self.scconv = ScConv(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.up = nn.ConvTranspose2d(16, 16, 2, 2)
        self.twice = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.first, self.second, self.fc = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        for value in (self.bn.running_var, self.bn.running_mean, self.bn.weight, self.bn.bias):
            nn.init.uniform_(value, 0.5, 1.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.stem(image))
        both = torch.cat([torch.relu(self.bn(self.a(x))), self.b(x)], 1)
        x = self.pw(nn.functional.relu6(self.dw(both))) + x
        x = x + self.scconv(x)
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = self.twice(torch.relu(self.twice(x))) + x
        x = nn.functional.avg_pool2d(self.up(x), 2).mean((2, 3))
        return self.fc(self.second(nn.functional.gelu(self.first(nn.functional.layer_norm(x, (16,))))))


def mixed() -> tuple[Reference, onnx.ModelProto]:
    """:class:`Mixed`, seeded, and its float32 file."""
    torch.manual_seed(0)
    found, log = reference_from_module(Mixed().eval(), image())
    return found, onnx.load_model_from_string(serialize(export_to_ir(found, ExportOptions(), log)))


class Standardized(nn.Conv2d):
    """A convolution that is no plain one: it standardises its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Tied(nn.Module):
    """Modules that share a weight, one called twice, one normed in one of its calls, and layers that are no plain ones.

    ``a`` and ``b`` are convolutions of one weight, ``a`` with a BatchNorm behind it; ``e`` and ``f`` are linear layers
    of one weight on sequences.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.a, self.bn = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a.weight = self.b.weight
        self.scconv = ScConv(16)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.once, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.standardized = Standardized(16, 16, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(16, 16, 1, 1) / 4)
        self.e, self.f, self.fc = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.f.weight = self.e.weight
        for bn in (self.bn, self.norm):
            for value in (bn.running_var, bn.running_mean, bn.weight, bn.bias):
                nn.init.uniform_(value, 0.5, 1.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(image))
        x = self.scconv(torch.relu(self.b(torch.relu(self.bn(self.a(x))))))
        x = self.twice(torch.relu(self.twice(x)))
        x = self.once(torch.relu(self.norm(self.once(x))))
        x = torch.relu(self.standardized(x) + nn.functional.conv2d(x, self.kernel))
        x = nn.functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        return self.fc(torch.relu(self.f(torch.relu(self.e(x)))).mean(1))


def tied_net() -> nn.Module:
    """:class:`Tied`, seeded."""
    torch.manual_seed(0)
    return Tied().eval()


def failed_checks(report: ParityReport) -> set[str]:
    return {check.name for link in report.links for check in link.checks if check.status == "failed"}


@dataclass(frozen=True)
class Fault:
    """Damage to the int8 file.

    Attributes:
        damage: changes the model in place.
        caught: checks that fail; empty where nothing can show it, for the reason in ``hidden``.
    """

    damage: Callable[[onnx.ModelProto], None]
    caught: frozenset[str]
    hidden: str = ""


def _stored(model: onnx.ModelProto, ending: str) -> str:
    """Name of the initializer of the damaged layer's input or weight."""
    node = next(n for n in model.graph.node if LAYER in "".join(n.input) and n.op_type == "Conv")
    source = node.input[0].removesuffix("_DequantizeLinear_Output")
    return {"input": f"{source}_scale", "zero": f"{source}_zero_point", "weight": f"{LAYER}.weight_scale",
            "codes": f"{LAYER}.weight_quantized"}[ending]  # fmt: skip


def _scale(which: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    return lambda model: edit(model, _stored(model, which), change)


def _next(value: np.ndarray) -> np.ndarray:
    return np.nextafter(value, np.float32(np.inf), dtype=np.float32)


def _per_tensor(model: onnx.ModelProto) -> None:
    """One scale for all channels, and codes to match."""
    scales = next(t for t in model.graph.initializer if t.name == _stored(model, "weight"))
    codes = next(t for t in model.graph.initializer if t.name == _stored(model, "codes"))
    each = numpy_helper.to_array(scales)
    weight = numpy_helper.to_array(codes) * each.reshape(-1, 1, 1, 1)
    one = np.float32(np.abs(weight).max() / 127)
    codes.CopyFrom(numpy_helper.from_array(np.rint(weight / one).astype(np.int8), codes.name))
    scales.CopyFrom(numpy_helper.from_array(np.full_like(each, one), scales.name))


def _one_code(model: onnx.ModelProto) -> None:
    def change(codes: np.ndarray) -> np.ndarray:
        codes.flat[5] += 1 if codes.flat[5] < 100 else -1
        return codes

    edit(model, _stored(model, "codes"), change)


def _pair(model: onnx.ModelProto, value: str, before: onnx.NodeProto, scale: float) -> str:
    """Put a pair of quantisers on a value before a node; the name of the dequantised value."""
    name = f"{value}_fault"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(scale), f"{name}_scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.int8(0), f"{name}_zero"))
    index = list(model.graph.node).index(before)
    ends = [f"{name}_scale", f"{name}_zero"]
    model.graph.node.insert(index, helper.make_node("DequantizeLinear", [f"{name}_q", *ends], [f"{name}_d"]))
    model.graph.node.insert(index, helper.make_node("QuantizeLinear", [value, *ends], [f"{name}_q"]))
    return f"{name}_d"


def _inside_the_fence(model: onnx.ModelProto) -> None:
    node = instrument.sites(model)[SITE]
    node.input[1] = _pair(model, node.input[1], node, 1 / 32)


def _before_the_fence(model: onnx.ModelProto) -> None:
    node = instrument.sites(model)[SITE]
    node.input[0] = _pair(model, node.input[0], node, 1 / 32)


def _sign_through_int8(model: onnx.ModelProto) -> None:
    """A parameter whose initializer a quantiser shared: the value survives, its protection does not."""
    node = instrument.sites(model)[SITE]
    node.input[2] = _pair(model, node.input[2], node, 1.0)


def _quantized_statistic(model: onnx.ModelProto) -> None:
    """The deviation of a group as an int8, inside the function. A first mean would be repaired later."""
    text = function_text(FunctionKey("SRU", False, "multiply", 18))
    body = onnx.parser.parse_function(text)
    node = next(n for n in body.node if n.output[0] == "sru__deviation")
    index = list(body.node).index(node) + 1
    node.output[0] = "fault_x"
    scale = helper.make_tensor("s", TensorProto.FLOAT, [], [1 / 64])
    zero = helper.make_tensor("z", TensorProto.INT8, [], [0])
    more = [
        helper.make_node("Constant", [], ["fault_s"], value=scale),
        helper.make_node("Constant", [], ["fault_z"], value=zero),
        helper.make_node("QuantizeLinear", ["fault_x", "fault_s", "fault_z"], ["fault_q"]),
        helper.make_node("DequantizeLinear", ["fault_q", "fault_s", "fault_z"], ["sru__deviation"]),
    ]  # fmt: skip
    for extra in reversed(more):
        body.node.insert(index, extra)
    kept = [f for f in model.functions if f.overload]
    del model.functions[:]
    model.functions.extend([*kept, body])


def _two_sites(model: onnx.ModelProto) -> tuple[str, str]:
    record = json.loads(next(entry.value for entry in model.metadata_props if entry.key == METADATA))
    return tuple(
        sorted(record["activations"], key=lambda v: record["activations"][v]["scale"])[
            :: len(record["activations"]) - 1
        ]
    )  # type: ignore[return-value]


def _swapped(model: onnx.ModelProto) -> None:
    one, other = _two_sites(model)
    first, second = (next(t for t in model.graph.initializer if t.name == f"{v}_scale") for v in (one, other))
    first.raw_data, second.raw_data = second.raw_data, first.raw_data


def _swapped_in_the_record_too(model: onnx.ModelProto) -> None:
    one, other = _two_sites(model)
    _swapped(model)
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA)
    record = json.loads(entry.value)
    levels = record["activations"]
    levels[one], levels[other] = levels[other], levels[one]
    entry.value = json.dumps(record)


def _other_scale_back(model: onnx.ModelProto) -> None:
    """Dequantised with another scale than it was quantised with."""
    node = next(
        n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[1] == _stored(model, "input")
    )
    scale = next(t for t in model.graph.initializer if t.name == node.input[1])
    model.graph.initializer.append(
        numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.01), "fault_scale")
    )
    node.input[1] = "fault_scale"


def _read_twice(model: onnx.ModelProto) -> tuple[str, str, list[onnx.NodeProto]]:
    """A value that several nodes read dequantised: its name, the dequantised one's, and the nodes."""
    made = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        rounding = made.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        readers = [one for one in model.graph.node if node.output[0] in one.input]
        if rounding is not None and rounding.op_type == "QuantizeLinear" and len(readers) > 1:
            return rounding.input[0], node.output[0], readers
    raise AssertionError("no value is read twice")


def _second_scale(model: onnx.ModelProto) -> None:
    """One reader gets a pair of its own, of another scale; the others keep the record's."""
    value, read, readers = _read_twice(model)
    layer = next(one for one in readers if one.op_type == "Conv")
    layer.input[0] = _pair(model, value, layer, 1 / 16)
    assert any(read in one.input for one in model.graph.node)


def _past_the_quantiser(model: onnx.ModelProto) -> None:
    """One reader takes the value as it is."""
    value, read, readers = _read_twice(model)
    last = readers[-1]
    last.input[list(last.input).index(read)] = value


def _ties_up(model: onnx.ModelProto) -> None:
    """A pair of quantisers written as other operators, which round halves up: ``floor(x / s + 0.5)``, cut off."""
    pair = [n for n in model.graph.node if len(n.input) > 1 and n.input[1] == _stored(model, "input")]
    x, y, scale = pair[0].input[0], pair[-1].output[0], pair[0].input[1]
    index = list(model.graph.node).index(pair[0])
    for node in pair:
        model.graph.node.remove(node)
    for name, value in (("half", 0.5), ("low", -128), ("high", 127)):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), f"fault_{name}"))
    steps = [("Div", [x, scale]), ("Add", ["fault_0", "fault_half"]), ("Floor", ["fault_1"]),
             ("Clip", ["fault_2", "fault_low", "fault_high"]), ("Mul", ["fault_3", scale])]  # fmt: skip
    for number, (operator, inputs) in enumerate(steps):
        output = y if operator == "Mul" else f"fault_{number}"
        model.graph.node.insert(index + number, helper.make_node(operator, inputs, [output]))


def _one_scale_for_two(model: onnx.ModelProto) -> None:
    """Two sites read one initializer, as after a simplifier that takes nearly equal ones for equal."""
    one, other = _two_sites(model)
    for node in model.graph.node:
        node.input[:] = [f"{one}_scale" if name == f"{other}_scale" else name for name in node.input]


TIE = "net.layer2.0.conv2.CRU.GWC"
"""A convolution with a weight that :func:`weight_on_a_tie` puts between two codes."""


@contextmanager
def weight_on_a_tie(of: Reference, model: onnx.ModelProto) -> Iterator[Callable[[int], onnx.ModelProto]]:
    """Put a weight of the model in PyTorch exactly between the codes 10 and 11, as long as the context lasts.

    Yields:
        Makes a copy of the file in which that weight has a given code.
    """
    module = of.model.get_submodule(TIE)
    kept = module.weight.detach().clone()
    expected = quantized_weights(of.model, read_quantization(model).plan)[TIE]
    channel = 3
    place = 0 if int(expected.weight[channel].abs().flatten().argmax()) else 1

    def put(code: int) -> onnx.ModelProto:
        changed = onnx.ModelProto.FromString(model.SerializeToString())

        def change(codes: np.ndarray) -> np.ndarray:
            codes[channel].reshape(-1)[place] = code
            return codes

        edit(changed, f"{TIE}.weight_quantized", change)
        return changed

    try:
        with torch.no_grad():
            module.weight[channel].view(-1)[place] = 10.5 * float(expected.scales[channel])
        yield put
    finally:
        with torch.no_grad():
            module.weight.copy_(kept)


TIE_IS_HIDDEN = "both codes are as near, and a folded BatchNorm or a quotient for a product may give either"
FAULTS: dict[str, Fault] = {
    "scale of an input off by one ulp": Fault(_scale("input", _next), frozenset({"scales"})),
    "scale of an input off by 1 %": Fault(_scale("input", lambda s: s * np.float32(1.01)), frozenset({"scales"})),
    "scale of a weight off by one ulp": Fault(_scale("weight", _next), frozenset({"scales"})),
    "scale of a weight off by 1 %": Fault(
        _scale("weight", lambda s: s * np.float32(1.01)), frozenset({"scales", "weight codes"})
    ),
    "zero point": Fault(_scale("zero", lambda z: z + np.int8(1)), frozenset({"scales"})),
    "per-tensor weights": Fault(_per_tensor, frozenset({"scales", "weight codes"})),
    "int8 weight off by one code": Fault(_one_code, frozenset({"weight codes"})),
    "quantised statistic": Fault(_quantized_statistic, frozenset({"scales", "static", "teacher-forced gates"})),
    "quantised cut": Fault(_inside_the_fence, frozenset({"scales", "static"})),
    "quantised input of an SRU": Fault(_before_the_fence, frozenset({"scales"})),
    "sign through int8": Fault(_sign_through_int8, frozenset({"scales", "static"})),
    "dequantised with another scale": Fault(_other_scale_back, frozenset({"scales"})),
    "a second scale for one reader": Fault(_second_scale, frozenset({"scales"})),
    "ties rounded up, by Floor": Fault(_ties_up, frozenset({"scales"})),
    "one initializer for two scales": Fault(_one_scale_for_two, frozenset({"scales"})),
    "a reader past the quantiser": Fault(_past_the_quantiser, frozenset({"scales"})),
    "scales of two sites swapped": Fault(_swapped, frozenset({"scales"})),
    "scales of two sites swapped, in the record too": Fault(
        _swapped_in_the_record_too, frozenset(),
        "another calibration, and PyTorch quantises with the same: the budget shows what it costs",
    ),
}  # fmt: skip
