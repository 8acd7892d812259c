"""Networks of the zoo, their parameters and multiply-adds, counted on the meta device: ``scconv-deploy models``.

Networks are built and called on the meta device, which has shapes but no values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scconv_deploy.nn import ScConv
from scconv_deploy.zoo import MODELS, ZooModel
from scconv_deploy.zoo.layers import SpatialConv, conv3x3, scconv3x3
from scconv_deploy.zoo.paper import PAPER
from scconv_deploy.zoo.resnet import RESNET50
from scconv_deploy.zoo.resnet import build as build_resnet

LARGE_DIFFERENCE = 0.02
"""Largest difference from the paper that needs no explanation."""

_OPERATIONS_PER_NORMALIZED = 2


@dataclass(frozen=True)
class Counts:
    """Parameters and multiply-adds of a network.

    Attributes:
        parameters: numbers that training moves.
        multiply_adds: of one sample, convolutions and matrix products.
        flops: the same and two operations for each element that passes a BatchNorm. So the paper counts: with it, and
            not without, its baselines recompute to the digit (ResNet-56: 126.84 M, not 125.75 M).
        scconvs: how many ScConv modules it has.
    """

    parameters: int
    multiply_adds: int
    flops: int
    scconvs: int


@dataclass(frozen=True)
class Entry:
    """A network of the zoo: its name, its default input ``[N, C, H, W]``, where it comes from, and what it costs."""

    name: str
    input_shape: tuple[int, ...]
    source: str
    counts: Counts


@dataclass(frozen=True)
class Listing:
    """The listed networks of the zoo."""

    entries: tuple[Entry, ...]

    def as_json(self) -> dict[str, Any]:
        return {"kind": "models", "models": [_entry_json(entry) for entry in self.entries]}


def _entry_json(entry: Entry) -> dict[str, Any]:
    found = asdict(entry)
    published = PAPER.get(entry.name)
    return found | found.pop("counts") | {"paper": None if published is None else asdict(published)}


def list_models(names: Sequence[str] = (), progress: Callable[[str], None] = lambda message: None) -> Listing:
    """Count networks of the zoo, all of them without names."""
    entries = []
    for name in names or MODELS:
        progress(f"counting {name}")
        entries.append(_entry(name, MODELS[name]))
    return Listing(tuple(entries))


def _entry(name: str, model: ZooModel) -> Entry:
    return Entry(name, model.input_shape, model.source, count(model.build, model.input_shape))


def count(factory: Callable[[], nn.Module], input_shape: tuple[int, ...]) -> Counts:
    """Build a network on the meta device and count it on one sample of ``[N, C, H, W]``."""
    with torch.device("meta"), torch.no_grad():
        model = factory().eval()
        image = torch.empty((1, *input_shape[1:]))
        normalized = _skip_normalization(model)
        with FlopCounterMode(display=False) as counter:
            model(image)
    multiply_adds = counter.get_total_flops() // 2  # torch counts a multiply and an add as two
    return Counts(
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=multiply_adds,
        flops=multiply_adds + _OPERATIONS_PER_NORMALIZED * sum(normalized),
        scconvs=sum(isinstance(module, ScConv) for module in model.modules()),
    )


def _skip_normalization(model: nn.Module) -> list[int]:
    """Let every BatchNorm return its input, which has the same shape: on the meta device it takes most of the time.

    Returns:
        A list that will hold the number of elements of each of their calls.
    """
    elements: list[int] = []

    def forward(x: Tensor) -> Tensor:
        elements.append(x.numel())
        return x

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = forward  # type: ignore[method-assign, assignment]
    return elements


# --- beside the paper ---------------------------------------------------------------------------------------------


def table(listing: Listing) -> str:
    """Markdown: our parameters and FLOPs beside the paper's, each large difference with its explanation."""
    head = (
        "| network | parameters | paper | difference | multiply-adds | FLOPs | paper | difference |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    )
    known = [entry for entry in listing.entries if entry.name in PAPER]
    notes = [f"- `{entry.name}`: {PAPER[entry.name].note}" for entry in known if PAPER[entry.name].note]
    return "\n".join([*head, *map(_row, known), "", "Differences over 2 %:", "", *notes]) + "\n"


def _row(entry: Entry) -> str:
    published, counts = PAPER[entry.name], entry.counts
    parameters, flops = differences(entry)
    cells = (
        f"`{entry.name}`",
        _amount(counts.parameters),
        "-" if published.parameters_m is None else f"{published.parameters_m:.2f} M",
        "-" if parameters is None else f"{parameters:+.1%}",
        _amount(counts.multiply_adds),
        _amount(counts.flops),
        _amount(published.flops_m * 1e6),
        f"{flops:+.1%}",
    )
    return f"| {' | '.join(cells)} |"


def differences(entry: Entry) -> tuple[float | None, float]:
    """Differences of parameters and FLOPs from the paper's, relative to the paper's.

    The entry must be in the paper; None where the paper gives no parameters.
    """
    return _differences(entry.name, entry.counts)


def _differences(name: str, counts: Counts) -> tuple[float | None, float]:
    published = PAPER[name]
    parameters = None
    if published.parameters_m is not None:
        parameters = counts.parameters / (published.parameters_m * 1e6) - 1
    return parameters, counts.flops / (published.flops_m * 1e6) - 1


def _amount(number: float) -> str:
    """A number in millions, or from 10^9 on in billions, as in the paper."""
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _pooled_after(channels: int, stride: int) -> nn.Module:
    scconv = ScConv(channels)
    return scconv if stride == 1 else nn.Sequential(scconv, nn.AvgPool2d(stride, stride))


def _kept_where_strided(channels: int, stride: int) -> nn.Module:
    return ScConv(channels) if stride == 1 else conv3x3(channels, stride)


STRIDES: dict[str, SpatialConv] = {
    "average pooling before ScConv (the zoo's)": scconv3x3(),
    "average pooling after ScConv": _pooled_after,
    "a strided 3x3 stays as it is": _kept_where_strided,
}
"""Places for the stride of ResNet-50's three strided 3x3s."""


def strides_table() -> str:
    """Markdown: ScConv-ResNet-50 with each of :data:`STRIDES` beside the paper's."""
    name = "scconv_resnet50"
    lines = ["| stride | parameters | difference | FLOPs | difference |", "|---|--:|--:|--:|--:|"]
    for what, spatial in STRIDES.items():
        factory = functools.partial(build_resnet, RESNET50, spatial)
        counts = count(factory, MODELS[name].input_shape)
        parameters, flops = _differences(name, counts)
        amounts = f"{_amount(counts.parameters)} | {parameters:+.1%} | {_amount(counts.flops)} | {flops:+.1%}"
        lines.append(f"| {what} | {amounts} |")
    return "\n".join(lines) + "\n"


def document(listing: Listing) -> str:
    """``docs/zoo.md``, whole."""
    return _DOCUMENT.format(
        models="\n".join(_model_row(entry) for entry in listing.entries), table=table(listing), strides=strides_table()
    )


def _model_row(entry: Entry) -> str:
    shape, counts = "x".join(map(str, entry.input_shape)), entry.counts
    amounts = f"{counts.parameters:,} | {_amount(counts.multiply_adds)}"
    return f"| `{entry.name}` | {shape} | {counts.scconvs} | {amounts} | {entry.source} |"


_DOCUMENT = """# The zoo

Generated by `scconv-deploy models --table docs/zoo.md --force`; edit `scconv_deploy/zoo/paper.py`, not this page.

| network | input | ScConvs | parameters | multiply-adds | source |
|---|---|--:|--:|--:|---|
{models}

## Beside the paper

Parameters and FLOPs of one image, ours beside those of Li, Wen, He (CVPR 2023). *Multiply-adds* are those of
convolutions and matrix products, as torch counts them. *FLOPs* add two operations for each element that passes a
BatchNorm: so the paper counts, for its baselines then recompute to the digit (ResNet-56 126.84 M, ResNet-101 7.83 G,
WRN-28-10 5.96 G).

{table}
The paper does not say how strides and channel changes are handled. Here:

- **ResNets and ResNeXt**: ScConv takes the place of each bottleneck's 3x3, and of the second 3x3 of a basic block,
  which never changes channels. A stride is average pooling before ScConv.
- **ResNet-56** has a strided 1x1 in the two shortcuts that change channels (option B); with option A the baseline has
  125.49 M multiply-adds, and the paper's 126.84 M do not recompute.
- **WRN-28-10**: ScConv is the second 3x3 of each block; the first one, which changes channels, stays. A BatchNorm
  follows ScConv, whose channel softmax divides by about 2C: without it the sum would not see the branch.
  Convolutions have biases, and the stride is in the second 3x3: only so does the baseline recompute.
- **DenseNet-121**: ScConv makes 32 channels of 128 as the paper's cost formula says, with C1 = 128 and C2 = 32.
- **ResNeXt-29**: the grouped convolution inside ScConv keeps the cardinality as its groups.
- **Classes**: 100 for 32x32 images, 1000 for ImageNet. The paper's 23.52 M for CIFAR ResNet-50 are those of 10 classes
  (23,520,842), its 14.69 M with ScConv those of 100.

What else a stride could become, for ScConv-ResNet-50 (paper: 16.78 M, 2.70 G):

{strides}"""
