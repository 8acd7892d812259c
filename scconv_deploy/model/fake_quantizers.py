"""Models that were trained with fake quantisation: their own quantisers, with the scales that training left.

PyTorch's eager mode (``torch.ao.quantization.prepare_qat``) puts FakeQuantize modules behind layers and onto weights.
Their forward branches on buffers, which no exporter can trace, and fused layers compute a BatchNorm around the rounded
weights. Both are replaced in a copy: a FakeQuantize by its one operator with its scale as a number, a fused layer by a
convolution of the same rounded weights with the BatchNorm's shift as its bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.candidates import find_candidates
from scconv_deploy.gate.swap import StandIn, replace_modules
from scconv_deploy.records.quantization import Levels

SOURCE = "_rounded_source"
"""Name of a layer's weights before they are rounded, among its buffers."""
_PT2E_OPERATORS, _PT2E_MODULES = ("quantized_decomposed", "torchao"), "torchao.quantization.pt2e"
_SIGNED, _UNSIGNED = (-128, 127), (0, 255)


def fake_quantizers(model: nn.Module) -> dict[str, nn.Module]:
    """FakeQuantize modules of a model by path; empty for one that was not trained so."""
    from torch.ao.quantization import FakeQuantizeBase

    modules = model.named_modules(remove_duplicate=False)
    return {path: m for path, m in modules if isinstance(m, (FakeQuantizeBase, FixedQuantizer))}


def refuse_quantized_graphs(name: str, model: nn.Module) -> None:
    """Refuse graphs of PyTorch's pt2e quantisation, converted or only prepared (ModelError).

    They have operators in place of modules, so that neither SRUs nor layers can be found in them.
    """
    for graph in model.modules():
        if not isinstance(graph, torch.fx.GraphModule):
            continue
        rounding = next((str(node.target) for node in graph.graph.nodes if _is_pt2e(graph, node)), "")
        if rounding:
            raise ModelError(
                f"{name} is a graph of PyTorch's pt2e quantisation (it calls {rounding}), in which no module is left "
                "to recognise an SRU by.",
                "Write what convert_pt2e gives with torch.onnx.export(..., dynamo=True), and give the file to "
                "scconv-deploy rewrite; or train the module in eager mode (torch.ao.quantization.prepare_qat), which "
                "keeps its modules.",
            )


def with_fixed_quantizers(model: nn.Module) -> nn.Module:
    """A copy whose FakeQuantize modules are single operators; the model itself if it has none.

    Raises:
        ModelError: a quantiser still observes, is off, has levels that int8 has not, or stands inside an SRU.
    """
    found = fake_quantizers(model)
    if not found:
        return model
    for candidate in find_candidates(model):
        inside = next((path for path in found if path.startswith(f"{candidate.path}.")), None)
        if inside is not None and not _of_convolution(candidate.conv, found[inside]):
            raise ModelError(
                f"{inside} rounds inside the SRU {candidate.path}, whose statistics and gates must stay in float32.",
                f"Train again with {candidate.path}.qconfig = None before prepare_qat.",
            )
    return replace_modules(model, {id(module): FixedQuantizer(path, module) for path, module in found.items()})


def with_folded_norms(model: nn.Module) -> nn.Module:
    """A copy of a model with fixed quantisers whose fused layers are plain ones; the model itself without any."""
    if not fake_quantizers(model):
        return model
    layers = [m for m in model.modules() if hasattr(m, "weight_fake_quant")]
    return replace_modules(model, {id(layer): QuantizedLayer(layer) for layer in layers})


def levels_of(quantizer: nn.Module) -> Levels:
    """Levels of an activation's quantiser."""
    scale, zero, low, _ = _parts(quantizer)
    return Levels(float(scale), int(zero), low == _SIGNED[0])


class FixedQuantizer(StandIn):
    """A FakeQuantize module with the scale that it has; its operator is the original's.

    Raises:
        ModelError: see :func:`with_fixed_quantizers`.
    """

    def __init__(self, path: str, original: Any) -> None:
        super().__init__(original)
        _require_int8(path, original)
        scale, zero, low, high = _parts(original)
        self.register_buffer("_fixed_scale", scale.detach().clone().reshape(-1))
        self.register_buffer("_fixed_zero", zero.detach().clone().reshape(-1).to(torch.int32))
        vars(self).update(_fixed_range=(low, high), _fixed_axis=int(original.ch_axis) if scale.numel() > 1 else None)

    def forward(self, x: Tensor) -> Tensor:
        if self._fixed_axis is not None:
            scale, zero = self._fixed_scale, self._fixed_zero
            return torch.fake_quantize_per_channel_affine(x, scale, zero, self._fixed_axis, *self._fixed_range)
        scale, zero = vars(self)["_fixed_numbers"] if "_fixed_numbers" in vars(self) else self._numbers()
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, *self._fixed_range)

    def _numbers(self) -> tuple[float, int]:
        """Scale and zero point as numbers, read before anything is traced."""
        vars(self)["_fixed_numbers"] = float(self._fixed_scale), int(self._fixed_zero)
        numbers: tuple[float, int] = vars(self)["_fixed_numbers"]
        return numbers


class QuantizedLayer(StandIn):
    """A layer of quantisation-aware training, as a plain one of rounded weights; a BatchNorm becomes part of its bias.

    ``weight_scales`` are those of the output channels, or a single one.
    """

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self._forward_hooks = original._forward_hooks.copy()  # one of them rounds the output
        weight, bias, norm = original.weight.detach(), original.bias, getattr(original, "bn", None)
        bias = None if bias is None else bias.detach()
        if norm is not None:  # as torch.ao.nn.intrinsic.qat computes it
            factor = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
            weight = weight * factor.reshape([-1, *[1] * (weight.dim() - 1)])
            moved = -norm.running_mean if bias is None else bias - norm.running_mean
            bias = moved * factor + norm.bias.detach()
        self.register_buffer(SOURCE, weight)
        self.register_buffer("_layer_bias", bias)

    @property
    def weight_scales(self) -> Tensor:
        scales: Tensor = self.weight_fake_quant._fixed_scale
        return scales

    @property
    def source(self) -> Tensor:
        """The weights before they are rounded, with the BatchNorm's factor."""
        weight: Tensor = getattr(self, SOURCE)
        return weight

    @property
    def codes(self) -> Tensor:
        """The rounded weights in units of their scales, integers in float32."""
        scales = self.weight_scales.reshape(-1, *[1] * (self.source.dim() - 1))
        return torch.round(self.weight_fake_quant(self.source) / scales)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_fake_quant(self.source)
        if isinstance(self, nn.Linear):
            y = F.linear(x, weight, self._layer_bias)
        else:
            y = self._conv_forward(x, weight, self._layer_bias)
        return F.relu(y) if "ReLU" in type(self._original[0]).__name__ else y


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Layers with rounded weights by path."""
    for path, module in model.named_modules():
        if type(module) is QuantizedLayer:
            yield path, module


def _is_pt2e(graph: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Whether a node is an operator of converted quantisers, or a fake quantiser or observer of prepared ones."""
    if node.op == "call_function":
        return getattr(node.target, "namespace", "") in _PT2E_OPERATORS
    kind = type(graph.get_submodule(str(node.target))).__module__ if node.op == "call_module" else ""
    return kind.startswith(_PT2E_MODULES)


def _of_convolution(conv: nn.Module | None, quantizer: nn.Module) -> bool:
    return conv is not None and any(module is quantizer for module in conv.modules())


def _parts(quantizer: Any) -> tuple[Tensor, Tensor, int, int]:
    if isinstance(quantizer, FixedQuantizer):
        return quantizer._fixed_scale, quantizer._fixed_zero, *quantizer._fixed_range
    low, high = int(quantizer.activation_post_process.quant_min), int(quantizer.activation_post_process.quant_max)
    return quantizer.scale, quantizer.zero_point, low, high


def _require_int8(path: str, quantizer: Any) -> None:
    """Refuse a quantiser that is no QuantizeLinear of int8 (ModelError)."""
    if bool(quantizer.observer_enabled[0] == 1):
        raise ModelError(
            f"{path} still observes, so that every input would change its scale.",
            "Call model.apply(torch.ao.quantization.disable_observer) after training.",
        )
    if not bool(quantizer.fake_quant_enabled[0] == 1):
        raise ModelError(
            f"{path} is off, so that the model computes in float there.",
            "Call model.apply(torch.ao.quantization.enable_fake_quant), or take the float model.",
        )
    scale, zero, low, high = _parts(quantizer)
    if (low, high) not in (_SIGNED, _UNSIGNED):
        raise ModelError(
            f"{path} has the levels {low} to {high}, and int8 in ONNX has -128 to 127 or 0 to 255.",
            "Train with quant_min and quant_max of these, and reduce_range=False.",
        )
    if scale.numel() > 1 and bool(zero.any()):
        raise ModelError(f"{path} has zero points for channels, and TensorRT has none.", "Train it symmetric.")
