"""PyTorch with fake quantisation: the user's module, whose quantised layers and skips round to int8 levels.

The operators are PyTorch's own, ``torch.fake_quantize_per_tensor_affine`` for activations and
``torch.fake_quantize_per_channel_affine`` for weights, and nothing is taken from the ONNX side but a plan: which
modules, and the scales. Weights are the module's, with its BatchNorm folded in float32 where the plan says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.recognize import Recognition
from scconv_deploy.gate.swap import StandIn, replace_modules
from scconv_deploy.model.orders import FollowsInputs, aten
from scconv_deploy.model.prepare import Reference
from scconv_deploy.model.rounded import DTYPES
from scconv_deploy.model.steps import Scope, module_scope
from scconv_deploy.records.quantization import LARGEST_CODE, LayerPlan, Levels, QuantizationPlan, SkipPlan

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_LAYERS = (*_CONVOLUTIONS, nn.Linear)
_ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
_WEIGHT_CODES = (-128, 127)


@dataclass(frozen=True, eq=False)
class QuantizedWeights:
    """Weights of a module as PyTorch quantises them.

    Attributes:
        weight: the module's own, with a BatchNorm folded in and rounded to the plan's type, float32 ``[C, ...]``.
        scales: by the rule of the largest magnitude, float32 ``[C]``.
        codes: with the plan's scales, float32 integers.
    """

    weight: Tensor
    scales: Tensor
    codes: Tensor


def fake_quantized(reference: Reference, plan: QuantizationPlan) -> Reference:
    """The reference with fake quantisation in both of its models; the given reference is not changed.

    Raises:
        ModelError: the model has no module of a path, or one that is no Conv and no Linear.
    """
    given = _quantized_model(reference.model, plan)
    swapped = _quantized_model(reference.swapped, plan)
    modules = dict(given.named_modules(remove_duplicate=False))
    srus = tuple(replace(found, module=modules[found.path]) for found in reference.recognition.srus)
    recognition = Recognition(srus, reference.recognition.refused)
    return replace(reference, model=given, swapped=swapped, recognition=recognition)


def quantized_weights(model: nn.Module, plan: QuantizationPlan) -> dict[str, QuantizedWeights]:
    """Weights of the quantised layers of a float model, by path (ModelError as for :func:`fake_quantized`)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for layer in plan.layers:
        weight = _rounded(_folded(_layer_of(modules, layer), _norm_of(modules, layer))[0], layer)
        scales = torch.tensor(layer.scales)
        quantized = _fake_quantized_weight(weight, scales)
        each = scales.reshape(-1, *[1] * (weight.dim() - 1))
        own = _rounded(_scales_of(weight, layer.largest_code), layer)
        own = torch.where(own == 0, torch.ones_like(own), own)  # a type may round one to 0: such a channel is of zeros
        found[layer.path] = QuantizedWeights(weight, own, torch.round(quantized / each))
    return found


def unprovable(model: nn.Module, path: str, norm: str, weight: np.ndarray) -> str:
    """Why a layer of a float file cannot be fake-quantised in PyTorch; "" if it can.

    Args:
        path, norm: paths of the layer's module and of the module that gives its output, "" if that is the same.
        weight: the layer's weights in the file, ``[C, ...]``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    module: Any = modules.get(path)
    if module is None:
        return f"PyTorch has no module {path}"
    if problem := other_kind(model, path):
        return problem
    data: Any = weight.dtype.name
    layer = LayerPlan(path, (), (), norm, data if data in DTYPES else "float32")
    own = _rounded(_folded(module, _norm_of(modules, layer))[0], layer)
    stored = torch.from_numpy(weight.astype(np.float32))
    if stored.numel() != own.numel() or len(stored) != len(own):
        return f"its weights are {list(stored.shape)}, those of {path} in PyTorch {list(own.shape)}"
    if not torch.equal(_scales_of(stored, LARGEST_CODE), _scales_of(own, LARGEST_CODE)):
        return f"its weights are not those of {path} in PyTorch, bit for bit"
    return ""


def other_kind(model: nn.Module, path: str) -> str:
    """Why a module is no layer that can be fake-quantised; "" if it is one, or the model has no such module."""
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    if module is None:
        return ""
    kind = next((kind for kind in _LAYERS if isinstance(module, kind)), None)
    name = f"{path} is a {type(module).__name__} in PyTorch"
    if kind is None:
        return f"{name}, no Conv and no Linear"
    if any(getattr(type(module), f, None) is not getattr(kind, f, None) for f in ("forward", "_conv_forward")):
        return f"{name}, which computes more than its base class"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} with hooks, which a module in its place would not call"
    return ""


def _quantized_model(model: nn.Module, plan: QuantizationPlan) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    replacements: dict[int, nn.Module] = {}
    for layer in plan.layers:
        module, norm = _layer_of(modules, layer), _norm_of(modules, layer)
        replacements[id(module)] = _Layer(module, layer, norm)
        if norm is not None:
            replacements[id(norm)] = _Passing(norm)
    return _counting(replace_modules(model, replacements), plan.skips)


def _layer_of(modules: Mapping[str, nn.Module], layer: LayerPlan) -> Any:
    """The Conv or Linear of a plan."""
    module = modules.get(layer.path)
    if module is None:
        raise ModelError(
            f"The model has no module {layer.path}, which the file quantises.", "Give the model that it came from."
        )
    if not isinstance(module, _LAYERS):
        raise ModelError(
            f"{layer.path} is a {type(module).__name__}, and the file quantises a Conv or Gemm.",
            "Give the model that it came from.",
        )
    return module


def _norm_of(modules: Mapping[str, nn.Module], layer: LayerPlan) -> Any:
    """The BatchNorm folded into a layer; None if the module of that path is none."""
    norm = modules.get(layer.norm) if layer.norm else None
    return norm if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None


def _folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer with a BatchNorm folded in, in float32 as a simplifier computes them."""
    weight, bias = layer.weight.detach(), layer.bias
    bias = None if bias is None else bias.detach()
    if norm is None:
        return weight, bias
    mean, variance = norm.running_mean, norm.running_var
    # the root in double and rounded once is float32's correctly rounded root; torch's vectorised one is an ulp off
    deviation = (variance + norm.eps).double().sqrt().float()
    factor = 1 / deviation if norm.weight is None else norm.weight.detach() / deviation
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach()
    moved = (0 if bias is None else bias) - mean
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1)), moved * factor + shift


def _rounded(tensor: Tensor, plan: LayerPlan) -> Tensor:
    """A tensor with the values of the plan's type, in float32."""
    return tensor if plan.data == "float32" else tensor.to(DTYPES[plan.data]).float()


def _scales_of(weight: Tensor, largest_code: int) -> Tensor:
    """Scale of each output channel: the largest magnitude over the largest code; 1 for a channel of zeros."""
    scales = weight.abs().reshape(len(weight), -1).amax(1) / largest_code
    return torch.where(scales < torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)


def _fake_quantized_weight(weight: Tensor, scales: Tensor) -> Tensor:
    if len(scales) == 1 and len(weight) > 1:
        return torch.fake_quantize_per_tensor_affine(weight, float(scales), 0, *_WEIGHT_CODES)
    if len(scales) != len(weight):
        raise ModelError(
            f"The file has {len(scales)} scales for {len(weight)} output channels.", "Give the model that it came from."
        )
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, *_WEIGHT_CODES)


def fake_quantize(x: Tensor, levels: Levels) -> Tensor:
    """Round a tensor to its levels."""
    return torch.fake_quantize_per_tensor_affine(x, levels.scale, levels.zero_point, levels.low, levels.high)


class _Layer(StandIn):
    """A Conv or Linear that fake-quantises its input, with fake-quantised weights."""

    def __init__(self, original: nn.Module, plan: LayerPlan, norm: nn.Module | None) -> None:
        super().__init__(original)
        vars(self).update(_fake_plan=plan, _fake_calls=[0])
        weight, bias = _folded(original, norm)
        quantized = _fake_quantized_weight(_rounded(weight, plan), torch.tensor(plan.scales))
        self.register_buffer("_fake_weight", _rounded(quantized, plan))
        self.register_buffer("_fake_bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        plan, calls = self._fake_plan, self._fake_calls
        levels = plan.inputs[calls[0]] if calls[0] < len(plan.inputs) else None
        calls[0] += 1
        weight, bias = self._fake_weight, self._fake_bias
        padded = isinstance(self, _CONVOLUTIONS) and self.padding_mode != "zeros"
        if padded:  # an operator of its own in ONNX, whose result is quantised
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        if levels is not None:
            x = fake_quantize(x, levels)
        if padded:
            convolution = _FUNCTIONS[weight.dim() - 3]
            return convolution(x, weight, bias, self.stride, 0, self.dilation, self.groups)
        if isinstance(self, _CONVOLUTIONS):
            return self._conv_forward(x, weight, bias)
        return F.linear(x, weight, bias)


class _Passing(StandIn):
    """A BatchNorm that is folded into the layer before it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Counting:
    """Base of the copied model's class: calls of layers are counted from 0 in every run, and skips are quantised."""

    _fake_skips: tuple[SkipPlan, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, _Layer):
                module._fake_calls[0] = 0
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with _skips_quantized(self, tensors, self._fake_skips):  # type: ignore[arg-type]
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


def _counting(model: nn.Module, skips: Sequence[SkipPlan]) -> nn.Module:
    """Give a copied model a subclass of its class, which can all that the class can."""
    vars(model).update(_fake_skips=tuple(skips))
    model.__class__ = type(type(model).__name__, (_Counting, type(model)), {"__module__": type(model).__module__})
    return model


@contextmanager
def _skips_quantized(model: nn.Module, tensors: Sequence[Tensor], skips: Sequence[SkipPlan]) -> Iterator[None]:
    if not skips:
        yield
        return
    with module_scope(model) as scope:
        mode = _Skips(tensors, scope, skips)
        with mode:
            yield
        if mode.left:
            path, number = next(iter(mode.left))
            raise ModelError(
                f"{path or 'The model'} makes no addition number {number}, whose operand the file quantises.",
                "Give the model that the file came from.",
            )


class _Skips(FollowsInputs):
    """Mode that fake-quantises an operand of chosen additions.

    Attributes:
        left: (path, number) of additions that have not come yet.
    """

    def __init__(self, tensors: Sequence[Tensor], scope: Scope, skips: Sequence[SkipPlan]) -> None:
        super().__init__(tensors)
        self._scope = scope
        self._numbers: dict[str, int] = {}
        self.left = {(skip.path, skip.addition): skip for skip in skips}

    def computed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func not in _ADDITIONS or not all(self._is_data(a) for a in args[:2]):
            return func(*args, **kwargs)
        path = self._scope.paths[-1] if self._scope.paths else ""
        number = self._numbers[path] = self._numbers.get(path, 0) + 1
        skip = self.left.pop((path, number), None)
        if skip is None:
            return func(*args, **kwargs)
        operands, kwargs = list(args), dict(kwargs)
        if (alpha := kwargs.pop("alpha", 1)) != 1:  # an exporter multiplies before it quantises
            operands[1] = operands[1] * alpha
        rounded = fake_quantize(operands[skip.operand], skip.levels)
        if func is aten.add_.Tensor and skip.operand == 0:
            operands[0].copy_(rounded)
        else:
            operands[skip.operand] = rounded
        return func(*operands, **kwargs)

    def _is_data(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and self.follows(value)
