"""Random numbers of a new module, followed from where they are drawn into its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from scconv_deploy.model.dispatch import EagerMode, tensors_in

_OVERWRITES = frozenset({"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"})
"""In-place operators whose result does not depend on what the tensor held."""
_MAKES_NEW = ("new_", "empty", "zeros", "ones", "full")
"""Prefixes of operators that read only a tensor's shape and type: ``zeros_like``, ``new_empty``."""


@dataclass(frozen=True)
class RandomParameters:
    """Untrained parameters of a model: those that hold numbers drawn while it was built.

    Attributes:
        random: numbers in parameters that were drawn, or computed from what was drawn.
        parameters: numbers in all parameters.
        names: the parameters and buffers that hold such numbers.
        seed: that they were drawn with; the factory's own if it sets one.
    """

    random: int
    parameters: int
    names: tuple[str, ...]
    seed: int

    def __str__(self) -> str:
        return f"random initialisation (seed {self.seed}): {self.random:,} of {self.parameters:,} parameters"


class Draws(EagerMode):
    """Follows random numbers from operator to operator while it is active.

    An operator of torch that draws marks its result, arithmetic passes the marks on, and a tensor that is overwritten
    (``load_state_dict`` copies) loses them, number by number. So the weights that a factory draws are told from those
    that it loads, whatever seeds or generators it uses. What NumPy draws is not seen. After a backward pass, which may
    have trained the model, and after what cannot be followed, nothing is called random.
    """

    supports_higher_order_operators = True  # they are run as they are

    def __init__(self) -> None:
        super().__init__()
        # Address of a storage -> the storage, held weakly so that no other can take its address, and a mask of its
        # numbers; None for all of them.
        self._marks: dict[int, tuple[StorageWeakRef, Tensor | None]] = {}
        self._lost = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, and pass the marks of its inputs on to its results."""
        result = func(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.OpOverload) and not torch._C._is_tracing():
            self._lost |= torch._C._current_graph_task_id() != -1  # a backward pass
            try:
                self._follow(func, args, kwargs or {}, result)
            except (RuntimeError, NotImplementedError):  # tensors of a kind that has no storage to look at
                self._lost = True
        return result

    def of(self, model: nn.Module) -> RandomParameters:
        """The random share of a model's parameters and buffers now."""
        held = {} if self._lost else dict(model.named_parameters())
        random = {name: count for name, p in held.items() if (count := self._count(p))}
        buffers = () if self._lost else (name for name, buffer in model.named_buffers() if self._count(buffer))
        total = sum(p.numel() for p in model.parameters() if not isinstance(p, nn.UninitializedParameter))
        return RandomParameters(sum(random.values()), total, (*random, *buffers), torch.initial_seed())

    def _follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        name = func._overloadpacket.__name__
        if name == "set_":  # the tensor becomes a view of another storage, which keeps its marks
            return
        read, written = [], []
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            tensors = list(tensors_in(value))
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes:
                written += tensors
            if not writes or not (name in _OVERWRITES or argument.kwarg_only):  # keyword only: out=
                read += tensors
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if not drawn and not name.startswith(_MAKES_NEW):
            drawn = any(self._count(tensor) for tensor in read)
        new = [v for r, v in zip(func._schema.returns, _results(func, result), strict=False) if r.alias_info is None]
        for tensor in (*written, *(tensors_in(new) if drawn else ())):
            self._mark(tensor, drawn)

    def _mark(self, tensor: Tensor, drawn: bool) -> None:
        if not _has_storage(tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() // tensor.element_size()
        if tensor.numel() == size:
            self._marks.pop(key, None)
            if drawn:
                self._marks[key] = StorageWeakRef(storage), None
            return
        held = self._marks.get(key)
        if held is None and not drawn:
            return
        mask = None if held is None else held[1]
        if mask is None or mask.numel() != size:
            mask = torch.full((size,), held is not None)
        mask.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).fill_(drawn)
        self._marks.pop(key, None)
        if mask.any():
            self._marks[key] = StorageWeakRef(storage), mask

    def _count(self, tensor: Tensor) -> int:
        """Number of random entries of a tensor."""
        if not _has_storage(tensor):
            return 0
        storage = tensor.untyped_storage()
        held = self._marks.get(storage._cdata)
        if held is None:
            return 0
        mask = held[1]
        if mask is None or mask.numel() != storage.nbytes() // tensor.element_size():
            return tensor.numel()
        return int(mask.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).sum())


def _results(func: Any, result: Any) -> tuple[Any, ...]:
    return tuple(result) if len(func._schema.returns) > 1 and isinstance(result, (list, tuple)) else (result,)


def _has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has numbers of its own; subclasses, such as those of tracing, are not looked at."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.layout == torch.strided and not tensor.is_meta and tensor.numel() > 0
