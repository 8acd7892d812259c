"""Float32 runs of PyTorch that are as right as the usual one: other orders of summation, other last places.

Two dispatch modes change what every operator computes, within what rounding allows:

* :class:`OtherOrder` adds up in another order: the reduced axis in a seeded permutation, cut into parts that are added
  one after the other, as runtimes do that keep one accumulator (its error grows with the root of the number of parts);
  normalisations by the formula that a folded graph has;
* :class:`LastPlace` moves every result by up to a unit in the last place, as other fusions and other approximations of
  exp, sqrt and division do.

Only what depends on the inputs is touched: what a model computes of its parameters and shapes alone (a grid, a gate's
weight) is a constant, the same in every runtime. What is exact in any order (a maximum, a copy, a choice) stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from scconv_deploy.model.activations import FORMULAS
from scconv_deploy.model.dispatch import EagerMode, tensors_in

aten = torch.ops.aten

_TERMS_IN_TURN = 128
"""Parts of a sum that are added one after the other. Runtimes keep 16 accumulators or more at once, so this is as
coarse as they are up to sums of 2,000 terms."""
_PRODUCTS_IN_TURN = 8
"""The same for a convolution or matrix product, whose parts are a call each; runtimes add up blocks of 16 or more
channels before the next one."""

LAST_PLACE = 2.0**-23
SIGMOIDS = frozenset({"sigmoid", "sigmoid_"})
SIGMOID_PLACE = 0.5
"""A smaller sigmoid is moved by units in the last place of this: ONNX Runtime's is a fraction added to 0.5, and off by
3e-8 at every argument (rms, measured), which is a thousandth of sigmoid(-10)."""


EXACT = frozenset({
    "abs", "amax", "amin", "argmax", "argmin", "argsort", "arange", "bernoulli_", "bitwise_and", "bitwise_not",
    "bitwise_or", "cat", "ceil", "clamp", "clamp_max", "clamp_min", "clone", "col2im", "constant_pad_nd",
    "contiguous", "copy_", "copysign", "cummax", "cummin", "detach", "diag_embed", "embedding", "empty", "empty_like",
    "empty_strided", "eq", "expand", "eye", "fill", "fill_", "flip", "floor", "frac", "full", "full_like", "gather",
    "ge", "gt", "hardtanh", "im2col", "index", "index_copy", "index_fill", "index_put", "index_put_", "index_select",
    "isfinite", "isinf", "isnan", "kthvalue", "le", "leaky_relu", "lift_fresh_copy", "logical_and", "logical_not",
    "logical_or", "lt", "masked_fill", "masked_fill_", "masked_scatter", "max", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "maximum", "median", "min", "minimum", "mode", "ne", "neg", "new_empty", "new_full",
    "new_ones", "new_zeros", "nonzero", "ones", "ones_like", "permute", "pixel_shuffle", "pixel_unshuffle", "relu",
    "relu_", "repeat", "replication_pad1d", "replication_pad2d", "replication_pad3d", "reflection_pad1d",
    "reflection_pad2d", "reflection_pad3d", "roll", "round", "scalar_tensor", "scatter", "select_scatter", "sgn",
    "sign", "slice_scatter", "sort", "split", "stack", "threshold", "to_copy", "topk", "tril", "triu", "trunc",
    "unbind", "unfold", "unique", "unsqueeze", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "view", "where", "zero_", "zeros", "zeros_like", "adaptive_max_pool2d", "adaptive_max_pool3d", "channel_shuffle",
    "local_scalar_dense", "scatter_reduce", "unsafe_view", "reshape_alias",
})  # fmt: skip
"""Operators whose result is one of their inputs, or exact, in any order."""


def base_name(func: Any) -> str:
    """``aten.add_.Tensor`` -> ``add_``; ``aten._to_copy.default`` -> ``to_copy``."""
    return func._schema.name.split("::")[1].lstrip("_")


class FollowsInputs(EagerMode):
    """Mode that marks the tensors of a run that depend on its inputs.

    Args:
        tensors: the inputs.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._known: dict[int, StorageWeakRef] = {}
        for tensor in tensors:
            self._follow(tensor)

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:  # a weak reference keeps the address from being given to another one
            self._known[storage._cdata] = StorageWeakRef(storage)

    def follows(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the inputs, or shares its memory with one that does."""
        return tensor.untyped_storage()._cdata in self._known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(map(self.follows, tensors_in(*args, *kwargs.values()))):
            return func(*args, **kwargs)
        out = self.computed(func, args, kwargs)
        for tensor in tensors_in(out):
            self._follow(tensor)
        return out

    def computed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of an operator that depends on the inputs."""
        raise NotImplementedError


def is_view(func: Any) -> bool:
    """Whether the operator's result is a view of its input."""
    returns = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def written_in_place(func: Any) -> bool:
    """Whether the operator writes into one of its arguments."""
    return any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns)


def each_result(func: Any, out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the floating results of an operator, in place where it works in place."""
    in_place = written_in_place(func)

    def changed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        new = change(leaf)
        return leaf.copy_(new) if in_place else new

    return changed(out) if isinstance(out, Tensor) else pytree.tree_map(changed, out)


def by_formula(mode: FollowsInputs, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of an activation that is several nodes in ONNX, each of them under the mode; None for any other."""
    formula = FORMULAS.get(base_name(func).rstrip("_"))
    if formula is None or "out" in kwargs:
        return None
    with mode:
        found = formula(*args, **kwargs)
    return args[0].copy_(found) if written_in_place(func) else found


class LastPlace(FollowsInputs):
    """Every result of float arithmetic moved by up to ``units`` in its last place, at random."""

    def __init__(self, tensors: Iterable[Tensor], seed: int, units: float = 1.0) -> None:
        super().__init__(tensors)
        self._generator = torch.Generator().manual_seed(seed)
        self._relative = units * LAST_PLACE

    def computed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        found = by_formula(self, func, args, kwargs)
        if found is not None:
            return found
        out = func(*args, **kwargs)
        if is_view(func) or base_name(func) in EXACT:
            return out
        return each_result(func, out, self._sigmoid if base_name(func) in SIGMOIDS else self._moved)

    def _moved(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        moved = torch.addcmul(tensor, tensor, self._noise(tensor))
        if torch.isfinite(moved.sum()):  # one pass; a look at each number takes as long as all the rest
            return moved
        return torch.where(torch.isfinite(tensor), moved, tensor)

    def _sigmoid(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        return moved_sigmoid(tensor, self._generator, self._relative)

    def _noise(self, tensor: Tensor) -> Tensor:
        return _noise(tensor, self._generator, self._relative)


def moved_sigmoid(tensor: Tensor, generator: torch.Generator, relative: float = LAST_PLACE) -> Tensor:
    """A sigmoid moved as far as a runtime's may be off, see :data:`SIGMOID_PLACE`."""
    return tensor + tensor.clamp(min=SIGMOID_PLACE) * _noise(tensor, generator, relative)


def _noise(tensor: Tensor, generator: torch.Generator, relative: float) -> Tensor:
    return torch.rand(tensor.shape, generator=generator).sub_(0.5).mul_(2 * relative)


class OtherOrder(FollowsInputs):
    """Sums in another order, one part after the other."""

    def __init__(self, tensors: Iterable[Tensor], seed: int) -> None:
        super().__init__(tensors)
        self._generator = torch.Generator().manual_seed(seed)

    def computed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        other = _OTHERS.get(func)
        first = next((a for a in args if isinstance(a, Tensor)), None)
        if other is None or first is None or first.dtype != torch.float32:
            return func(*args, **kwargs)
        out = other(self, *args, **kwargs)
        return func(*args, **kwargs) if out is None else out

    # --- sums --------------------------------------------------------------------------------------------------------

    def order(self, length: int) -> Tensor:
        """A permutation."""
        return torch.randperm(length, generator=self._generator)

    def total(self, x: Tensor, dims: Sequence[int]) -> Tensor:
        """The sum over axes, which stay with length 1."""
        dims = sorted(d % x.dim() for d in dims) if dims else list(range(x.dim()))
        kept = [d for d in range(x.dim()) if d not in dims]
        terms = x.permute(*dims, *kept).reshape(-1, *(x.shape[d] for d in kept))
        terms = terms[self.order(len(terms))]
        parts = min(len(terms), _TERMS_IN_TURN)
        even = len(terms) - len(terms) % parts
        heads = terms[:even].reshape(parts, -1, *terms.shape[1:])
        added = _one_after_the_other((heads.sum(1) if even > parts else heads[:, 0]).unbind())
        added = added if even == len(terms) else added + terms[even:].sum(0)
        return added.reshape([1 if d in dims else size for d, size in enumerate(x.shape)])

    def moments(self, x: Tensor, dims: Sequence[int], correction: float = 0) -> tuple[Tensor, Tensor]:
        """Mean and variance over axes, which stay with length 1."""
        count = _count(x, dims)
        mean = self.total(x, dims) / count
        return mean, self.total((x - mean).square(), dims) / max(count - correction, 0)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b``, ``[..., M, K]`` and ``[..., K, N]``."""
        if not a.shape[-1]:
            return torch.matmul(a, b)
        order = self.order(a.shape[-1])
        a, b = a[..., order], b[..., order, :]
        parts = zip(_cut(a, -1), _cut(b, -2), strict=True)
        return _one_after_the_other(torch.matmul(left, right) for left, right in parts)


def _one_after_the_other(terms: Iterable[Tensor]) -> Tensor:
    iterator = iter(terms)
    added = next(iterator)
    for term in iterator:
        added = added + term
    return added


def _cut(tensor: Tensor, axis: int) -> Sequence[Tensor]:
    return tensor.tensor_split(min(tensor.shape[axis], _PRODUCTS_IN_TURN), axis)


def _count(x: Tensor, dims: Sequence[int] | None) -> int:
    count = 1
    for d in dims or range(x.dim()):
        count *= x.shape[d]
    return count


def _squeezed(y: Tensor, x: Tensor, dims: Sequence[int] | None, keepdim: bool) -> Tensor:
    if keepdim:
        return y
    return y.reshape([size for d, size in enumerate(x.shape) if d not in {k % x.dim() for k in dims or range(x.dim())}])


def _sum(mode: OtherOrder, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    if dtype not in (None, x.dtype) or not x.numel() or not x.dim():
        return None
    return _squeezed(mode.total(x, dims or []), x, dims, keepdim)


def _mean(mode: OtherOrder, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    found = _sum(mode, x, dims, keepdim, dtype=dtype)
    return None if found is None else found / _count(x, dims)


def _var(
    mode: OtherOrder, x: Tensor, dims: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor | None:
    if not x.numel() or not x.dim():
        return None
    _, found = mode.moments(x, dims or [], 1 if correction is None else correction)
    return _squeezed(found, x, dims, keepdim)


def _std(mode: OtherOrder, x: Tensor, dims: Any = None, **options: Any) -> Tensor | None:
    found = _var(mode, x, dims, **options)
    return None if found is None else found.sqrt()


def _mm(mode: OtherOrder, a: Tensor, b: Tensor) -> Tensor:
    return mode.product(a, b)


def _addmm(mode: OtherOrder, c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * c + alpha * mode.product(a, b)


def _convolution(
    mode: OtherOrder, x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Tensor | None:  # fmt: skip
    if x.dim() != w.dim() or x.shape[0] == 0:
        return None
    order, rest = mode.order(x.shape[1] // groups), (stride, padding, dilation, transposed, output_padding, groups)
    # channels of a group in another order, and then cut: [N, groups, channels of one, *]
    grouped = x.reshape(x.shape[0], groups, -1, *x.shape[2:])[:, :, order]
    if transposed:  # its weights are [in, out of a group, *]
        kernels = w.reshape(groups, -1, *w.shape[1:])[:, order]
        cut = [k.reshape(-1, *w.shape[1:]) for k in _cut(kernels, 1)]
    else:
        cut = list(_cut(w[:, order], 1))
    y = _one_after_the_other(
        aten.convolution(part.reshape(x.shape[0], -1, *x.shape[2:]), kernel, None, *rest)
        for part, kernel in zip(_cut(grouped, 2), cut, strict=True)
    )
    return y if bias is None else y + bias.reshape(1, -1, *([1] * (x.dim() - 2)))


def _batch_norm(
    mode: OtherOrder, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    if training or mean is None or var is None:
        return None
    scale, shift = folded(weight, bias, mean, var, eps)
    shape = (1, -1, *([1] * (x.dim() - 2)))
    empty = x.new_empty(0)
    return x * scale.reshape(shape) + shift.reshape(shape), empty, empty


def _batch_norm_no_training(mode: OtherOrder, x: Tensor, w: Any, b: Any, mean: Any, var: Any, _: float, eps: float):
    return _batch_norm(mode, x, w, b, mean, var, False, 0.0, eps)


def folded(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A BatchNorm as scale and shift of each channel."""
    scale = (var + eps).rsqrt() if weight is None else weight / (var + eps).sqrt()
    return scale, -mean * scale if bias is None else bias - mean * scale


def _layer_norm(
    mode: OtherOrder, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    if not x.numel():
        return None
    mean, var = mode.moments(x, range(x.dim() - len(shape), x.dim()))
    y = (x - mean) / (var + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, (var + eps).rsqrt()


def _group_norm(
    mode: OtherOrder, x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hw: int, groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    if not x.numel():
        return None
    by_group = x.reshape(n, groups, -1)
    mean, var = mode.moments(by_group, [2])
    y = ((by_group - mean) / (var + eps).sqrt()).reshape(x.shape)
    shape = (1, -1, *([1] * (x.dim() - 2)))
    y = y if weight is None else y * weight.reshape(shape)
    y = y if bias is None else y + bias.reshape(shape)
    return y, mean.reshape(n, groups), (var + eps).rsqrt().reshape(n, groups)


def _softmax(mode: OtherOrder, x: Tensor, dim: int, half_to_float: bool) -> Tensor | None:
    if half_to_float or not x.numel() or not x.dim():
        return None
    e = (x - x.amax(dim, keepdim=True)).exp()
    return e / mode.total(e, [dim])


def _log_softmax(mode: OtherOrder, x: Tensor, dim: int, half_to_float: bool) -> Tensor | None:
    if half_to_float or not x.numel() or not x.dim():
        return None
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - mode.total(shifted.exp(), [dim]).log()


_OTHERS: dict[Any, Callable[..., Any]] = {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.var.correction: _var,
    aten.std.correction: _std,
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.convolution.default: _convolution,
    aten.native_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm_no_training,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
}
