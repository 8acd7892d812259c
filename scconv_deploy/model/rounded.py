"""PyTorch in the arithmetic of a half file: every operator in float32, its result rounded once to half.

What the file keeps in float32 (:data:`scconv_deploy.precision.half.KEPT_OPERATORS`: means, norms, softmax, exp) is
rounded where an operator in half reads it; a BatchNorm behind a convolution is folded into its weights before they are
rounded; an SRU is one operator, its statistics and gates in float32. Constants (weights, numbers in the code) are
rounded as the file's are, but for those that half would lose.

There is no one place of rounding that every right file shares: an exporter writes gelu as five operators, a simplifier
merges two. So there are other right runs: the BatchNorms not folded, every rounding up or down at random (with the
probability that keeps the mean), which is as coarse as half of the operators being cut in two, and each node of an
activation rounded. In the last two a sigmoid is also moved as far as a runtime's is off: half holds small ones more
finely than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from scconv_deploy.gate.swap import SwappedSRU
from scconv_deploy.model.dispatch import tensors_in
from scconv_deploy.model.orders import (
    EXACT,
    SIGMOIDS,
    FollowsInputs,
    aten,
    base_name,
    by_formula,
    each_result,
    folded,
    is_view,
    moved_sigmoid,
    written_in_place,
)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_KEPT = frozenset({
    "softmax", "log_softmax", "sum", "mean", "var", "std", "var_mean", "linalg_vector_norm", "native_layer_norm",
    "native_group_norm", "native_batch_norm", "exp", "pow", "logsumexp", "cumsum",
})  # fmt: skip
"""Operators whose result stays in float32, see above."""
_WITH_NUMBERS = frozenset({
    "add", "sub", "mul", "div", "rsub", "add_", "sub_", "mul_", "div_",
})  # fmt: skip
_LOOKED_UP = frozenset({"embedding", "index", "index_select", "gather"})
_LOST = 4.0
"""Unit roundoffs: a constant that half represents worse than this stays in float32 in the file."""


class Rounded(FollowsInputs):
    """Mode that rounds every result that depends on the inputs.

    Args:
        tensors: the inputs, the floating ones rounded, and what is put into the run beside them.
        data: ``float16`` or ``bfloat16``.
        fold: BatchNorms behind a convolution are part of its weights.
        seed: of roundings at random; None rounds to the nearest.
        stepwise: an activation that is several nodes in ONNX is rounded after each of them.
    """

    def __init__(
        self, tensors: Iterable[Tensor], data: str, *,
        fold: bool = True, seed: int | None = None, stepwise: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(tensors)
        self._dtype, self._fold, self._stepwise = DTYPES[data], fold, stepwise
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        # float32 until it is read; of a convolution its arguments too, the weights as they are
        self._wide: dict[int, tuple[StorageWeakRef, Any]] = {}
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        name = base_name(func)
        first = args[0] if args else None
        if name in _LOOKED_UP and isinstance(first, Tensor) and first.is_floating_point() and not self.follows(first):
            # in a weight: the data begin here
            out = self.nearest(func(*args, **(kwargs or {})))
            self._follow(out)
            return out
        return super().__torch_dispatch__(func, types, args, kwargs)

    def computed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if is_view(func):
            return func(*args, **kwargs)
        name = base_name(func)
        found = by_formula(self, func, args, kwargs) if self._stepwise else None
        if found is not None:
            self._narrow_in_place(func, args)
            return found
        if name == "native_batch_norm" and (out := self._batch_norm(args)) is not None:
            return out
        kept, given = name in _KEPT, args
        if not kept:
            self._narrow_in_place(func, args)
            args, kwargs = pytree.tree_map(self._as_read, (tuple(args), dict(kwargs)))
            if name in _WITH_NUMBERS:
                args = [self._number(a) if isinstance(a, float) else a for a in args]
        out = func(*args, **kwargs)
        if name in EXACT and not kept:
            if name == "to_copy" and isinstance(args[0], Tensor) and not args[0].is_floating_point():
                self._note_wide(out, None)  # half does not hold every integer
            return out
        if kept or (name == "convolution" and self._fold):
            for tensor in tensors_in(out):
                self._note_wide(tensor, None if kept else (args[0], *given[1:3], *args[3:]))
            return out
        return each_result(func, out, self._rounded_sigmoid if name in SIGMOIDS else self.rounded)

    # --- rounding ----------------------------------------------------------------------------------------------------

    def nearest(self, tensor: Tensor) -> Tensor:
        """A float32 tensor with the values of the half type; others as they are."""
        return tensor.to(self._dtype).float() if tensor.dtype == torch.float32 else tensor

    def rounded(self, tensor: Tensor) -> Tensor:
        """A float32 tensor rounded to half, up or down at random where the run asks for it."""
        if self._generator is None or tensor.dtype != torch.float32:
            return self.nearest(tensor)
        _, exponent = torch.frexp(tensor)
        smallest = {torch.float16: -24, torch.bfloat16: -133}[self._dtype]
        digits = {torch.float16: 11, torch.bfloat16: 8}[self._dtype]
        place = torch.exp2((exponent - digits).clamp(min=smallest).float())
        dither = (torch.rand(tensor.shape, generator=self._generator) - 0.5) * place
        exact = self.nearest(tensor) == tensor  # stays, as in every right run: a zero, a copy
        return self.nearest(torch.where(torch.isfinite(tensor) & ~exact, tensor + dither, tensor))

    def _rounded_sigmoid(self, tensor: Tensor) -> Tensor:
        if (self._generator is not None or self._stepwise) and tensor.dtype == torch.float32:
            tensor = moved_sigmoid(tensor, self._generator or torch.Generator().manual_seed(0))
        return self.rounded(tensor)

    def constant(self, tensor: Tensor) -> Tensor:
        """A constant as the half file stores it."""
        near = self.nearest(tensor)
        finite = torch.isfinite(tensor)
        error, norm = (near - tensor)[finite].norm(), tensor[finite].norm()
        unit = torch.finfo(self._dtype).eps / 2
        return near if bool(error <= _LOST * unit * norm) else tensor

    def _number(self, value: float) -> float:
        return float(self.constant(torch.tensor(value)))

    # --- what stays float32 until it is read -------------------------------------------------------------------------

    def _note_wide(self, tensor: Tensor, convolution: Any) -> None:
        if tensor.dtype != torch.float32:
            return
        reference = StorageWeakRef(tensor.untyped_storage())
        self._wide = {key: value for key, value in self._wide.items() if not value[0].expired()}
        self._wide[reference.cdata] = reference, convolution

    def _is_wide(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._wide

    def _as_read(self, leaf: Any) -> Any:
        """An argument of an operator in half."""
        if not isinstance(leaf, Tensor) or leaf.dtype != torch.float32:
            return leaf
        if not self.follows(leaf):
            return self.constant(leaf)
        return self.rounded(leaf) if self._is_wide(leaf) else leaf

    def _narrow_in_place(self, func: Any, args: Sequence[Any]) -> None:
        if written_in_place(func) and isinstance(args[0], Tensor) and self._is_wide(args[0]):
            args[0].copy_(self.rounded(args[0]))
            del self._wide[args[0].untyped_storage()._cdata]

    def _batch_norm(self, args: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor] | None:
        """A BatchNorm folded into the convolution before it; None without one, or if the statistics are the batch's."""
        y, weight, bias, mean, var, training, _, eps = args
        if training or mean is None or var is None:
            return None
        scale, shift = folded(weight, bias, mean, var, eps)
        each = (-1, *([1] * (y.dim() - 2)))
        convolution = self._wide.get(y.untyped_storage()._cdata, (None, None))[1]
        if convolution is None or convolution[6]:  # a transposed one has its channels elsewhere
            out = self._as_read(y) * scale.reshape(each) + shift.reshape(each)
        else:
            x, w, b, *rest = convolution
            w = self.nearest(w * scale.reshape(-1, *([1] * (w.dim() - 1))))
            b = self.nearest(shift if b is None else shift + scale * b)
            out = aten.convolution(x, w, b, *rest)
        out = self.rounded(out)
        self._follow(out)
        empty = y.new_empty(0)
        return out, empty, empty

    # --- SRUs --------------------------------------------------------------------------------------------------------

    @contextmanager
    def whole_srus(self, swapped: nn.Module) -> Iterator[None]:
        """Run with each SRU as one operator, whose data are rounded at its input and output alone."""
        modules = [m for m in swapped.modules() if isinstance(m, SwappedSRU)]

        def whole(module: SwappedSRU) -> Any:
            inside = type(module)._gated

            def gated(x: Tensor) -> Tensor:
                self._paused = True
                try:
                    y = self.rounded(inside(module, self.rounded(x) if self._is_wide(x) else x))
                finally:
                    self._paused = False
                self._follow(y)
                return y

            return gated

        with ExitStack() as stack:
            for module in modules:
                object.__setattr__(module, "_gated", whole(module))
                stack.callback(object.__delattr__, module, "_gated")
            yield
