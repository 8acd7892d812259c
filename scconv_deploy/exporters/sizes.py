"""Compare the output shapes of model and traced graph at the ends of the declared ranges.

The model runs on shapes alone (``FakeTensorMode``), so the largest sizes cost no memory. This finds what no guard
tells: ``squeeze()`` of an axis that may be 1, a size that became a string, inputs that the model refuses.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree

from scconv_deploy.errors import ModelError, first_line
from scconv_deploy.exporters.ranges import OpenSizes, option
from scconv_deploy.model.signature import Signature

Shapes = dict[str, list[Any]]
_INCAPABLE = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)
"""Errors of models that cannot run on shapes alone."""
_BETWEEN = 3
"""Number of seeded choices besides the ends."""


def ends(opened: Sequence[OpenSizes]) -> list[list[int]]:
    """Sizes to try, one per symbol: all at the minimum, all at the maximum, one alone at its maximum, some between."""
    low = [int(sizes.sizes()[0]) for sizes in opened]
    high = [int(sizes.sizes()[-1]) for sizes in opened]
    tried = [low, high]
    if len(opened) > 1:
        for index in range(len(opened)):
            tried += [[*low[:index], high[index], *low[index + 1 :]]]
    draw = np.random.default_rng(0)
    tried += [[int(draw.choice(sizes.sizes())) for sizes in opened] for _ in range(_BETWEEN)]
    return [list(sizes) for sizes in dict.fromkeys(map(tuple, tried))]


def check_shapes(
    model: nn.Module,
    signature: Signature,
    traced: Shapes,
    opened: Sequence[OpenSizes],
    tried: Sequence[Sequence[int]],
) -> None:
    """Check that the model's output shapes are those of the graph.

    Args:
        traced: symbolic shapes of the graph's outputs by name.
        tried: sizes of the symbols of ``opened``.

    Raises:
        ModelError: they differ, or the model refuses the sizes; it names the sizes.
    """
    control = _shapes(model, signature, opened, [sizes.traced for sizes in opened])
    if isinstance(control, Exception):  # the model cannot run on shapes alone
        return
    for sizes in tried:
        found = _shapes(model, signature, opened, sizes)
        if isinstance(found, _INCAPABLE):
            continue
        words = ", ".join(f"{one.words} is {size}" for one, size in zip(opened, sizes, strict=True))
        if isinstance(found, Exception):
            raise ModelError(
                f"Where {words}, which was declared, the model refuses its inputs: "
                f"{type(found).__name__}: {first_line(found).rstrip('.')}.",
                _remedy(opened, sizes),
            )
        expected = _at(traced, opened, sizes)
        for name in dict.fromkeys((*expected, *found)):
            if not _agree(found.get(name), expected.get(name)):
                raise ModelError(
                    f"Where {words}, which was declared, the model returns {name} {_text(found.get(name))}, and the "
                    f"traced graph {_text(expected.get(name))}.",
                    _remedy(opened, sizes),
                )


def _shapes(
    model: nn.Module, signature: Signature, opened: Sequence[OpenSizes], sizes: Sequence[int]
) -> Shapes | Exception:
    """Output shapes by name, or the model's exception."""
    wanted = {axis.symbol: size for one, size in zip(opened, sizes, strict=True) for axis in one.axes}
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {}
    with mode:
        for name, tensor in signature.tensors.items():
            shape = list(tensor.shape)
            for axis in signature.dynamic:
                if axis.input in (None, name):
                    shape[axis.axis] = wanted[axis.symbol]
            tensors[name] = torch.empty(shape, dtype=tensor.dtype)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # an earlier run has printed the same
                outputs = signature.call(model, tensors)
        except Exception as error:  # the user's own code, and torch's many kinds
            return error.__cause__ if isinstance(error.__cause__, Exception) else error
    return {name: list(value.shape) for name, value in outputs.items()}


def _at(traced: Shapes, opened: Sequence[OpenSizes], sizes: Sequence[int]) -> Shapes:
    """The symbolic shapes as numbers for given sizes; None for axes that depend on values."""
    values = {name: size for one, size in zip(opened, sizes, strict=True) for name in one.names}
    return {name: [_number(size, values) for size in shape] for name, shape in traced.items()}


def _number(size: Any, values: Mapping[Any, int]) -> int | None:
    if isinstance(size, int):
        return size
    found = size.node.expr.xreplace({name: sympy.Integer(value) for name, value in values.items()})
    return int(found) if found.is_number else None


def _agree(found: list[int] | None, expected: list[Any] | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return len(found) == len(expected) and all(b in (None, a) for a, b in zip(found, expected, strict=True))


def _text(shape: list[Any] | None) -> str:
    return "nothing" if shape is None else "x".join("?" if size is None else str(size) for size in shape) or "a scalar"


def _remedy(opened: Sequence[OpenSizes], sizes: Sequence[int]) -> str:
    """Remedy: the declaration without the size that failed, where that is the minimum of a single symbol."""
    if len(opened) == 1:
        axis, (size,) = opened[0].axis, sizes
        if size == opened[0].sizes()[0] and axis.optimum > size:
            return f"Declare {option(opened[0].axes, minimum=size + axis.step)}, or give the model another form."
    return "Declare a range without it, or make the code independent of it."


def traced_shapes(exported: torch.export.ExportedProgram, names: Sequence[str]) -> Shapes:
    """The symbolic shapes of an exported program's outputs, in the order of their names."""
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    mutated = len(exported.graph_signature.output_specs) - len(exported.graph_signature.user_outputs)
    values = [node.meta["val"] for node in pytree.tree_leaves(output.args[0])[mutated:] if hasattr(node, "meta")]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return {name: list(value.shape) for name, value in zip(names, tensors, strict=False)}
