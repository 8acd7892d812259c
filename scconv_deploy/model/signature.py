"""Inputs and outputs of a model: tensors by name in ONNX's order, and back to Python's arguments."""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scconv_deploy.errors import ModelError, RefusedSizesError, ScconvDeployError, UsageError, first_line
from scconv_deploy.model.input_range import USUAL, InputRange
from scconv_deploy.model.inputs import DynamicAxis, InputSpec


@dataclass(frozen=True, eq=False)
class Signature:
    """The inputs of one model: example arguments, the names of their tensors, and which axes are open.

    Attributes:
        args, kwargs: example arguments as the model takes them.
        names: of the tensors among them, in flattened order; these are the ONNX inputs.
        dynamic: open axes.
        drawn: range of generated floating tensors.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    dynamic: tuple[DynamicAxis, ...] = ()
    drawn: InputRange = USUAL

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The example tensors by name."""
        leaves = [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        return dict(zip(self.names, leaves, strict=True))

    def call(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on copies of tensors given by name (code in the wild writes into its inputs).

        Returns:
            Its output tensors by name, see :func:`named_outputs`.

        Raises:
            RuntimeError: torch's word for a shape or dtype that does not fit; :class:`.errors.RefusedSizesError` where
                the sizes are not the example's.
            ModelError: the model raises anything else, or returns no tensor.
        """
        return named_outputs(self.run(model, tensors), self.names)

    def run(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
        """Run the model as :meth:`call` does; outputs by name, and the model's own return value."""
        values = iter([tensors[name].clone() for name in self.names])
        args, kwargs = pytree.tree_map(
            lambda leaf: next(values) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        try:
            with torch.no_grad():
                return model(*args, **kwargs)
        except ScconvDeployError:
            raise
        except Exception as error:  # the user's own code
            shapes = ", ".join(f"{name} {'x'.join(map(str, t.shape))}" for name, t in tensors.items())
            if isinstance(error, RuntimeError):
                if all(tensors[name].shape == example.shape for name, example in self.tensors.items()):
                    raise
                raise RefusedSizesError(
                    f"The model refuses inputs of these sizes ({shapes}): {first_line(error).rstrip('.')}.",
                    "Declare with --batch and --dynamic what it takes.",
                ) from error
            raise ModelError(
                f"The model refuses its inputs ({shapes}): {type(error).__name__}: {first_line(error)}",
                "Check --input.",
            ) from error

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


def from_specs(
    model: nn.Module,
    specs: Sequence[InputSpec],
    dynamic: Sequence[DynamicAxis],
    seed: int,
    drawn: InputRange = USUAL,
) -> Signature:
    """Bind input specifications to the model's forward, with seeded values; open axes have their optimum.

    Named ones go to their parameters (or to ``**kwargs``), the others in order to what is left (or to ``*args``).

    Raises:
        UsageError: names or number of inputs do not fit the model's forward, a dynamic axis does not fit the inputs,
            or the inputs are larger than the memory.
    """
    signature = inspect.signature(model.forward)
    placed, rest = _place(signature, specs)
    generator = torch.Generator().manual_seed(seed)

    def tensor(spec: InputSpec, name: str) -> Tensor:
        shape = list(spec.shape)
        for axis in dynamic:
            if axis.input == name and axis.axis < len(shape):
                shape[axis.axis] = axis.optimum
        try:
            return random_tensor(shape, getattr(torch, spec.dtype), generator, drawn)
        except (RuntimeError, TypeError) as error:  # torch's words for too many bytes, and for too large a number
            raise UsageError(f"--input {spec} is larger than the memory.", "Give a smaller shape.") from error

    arguments: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            if rest:
                arguments[name] = tuple(tensor(spec, f"{name}_{index}") for index, spec in enumerate(rest))
        elif parameter.kind is parameter.VAR_KEYWORD:
            extra = {key: tensor(spec, key) for key, spec in placed.items() if key not in signature.parameters}
            if extra:
                arguments[name] = extra
        elif name in placed:
            arguments[name] = tensor(placed[name], name)
        elif parameter.kind is parameter.POSITIONAL_ONLY or (rest and parameter.kind is not parameter.KEYWORD_ONLY):
            arguments[name] = parameter.default  # what follows cannot go by name
    bound = inspect.BoundArguments(signature, OrderedDict(arguments))
    return dataclasses.replace(_of_bound(bound, dynamic), drawn=drawn)


def _place(signature: inspect.Signature, specs: Sequence[InputSpec]) -> tuple[dict[str, InputSpec], list[InputSpec]]:
    """The parameter of each input, and the inputs that go to ``*args``."""
    kinds = {p.kind for p in signature.parameters.values()}
    parameters = {
        n: p for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }  # fmt: skip
    takes = f"It takes {', '.join(map(str, signature.parameters.values())) or 'nothing'}."
    placed: dict[str, InputSpec] = {}
    for spec in specs:
        if spec.name in placed:
            raise UsageError(f"--input {spec}: {spec.name} is given twice.", "Leave one of them out.")
        if spec.name is not None:
            if spec.name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
                raise UsageError(f"--input {spec}: forward has no parameter {spec.name!r}.", takes)
            placed[spec.name] = spec
    free = [
        n for n, p in parameters.items()
        if n not in placed and (p.kind is not p.KEYWORD_ONLY or p.default is p.empty)
    ]  # fmt: skip
    unnamed = [spec for spec in specs if spec.name is None]
    placed |= dict(zip(free, unnamed, strict=False))
    rest = unnamed[len(free) :]
    if rest and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise UsageError(f"--input {rest[0]}: forward has no parameter left for it.", takes)
    missing = [n for n in free[len(unnamed) :] if parameters[n].default is inspect.Parameter.empty]
    if missing:
        raise UsageError(f"forward also needs {', '.join(missing)}.", f"Add for example --input {missing[0]}:1x16.")
    return placed, rest


def from_example(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic: Sequence[DynamicAxis]
) -> Signature:
    """Name the tensors of example arguments after the forward parameters (and keys) that hold them.

    Raises:
        UsageError: the arguments do not fit the model's forward, or a dynamic axis does not fit the arguments.
    """
    takes = inspect.signature(model.forward)
    try:
        bound = takes.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"The example inputs do not fit the model's forward: {error}.", f"Give those of forward{takes}."
        ) from error
    return _of_bound(bound, dynamic)


def _of_bound(bound: inspect.BoundArguments, dynamic: Sequence[DynamicAxis]) -> Signature:
    names: list[str] = []
    for parameter, value in bound.arguments.items():
        by_key = bound.signature.parameters[parameter].kind is inspect.Parameter.VAR_KEYWORD
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                keys = [_key(entry) for entry in path]
                names.append("_".join(keys if by_key else [parameter, *keys]))
    if len(set(names)) < len(names):
        raise UsageError(f"Two inputs have one name: {', '.join(names)}.", "Rename the keys of the example inputs.")
    signature = Signature(bound.args, bound.kwargs, tuple(names), tuple(dynamic))
    _check_axes(signature)
    return signature


def _check_axes(signature: Signature) -> None:
    """Refuse a dynamic axis that no input has or that is given twice, and an example's size outside its range."""
    tensors = signature.tensors
    seen: set[tuple[str, int]] = set()
    for axis in signature.dynamic:
        if axis.minimum == axis.maximum:
            raise UsageError(
                f"Dynamic axis {axis.axis} from {axis.minimum} to {axis.maximum} leaves nothing open.",
                "Leave it out, and give the size with --input.",
            )
        if axis.input is not None and axis.input not in tensors:
            raise UsageError(
                f"--dynamic {axis.input}:{axis.axis}: no input is called {axis.input!r}.",
                f"The inputs are {', '.join(tensors)}.",
            )
        for name in tensors if axis.input is None else [axis.input]:
            shape = list(tensors[name].shape)
            if (name, axis.axis) in seen:
                raise UsageError(f"Dynamic axis {axis.axis} of input {name} is given twice.", "Leave one out.")
            seen.add((name, axis.axis))
            if axis.axis >= len(shape):
                raise UsageError(
                    f"Dynamic axis {axis.axis} of input {name}: its shape {shape} has {len(shape)} axes.",
                    "Axes count from 0.",
                )
            if not axis.minimum <= shape[axis.axis] <= axis.maximum:
                raise UsageError(
                    f"Dynamic axis {axis.axis} of input {name}: the example has {shape[axis.axis]}, "
                    f"expected {axis.minimum} to {axis.maximum}.",
                    "Give an example within the range.",
                )
            if shape[axis.axis] % axis.step:
                raise UsageError(
                    f"Dynamic axis {axis.axis} of input {name}: the example has {shape[axis.axis]}, "
                    f"expected a multiple of {axis.step}.",
                    "Give such an example.",
                )


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def random_tensor(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, drawn: InputRange = USUAL
) -> Tensor:
    """Seeded values: normal in a range for floating types, 0 and 1 for others (a valid index into anything)."""
    if dtype.is_floating_point:
        return drawn.of(torch.randn(tuple(shape), generator=generator)).to(dtype)
    return torch.randint(0, 2, tuple(shape), generator=generator).to(dtype)


def named_outputs(output: Any, inputs: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a model's output by name: ``output``, ``output_0`` ..., or the keys of a dictionary.

    A graph has one namespace, so a key that is also the name of an input gets the prefix ``output_``.

    Raises:
        ModelError: there is no tensor in it, or two have one name.
    """
    named: dict[str, Tensor] = {}
    for name, leaf in _named_leaves(output):
        if isinstance(leaf, Tensor):
            name = f"output_{name}" if name in inputs else name
            if name in named:
                raise ModelError(f"Two outputs of the model have one name: {name}.", "Rename the keys that it returns.")
            named[name] = leaf
    if not named:
        raise ModelError(
            f"The model returned {type(output).__name__} without a tensor in it.",
            "Return tensors in a tuple, a list, a dictionary or a dataclass.",
        )
    return named


def refuse_what_is_no_tensor(output: Any) -> None:
    """Raise ModelError for an output that no graph can have; None is left out of the graph without harm."""
    for name, leaf in _named_leaves(output):
        if isinstance(leaf, Tensor) or leaf is None:
            continue
        plain = isinstance(leaf, (bool, int, float, complex, str, bytes))
        raise ModelError(
            f"Output {name} of the model is {f'{leaf!r}, ' if plain else ''}{_type(leaf)}; an ONNX graph returns "
            "tensors alone.",
            ("Leave it out, or return torch.tensor of it" if plain else "Return tensors in a tuple, list or dictionary")
            + f"; or {BY_TORCHSCRIPT}.",
        )


BY_TORCHSCRIPT = "export with torch.onnx.export(..., dynamo=False) and give that file to scconv-deploy rewrite"
"""The way round torch.export: TorchScript follows what runs, and makes a constant of everything else."""


def _named_leaves(output: Any) -> Iterator[tuple[str, Any]]:
    """Tensors of an output by name: ``output``, ``output_0`` ..., or the keys of a dictionary or dataclass."""
    _open_dataclasses(output)
    for path, leaf in pytree.tree_flatten_with_path(output)[0]:
        keys = [_key(entry) for entry in path]
        yield "_".join(["output", *keys] if not keys or keys[0].isdigit() else keys), leaf


def _open_dataclasses(output: Any) -> None:
    """Register the dataclasses in an output with torch, which takes them for leaves otherwise."""
    for leaf in pytree.tree_leaves(output):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            _register(type(leaf))
            _open_dataclasses(leaf)


def _register(kind: type) -> None:
    names = [field.name for field in dataclasses.fields(kind)]

    def values(instance: Any) -> list[Any]:
        return [getattr(instance, name) for name in names]

    def rebuild(found: Iterable[Any], context: Any) -> Any:
        instance: Any = object.__new__(kind)
        for name, value in zip(names, found, strict=True):
            object.__setattr__(instance, name, value)  # also where it is frozen
        return instance

    pytree.register_pytree_node(
        kind,
        lambda instance: (values(instance), None),
        rebuild,
        flatten_with_keys_fn=lambda instance: (
            [(pytree.GetAttrKey(name), value) for name, value in zip(names, values(instance), strict=True)],
            None,
        ),
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
    )


def _type(value: Any) -> str:
    kind = type(value)
    return f"a Python {kind.__name__}" if kind.__module__ == "builtins" else f"of type {kind.__name__}"
