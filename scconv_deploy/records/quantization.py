"""int8 quantisation as pure data: levels of a tensor, sites in PyTorch, and the record that a file carries.

A level is an integer code c and stands for ``(c - zero_point) * scale``. Codes are saturated and halves round to even,
in ONNX (QuantizeLinear) as in PyTorch (``torch.fake_quantize_per_tensor_affine``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

DataType = Literal["float32", "float16", "bfloat16"]
Target = Literal["gpu", "cpu"]
"""Hardware that the codes are for: GPUs take signed activations, ONNX Runtime's CPU kernels are safe with unsigned."""

CODE = "::code"
"""Ending of a quantiser's name among the gates of no SRU."""
LARGEST_CODE, REDUCED_CODE = 127, 64
"""Largest code of a weight. With the reduced one, two products with uint8, 2 * 255 * 64, fit into 16 bits, in which
ONNX Runtime adds them on x86-64 without VNNI."""


def largest_code(reduce_range: bool) -> int:
    """Code of the largest weight of a channel."""
    return REDUCED_CODE if reduce_range else LARGEST_CODE


METADATA = "scconv_deploy.int8"
"""Metadata of a quantised model: :class:`QuantizationRecord` as JSON."""


@dataclass(frozen=True)
class Levels:
    """Levels of one tensor.

    Attributes:
        scale: step between levels; a float32 (or half) value.
        zero_point: code of 0.
        signed: whether codes are int8 (-128 to 127), else uint8 (0 to 255).
    """

    scale: float
    zero_point: int = 0
    signed: bool = True

    @property
    def low(self) -> int:
        """Smallest code."""
        return -128 if self.signed else 0

    @property
    def high(self) -> int:
        """Largest code."""
        return 127 if self.signed else 255


@dataclass(frozen=True)
class LayerPlan:
    """A quantised Conv or Linear module.

    Attributes:
        path: path of the module.
        inputs: levels of the module's input for each call, in order; None where a call's input stays in float.
        scales: scale of the weights of each output channel; of a single entry, one scale for all.
        norm: path of the BatchNorm that is folded into the weights; "" without one.
        data: type that weights and scales were rounded to first, ``float32``, ``float16`` or ``bfloat16``.
        largest_code: code of the largest weight of a channel.
    """

    path: str
    inputs: tuple[Levels | None, ...]
    scales: tuple[float, ...]
    norm: str = ""
    data: DataType = "float32"
    largest_code: int = LARGEST_CODE


@dataclass(frozen=True)
class SkipPlan:
    """A quantised operand of an addition, as the skip of a residual connection.

    Attributes:
        path: path of the module in whose own forward the addition stands.
        addition: its number among the additions there of two tensors that depend on the inputs, from 1.
        operand: 0 or 1.
    """

    path: str
    addition: int
    operand: int
    levels: Levels


@dataclass(frozen=True)
class QuantizationPlan:
    """Quantised sites of a model in PyTorch."""

    layers: tuple[LayerPlan, ...] = ()
    skips: tuple[SkipPlan, ...] = ()


@dataclass(frozen=True)
class QuantizationRecord:
    """Origin of a file's scales; stored in its metadata.

    Attributes:
        method: ``max``, ``entropy`` or ``percentile:P``.
        samples: number of rows that were calibrated on.
        data, data_sha256: source of the rows, and the hash of their values.
        model_sha256: hash of the file that was quantised.
        target: hardware that the codes are for.
        activations: levels by the name of the quantised value.
        reads: number of inputs that read the quantised value, by its name; empty where the file does not say.
        keep, only: patterns of the placement; with them the same float file gives the same plan.
        largest_code: code of the largest weight of each channel.
    """

    method: str
    samples: int
    data: str
    data_sha256: str
    model_sha256: str
    target: Target = "gpu"
    activations: dict[str, Levels] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    largest_code: int = LARGEST_CODE


def gate_of(path: str, number: int) -> str:
    """Name of an activation quantiser among the gates of no SRU: module path, and the number of the call from 2 on."""
    name = f"{path or 'model'}{CODE}"
    return name if number == 1 else f"{name}#{number}"


def is_code(gate: str) -> bool:
    """Whether a gate of no SRU is a quantiser, by the name that :func:`gate_of` gives."""
    return gate.split("#")[0].endswith(CODE)
