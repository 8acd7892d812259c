"""How a model is called and what it returns: names for tensors, in ONNX's order, and back to Python's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.spec import DynamicAxis, InputSpec


@dataclass(frozen=True, eq=False)
class Signature:
    """The inputs of one model: example arguments, the names of their tensors, and which axes are open.

    Attributes:
        args, kwargs: example arguments as the model takes them.
        names: of the tensors among them, in flattened order; these are the ONNX inputs.
        dynamic: open axes.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    dynamic: tuple[DynamicAxis, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The example tensors by name."""
        leaves = [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        return dict(zip(self.names, leaves, strict=True))

    def call(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on tensors given by name.

        Returns:
            Its output tensors by name, see :func:`named_outputs`.

        Raises:
            ModelError: the model refuses the inputs.
        """
        values = iter([tensors[name] for name in self.names])
        args, kwargs = pytree.tree_map(
            lambda leaf: next(values) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        with torch.no_grad():
            return named_outputs(model(*args, **kwargs))

    def dynamic_shapes(self, model: nn.Module, dims: Mapping[str, Any]) -> dict[str, Any] | None:
        """torch.export's ``dynamic_shapes``: per forward parameter, ``{axis: dim}`` for every tensor.

        Args:
            dims: one ``torch.export.Dim`` per symbol of :attr:`dynamic`.
        """
        if not self.dynamic:
            return None
        names = iter(self.names)

        def axes(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return None
            name = next(names)
            return {axis.axis: dims[axis.symbol] for axis in self.dynamic if axis.input in (None, name)}

        bound = inspect.signature(model.forward).bind(*self.args, **self.kwargs)
        return {parameter: pytree.tree_map(axes, value) for parameter, value in bound.arguments.items()}


def from_specs(model: nn.Module, specs: Sequence[InputSpec], dynamic: Sequence[DynamicAxis], seed: int) -> Signature:
    """Bind input specifications to the model's forward, with seeded values.

    Raises:
        UsageError: names or number of inputs do not fit the model's forward, or a dynamic axis names no input.
    """
    parameters = inspect.signature(model.forward).parameters
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    positional = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    generator = torch.Generator().manual_seed(seed)
    placed: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for spec in specs:
        value = random_tensor(spec.shape, getattr(torch, spec.dtype), generator)
        if spec.name is not None:
            if spec.name not in parameters and not variadic:
                raise UsageError(
                    f"--input {spec}: forward has no parameter {spec.name!r}.", f"It has {', '.join(parameters)}."
                )
            (placed if spec.name in parameters else extra)[spec.name] = value
            continue
        free = next((name for name in positional if name not in placed), None)
        if free is not None:
            placed[free] = value
        elif variadic:
            extra[f"input_{len(extra)}"] = value
        else:
            raise UsageError(
                f"{len(specs)} inputs were given, but forward takes {len(positional)}: {', '.join(positional)}."
            )
    missing = [
        n for n, p in parameters.items()
        if n not in placed and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]  # fmt: skip
    if missing:
        raise UsageError(
            f"forward also needs {', '.join(missing)}.", "Give one --input for each, for example --input NAME:1x16."
        )
    args: list[Any] = []
    in_order = True
    kwargs: dict[str, Tensor] = {}
    for name in [n for n in parameters if n in placed or n in positional]:
        if name not in placed:
            in_order = False  # a default is skipped: what follows goes by name
        elif in_order and name in positional:
            args.append(placed[name])
        else:
            kwargs[name] = placed[name]
    names = [n for n in parameters if n in placed and n not in kwargs] + [*extra] + [*kwargs]
    _check_axes(dynamic, names)
    return Signature((*args, *extra.values()), kwargs, tuple(names), tuple(dynamic))


def from_example(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic: Sequence[DynamicAxis]
) -> Signature:
    """Name the tensors of example arguments after the forward parameters (and keys) that hold them."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"The example inputs do not fit the model's forward: {error}.") from error
    names: list[str] = []
    for parameter, value in bound.arguments.items():
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                names.append("_".join([parameter, *(_key(entry) for entry in path)]))
    _check_axes(dynamic, names)
    return Signature(bound.args, bound.kwargs, tuple(names), tuple(dynamic))


def _check_axes(dynamic: Sequence[DynamicAxis], names: Sequence[str]) -> None:
    for axis in dynamic:
        if axis.input is not None and axis.input not in names:
            raise UsageError(
                f"--dynamic {axis.input}:{axis.axis}: no input is called {axis.input!r}.",
                f"The inputs are {', '.join(names)}.",
            )


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def random_tensor(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Seeded values: normal for floating types, 0 and 1 for others (a valid index into anything)."""
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    return torch.randint(0, 2, tuple(shape), generator=generator).to(dtype)


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors of a model's output by name: ``output``, ``output_0`` ..., or the keys of a dictionary.

    Raises:
        ModelError: there is no tensor in it.
    """
    named: dict[str, Tensor] = {}
    for path, leaf in pytree.tree_flatten_with_path(output)[0]:
        if isinstance(leaf, Tensor):
            keys = [_key(entry) for entry in path]
            named["_".join(["output", *keys] if not keys or keys[0].isdigit() else keys)] = leaf
    if not named:
        raise ModelError(f"The model returned {type(output).__name__} without a tensor in it.")
    return named
