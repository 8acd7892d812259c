"""What half precision costs, by converter: outputs, gates and SRUs beside PyTorch's float32, validity and size.

Each half file is run twice: in ONNX Runtime's CPU provider, which has few half kernels and computes most of a float16
file in float32, and in its stand-in (``scconv_deploy.runtimes.stand_in``), which rounds every value as the file says.
The second is what a GPU is nearer to, and the only one for bfloat16. ``.half()`` is PyTorch's own half arithmetic.

NVIDIA's AutoCast pins other versions: AUTOCAST_PYTHON names an interpreter that has nvidia-modelopt[onnx].
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from benchmarks import half_srus, subjects
from benchmarks.gates import count_changed, eager_gates, ort_gates
from benchmarks.half_converters import Converter, Source, Unavailable, converters, inlined, tool_versions
from benchmarks.harness import Row, write
from scconv_deploy.graph.contract import DOMAIN
from scconv_deploy.graph.types import HalfPrecision
from scconv_deploy.runtimes.stand_in import stand_in
from scconv_deploy.verification.metrics import relative_l2
from scconv_deploy.zoo import MODELS
from tests.wild import OriginalSRU

BATCH = 4
SRU_SHAPE = (8, 256, 56, 56)
_OPSET = {"fp16": 18, "bf16": 22}  # bfloat16 convolutions exist since 22
_PLAIN = ("resnet50", "resnet50 as PyTorch initialises it")
_COLUMNS = {
    "network": "network",
    "converter": "converter",
    "given": "source",
    "type": "precision",
    "valid": "valid",
    "rel. L2, every value rounded": "rounded_l2",
    "of what inputs change": "rounded_centred_l2",
    "rel. L2, ONNX Runtime": "ort_l2",
    "times plain": "times_plain",
    "gates changed, running free": "gates_changed",
    "of gates": "gates",
    "SRUs on the same half input: gates changed": "sru_gates_changed",
    "SRUs: outputs wrong": "sru_outputs_wrong",
    "SRUs: rel. L2": "sru_relative_l2",
    "bytes, of the float32 file's": "size_ratio",
    "casts": "casts",
    "converting": "convert_s",
}


@dataclass(frozen=True)
class Subject:
    """A network in user code, its inputs, and PyTorch's float32 answer."""

    name: str
    model: nn.Module
    image: Tensor
    logits: Tensor
    gates: Sequence[Tensor]

    def file(self, source: Source, precision: HalfPrecision) -> onnx.ModelProto:
        if source == "user's export":
            return onnx.load_model_from_string(subjects.cached_naive_onnx(self.model, self.image)[0])
        ours = onnx.load_model_from_string(subjects.our_onnx(self.model, self.image, opset=_OPSET[precision]))
        return ours if source == "ours" else inlined(ours)


def _subject(name: str, seed: int) -> Subject:
    model, image = NETWORKS[name](seed)
    with torch.inference_mode():
        logits = model(image)
    return Subject(name, model, image, logits, eager_gates(model, image))


def _one_sru(seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return OriginalSRU(SRU_SHAPE[1]).eval(), subjects.noise(SRU_SHAPE, seed)


def _scconv(name: str, random_beta: bool = False) -> Callable[[int], tuple[nn.Module, Tensor]]:
    def build(seed: int) -> tuple[nn.Module, Tensor]:
        model, _ = subjects.plain_network(name, seed)
        if random_beta:
            generator = torch.Generator().manual_seed(seed)
            for module in model.modules():
                if isinstance(module, OriginalSRU):
                    nn.init.normal_(module.gn.beta, generator=generator)
        return model, subjects.noise((BATCH, *MODELS[name].input_shape[1:]), seed)

    return build


def _plain(seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return MODELS["resnet50"].build().eval(), subjects.noise((BATCH, 3, 224, 224), seed)


def _plain_initial(seed: int) -> tuple[nn.Module, Tensor]:
    """BatchNorms as PyTorch leaves them, mean 0 and variance 1: far less sensitive to its inputs than the zoo's."""
    model, image = _plain(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return model, image


NETWORKS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "one SRU": _one_sru,
    "scconv_resnet20": _scconv("resnet20"),
    "scconv_resnet20, random beta": _scconv("resnet20", random_beta=True),
    "scconv_resnet50": _scconv("resnet50"),
    "resnet50": _plain,
    "resnet50 as PyTorch initialises it": _plain_initial,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")


def run(options: argparse.Namespace) -> None:
    autocast = os.environ.get("AUTOCAST_PYTHON", "")  # not an option, for the command is written into the results
    rows: list[Row] = []
    for name in options.networks:
        subject = _subject(name, options.seed)
        for row in (*_in_torch(subject), *_converted(subject, autocast)):
            rows.append({"network": name} | row)
            print({key: value for key, value in rows[-1].items() if value is not None}, flush=True)
    _times_plain(rows)
    write(
        options.results, rows, _COLUMNS,
        batch=BATCH, sru_shape=SRU_SHAPE, seed=options.seed, tools=tool_versions(autocast),
    )  # fmt: skip


def _in_torch(subject: Subject) -> list[Row]:
    rows = []
    for precision, call in (("fp16", ".half()"), ("bf16", ".bfloat16()")):
        half = copy.deepcopy(subject.model).to(half_srus.TORCH[precision])
        image = subject.image.to(half_srus.TORCH[precision])
        with torch.inference_mode():
            logits = half(image).float()
        row = {"converter": f"PyTorch, {call}", "source": "user's code", "precision": precision}
        row |= _distances(logits, subject.logits, "rounded")
        if subject.gates:
            row |= {"gates_changed": count_changed(eager_gates(half, image), subject.gates)}
            row |= {"gates": sum(gate.numel() for gate in subject.gates)}
            recorded = half_srus.record(subject.model, subject.image, precision)
            row |= half_srus.in_torch(subject.model, recorded, precision)
        rows.append(row)
    return rows


def _converted(subject: Subject, autocast: str) -> list[Row]:
    rows = []
    files: dict[tuple[Source, str], onnx.ModelProto] = {}
    for converter in converters(autocast):
        if not subject.gates and (converter.blocked or converter.source == "ours, inlined"):
            continue  # nothing to block, and no functions
        key = (converter.source, converter.precision)
        if key not in files:
            files[key] = subject.file(*key)
        row = {"converter": converter.name, "source": converter.source, "precision": converter.precision}
        rows.append(row | _one(subject, converter, files[key]))
    return rows


def _one(subject: Subject, converter: Converter, source: onnx.ModelProto) -> Row:
    given = onnx.ModelProto()
    given.CopyFrom(source)  # some tools write into what they are given
    start = time.perf_counter()
    try:
        half = converter.convert(given)
    except Unavailable as error:
        return {"valid": f"not run: {error}"}
    except Exception as error:  # each tool raises its own; the row says which
        return {"valid": f"no file: {_line(error)}"}
    row: Row = {"convert_s": time.perf_counter() - start, "size_ratio": half.ByteSize() / source.ByteSize()}
    row["casts"] = sum(node.op_type == "Cast" for node in half.graph.node)
    row["valid"], row["fault"], half = _valid(half, source)
    if converter.precision == "fp16":
        try:
            row["ort_l2"] = _distances(subjects.in_ort(half.SerializeToString(), subject.image)(), subject.logits)["l2"]
        except Exception as error:  # onnxruntime's exceptions share no public base class
            row["ort_error"] = _line(error)
    if row["valid"] != "no":
        row |= _rounded(subject, converter, source, stand_in(half))
    return row


def _rounded(subject: Subject, converter: Converter, source: onnx.ModelProto, float_copy: onnx.ModelProto) -> Row:
    data = float_copy.SerializeToString()
    row = _distances(subjects.in_ort(data, subject.image)(), subject.logits, "rounded")
    if subject.gates:
        row["gates"] = sum(gate.numel() for gate in subject.gates)
        row["gates_changed"] = count_changed(ort_gates(data, subject.image), subject.gates)
        ours = source if converter.source != "ours, inlined" else subject.file("ours", converter.precision)
        recorded = half_srus.record(subject.model, subject.image, converter.precision)
        row |= half_srus.in_file(float_copy, half_srus.ends_of_srus(ours), recorded, converter.precision)
    return row


def _valid(model: onnx.ModelProto, source: onnx.ModelProto) -> tuple[str, str, onnx.ModelProto]:
    """What onnx's full checker says of a file, and of an invalid one once it is restored."""
    fault = _fault(model)
    if not fault:
        return "yes", "", model
    mended = _restored(model, source)
    remaining = _fault(mended)
    return ("no", remaining, model) if remaining else ("once restored", fault, mended)


def _restored(model: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """In order, types inferred anew, and the parameters of SRUs the original's."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    originals = {tensor.name: tensor for tensor in source.graph.initializer}
    parameters = {name for node in copied.graph.node if node.domain == DOMAIN for name in node.input[1:]}
    for tensor in copied.graph.initializer:
        if tensor.name in parameters and tensor.name in originals:
            tensor.CopyFrom(originals[tensor.name])
    del copied.graph.value_info[:]
    loaded = ir.from_proto(copied)
    loaded.graph.sort()
    return ir.to_proto(loaded)


def _fault(model: onnx.ModelProto) -> str:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return _line(error)
    return ""


def _distances(y: Tensor, expected: Tensor, prefix: str = "") -> Row:
    """Relative L2, and the same of what differs from the mean over the batch: untrained networks answer any two images
    nearly alike, and what is common to all of them hides errors."""
    centred = [t - t.mean(0, keepdim=True) for t in (y, expected)]
    distances = {"l2": relative_l2(y.numpy(), expected.numpy())}
    distances["centred_l2"] = relative_l2(*(t.numpy() for t in centred))
    return {f"{prefix}_{key}" if prefix else key: value for key, value in distances.items()}


def _times_plain(rows: Sequence[Row]) -> None:
    """ScConv-ResNet-50 beside the plain network that is less sensitive, by the same tool from the same kind of file."""
    plain = {
        (row["converter"], row["source"], row["precision"]): row.get("rounded_l2")
        for row in rows
        if row["network"] == _PLAIN[1]
    }
    for row in rows:
        other = plain.get((row["converter"], row["source"], row["precision"]))
        if row["network"] == "scconv_resnet50" and other and row.get("rounded_l2"):
            row["times_plain"] = row["rounded_l2"] / other


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
