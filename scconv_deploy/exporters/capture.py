"""Trace a PyTorch model to a bare ONNX graph by torch.export, checked for every declared size; explain refusals.

Open axes are left to torch.export's inference (``Dim.AUTO``), which records its assumptions as guards and refuses
nothing; :mod:`.ranges` then checks the guards against the declared ranges. A ``torch.export.Dim`` with a range would be
narrowed silently by ``torch.onnx.export`` wherever the model's code needs it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_config
from torch.utils import _pytree as pytree

from scconv_deploy.errors import ModelError, first_line
from scconv_deploy.exporters.nms import TRANSLATIONS
from scconv_deploy.exporters.ranges import Guard, OpenSizes, check_guards
from scconv_deploy.exporters.sizes import check_shapes, ends, traced_shapes
from scconv_deploy.gate.threads import one_thread
from scconv_deploy.model.signature import BY_TORCHSCRIPT, Signature

_TORCH = str(Path(torch.__file__).parent)
_RANDOM = (
    "bernoulli",
    "normal",
    "normal_",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "uniform",
    "uniform_",
)
_OURS = Path(__file__).parents[1]
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")


def capture(model: nn.Module, signature: Signature, output_names: Sequence[str], opset: int) -> ir.Model:
    """Trace a model and translate it to ONNX, with the names of its inputs, outputs and open axes.

    Python is traced as it runs (``strict=False``). If that ties the graph to some sizes, its bytecode is traced instead
    (``strict=True``), which keeps ``int(size * 0.5)`` open.

    Raises:
        ModelError: torch.export refuses the model, or the graph does not hold for all declared sizes.
    """
    args, kwargs = _traceable(signature)
    trace = _Trace(model, signature, (args, kwargs))
    shapes = signature.dynamic_shapes(model, trace.dims())

    def translated(strict: bool) -> torch.onnx.ONNXProgram:
        with _sizes_of_one(), _recurrent_loops(bool(shapes)), trace:
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
        doubtful = trace.check(exported)
        exported.example_inputs = None  # else decomposition evaluates its guards, which makes new ones
        program = torch.onnx.export(
            exported, dynamo=True, opset_version=opset, input_names=signature.names, output_names=output_names,
            custom_translation_table=TRANSLATIONS, verbose=False,
        )  # fmt: skip
        assert program is not None  # noqa: S101  (for the type checker: dynamo=True returns a program)
        if program.exported_program is not None:
            doubtful += trace.check(program.exported_program)  # decomposition adds guards of its own
        trace.check_shapes(exported, output_names, doubtful)
        return program

    with quiet(), one_thread():
        try:
            program = translated(strict=False)
        except Exception as error:  # torch.export raises its own errors and those of the model's code
            refusal = error if isinstance(error, ModelError) else _refusal(error, trace)
            try:
                program = translated(strict=True)
            except Exception:  # the first refusal is in terms of the model's code
                raise refusal from error
    trace.name_axes(program)
    return program.model


def _sizes_of_one() -> contextlib.AbstractContextManager[None]:
    """Let an open axis be 1: a comparison with 1 becomes a guard like any other, as in torch's own exporter."""
    return symbolic_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _recurrent_loops(dynamic: bool) -> Iterator[None]:
    """Translate LSTM and GRU to loops, so that their length may be open, as in torch's own exporter."""
    with contextlib.ExitStack() as stack:
        if dynamic:
            with contextlib.suppress(ImportError):  # releases before 2.12 have none
                from torch.export import _patches

                stack.enter_context(_patches.register_lstm_while_loop_decomposition())
                stack.enter_context(_patches.register_gru_while_loop_decomposition())
        yield


def _traceable(signature: Signature) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example arguments with every open axis at 2 or more: torch.export takes a size of 1 for a constant."""
    names = iter(signature.names)

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        name = next(names)
        for axis in signature.dynamic:
            if axis.input in (None, name) and leaf.shape[axis.axis] == 1:
                leaf = torch.cat([leaf, leaf], dim=axis.axis)
        return leaf

    return pytree.tree_map(widen, (signature.args, signature.kwargs))


class _Trace:
    """Guards of a trace on the open axes, with their places in the model's code.

    A context manager: inside it, each guard is recorded with its place when torch.export makes it.
    """

    def __init__(self, model: nn.Module, signature: Signature, arguments: Any) -> None:
        self._model, self._signature = model, signature
        self._paths = {id(module): path for path, module in model.named_modules()}
        leaves = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        self._inputs = dict(zip(signature.names, leaves, strict=True))
        self._environment: Any = None
        self._symbols: dict[tuple[str, int], sympy.Symbol] = {}
        self._hook: Any = None
        self._opened: list[OpenSizes] = []

    def dims(self) -> dict[str, Any]:
        """Declared range of each symbol as a ``Dim.AUTO``; torch.export infers the rest."""
        return {a.symbol: torch.export.Dim.AUTO(min=a.minimum, max=a.maximum) for a in self._signature.dynamic}

    def __enter__(self) -> None:
        self._hook = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the symbols before the model's code can replace them, and watch the guards."""
        if torch.compiler.is_dynamo_compiling():
            return
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len(tensors) == len(self._inputs):
            self._symbols = self._symbols_of(tensors)
        self._environment = next((found for t in tensors if (found := _environment_of(t)) is not None), None)
        if self._environment is not None:
            self._environment.guards = _NotedGuards(self._paths, self._environment.guards)

    def _symbols_of(self, tensors: Sequence[Tensor]) -> dict[tuple[str, int], sympy.Symbol]:
        found: dict[tuple[str, int], sympy.Symbol] = {}
        for name, tensor in zip(self._signature.names, tensors, strict=True):
            for axis in self._signature.dynamic:
                size = tensor.shape[axis.axis] if axis.input in (None, name) else 0
                if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                    found[name, axis.axis] = size.node.expr
        return found

    # --- judging -------------------------------------------------------------------------------------------------

    def check(self, exported: torch.export.ExportedProgram) -> list[list[int]]:
        """Raise ModelError if the graph does not hold for all declared sizes.

        Returns:
            Sizes whose output shapes must be checked, see :func:`.ranges.check_guards`.
        """
        inputs = set(exported.graph_signature.user_inputs)
        values = [
            node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder" and node.name in inputs
        ]
        tensors = [value for value in values if isinstance(value, Tensor)]
        environment = next((found for t in tensors if (found := _environment_of(t)) is not None), None)
        symbols = self._symbols
        if environment is not self._environment:  # a trace of bytecode: the symbols that are left
            symbols = self._symbols_of(tensors) if len(tensors) == len(self._inputs) else {}
        self._opened = self._grouped(symbols)
        if not self._opened or environment is None:
            return []
        places = list(getattr(environment.guards, "places", []))
        places += [("", "", False)] * (len(environment.guards) - len(places))
        guards = [Guard(g.expr, *place) for g, place in zip(environment.guards, places, strict=True)]
        doubtful = check_guards(guards, self._opened)
        self._check_open(tensors)
        return doubtful

    def check_shapes(
        self, exported: torch.export.ExportedProgram, output_names: Sequence[str], doubtful: list[list[int]]
    ) -> None:
        """Raise ModelError if the model returns other shapes than the graph, or refuses its inputs."""
        if self._opened:
            shapes, tried = traced_shapes(exported, output_names), [*ends(self._opened), *doubtful]
            check_shapes(self._model, self._signature, shapes, self._opened, tried)

    def _grouped(self, symbols: dict[tuple[str, int], sympy.Symbol]) -> list[OpenSizes]:
        grouped: dict[str, list[Any]] = {}
        for axis in self._signature.dynamic:
            grouped.setdefault(axis.symbol, []).append(axis)
        opened = []
        for axes in grouped.values():
            places = [
                (name, axis.axis) for axis in axes for name in self._signature.names if axis.input in (None, name)
            ]
            names = dict.fromkeys(symbols[place] for place in places if place in symbols)
            traced = self._inputs[places[0][0]].shape[places[0][1]]
            opened.append(OpenSizes(tuple(axes), traced, tuple(names)))
        return opened

    def _check_open(self, tensors: Sequence[Tensor]) -> None:
        """Raise ModelError if a declared axis is a constant in the graph, or follows another axis; no guard says so."""
        taken: dict[Any, str] = {}
        for name, tensor in zip(self._signature.names, tensors, strict=True):
            for axis in self._signature.dynamic:
                if axis.input not in (None, name):
                    continue
                size = tensor.shape[axis.axis]
                where = f"Input {name}: axis {axis.axis} was declared dynamic"
                if isinstance(size, int) or size.node.expr.is_number:
                    raise ModelError(
                        f"{where}, but the model's code fixes it to {size}.",
                        "Leave it static, or make the code independent of it.",
                    )
                if not isinstance(size.node.expr, sympy.Symbol):  # the axis has no symbol of its own
                    raise ModelError(
                        f"{where}, but the model's code ties it to the size of another axis (it is {size.node.expr}).",
                        "Leave one of them static, or make the code independent of it.",
                    )
                other = taken.setdefault(size.node.expr, axis.symbol)
                if other != axis.symbol:
                    raise ModelError(
                        f"{where}, but the model's code makes it the same as {other}.",
                        "Declare them as one (--dynamic a:2,b:2=...), or leave them static.",
                    )

    def name_axes(self, program: torch.onnx.ONNXProgram) -> None:
        """Rename the graph's open axes to the symbols of the signature."""
        names: dict[Any, str] = {}
        for value in program.model.graph.inputs:
            for axis in self._signature.dynamic:
                if axis.input in (None, value.name) and value.shape is not None:
                    names[str(value.shape[axis.axis])] = axis.symbol
        program.rename_axes(names)

    # --- places --------------------------------------------------------------------------------------------------

    def place_of_error(self, error: BaseException) -> tuple[str, str]:
        """Module and line of the user's code that raised an error."""
        return _place(self._paths, [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1])

    def fresh_layer(self, error: BaseException) -> nn.Module | None:
        """The module with parameters in an error's traceback that is not part of the model; None without one."""
        for frame, _ in traceback.walk_tb(error.__traceback__):
            owner = frame.f_locals.get("self")
            if not isinstance(owner, nn.Module) or id(owner) in self._paths:
                continue
            tracing = type(owner).__module__.startswith(("torch._", "torch.export", "torch.fx"))
            if not tracing and next(owner.parameters(), None) is not None:
                return owner
        return None


def _environment_of(tensor: Tensor) -> Any:
    return getattr(getattr(tensor, "fake_mode", None), "shape_env", None)


class _NotedGuards(list):
    """List of a trace's guards that also records the place in the model's code of each."""

    def __init__(self, paths: dict[int, str], guards: Sequence[Any] = ()) -> None:
        super().__init__(guards)
        self._paths = paths
        self.places: list[tuple[str, str, bool]] = [("", "", False)] * len(guards)

    def append(self, guard: Any) -> None:
        super().append(guard)
        asked = getattr(guard.sloc.framework_loc, "filename", "")
        self.places.append((*_place(self._paths, _frames(sys._getframe(1))), asked.startswith(_TORCH)))


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(paths: dict[int, str], frames: Iterable[FrameType]) -> tuple[str, str]:
    """Module and line of the user's code in a stack, innermost frame first."""
    module = line = ""
    for frame in frames:
        node, owner = frame.f_locals.get("n"), frame.f_locals.get("self")
        if isinstance(node, torch.fx.Node):  # an operator is decomposed after the trace
            return _module_of(node), _line_of(node)
        if not line and not _is_foreign(frame.f_code.co_filename):
            line = _line(frame.f_code.co_filename, frame.f_lineno)
        if isinstance(owner, nn.Module) and id(owner) in paths:
            module = module or paths[id(owner)]
            if (module and line) or not paths[id(owner)]:
                return module, line
    return module, line if module else ""


def _line(file: str, number: int) -> str:
    return f"{Path(file).name} line {number}"


def _module_of(node: torch.fx.Node) -> str:
    """The path of the module that a node comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _line_of(node: torch.fx.Node) -> str:
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return next((_line(file, int(number)) for file, number in found[::-1] if not _is_foreign(file)), "")


def _is_foreign(file: str) -> bool:
    """Whether a file is not the model's code: of torch or its dependencies, the standard library or this package."""
    path = Path(file)
    if file.startswith((_TORCH, "<")) or (path.is_relative_to(_OURS) and path.parent.name != "zoo"):
        return True
    if {"site-packages", "dist-packages"} & set(path.parts):
        return "sympy" in path.parts or "onnxscript" in path.parts
    return path.is_relative_to(_STANDARD_LIBRARY)


# --- refusals ------------------------------------------------------------------------------------------------------


def _refusal(error: BaseException, trace: _Trace) -> ModelError:
    """The error for a refused trace. torch wraps the reason in layers of advice; the innermost exception has it."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    node = next((found for one in chain if (found := _node_of(one)) is not None), None)
    if node is not None:
        return _untranslated(chain, node)
    module, line = next((place for one in chain[::-1] if any(place := trace.place_of_error(one))), ("", ""))
    where = Guard(sympy.true, module, line).where
    fresh = next((layer for one in chain[::-1] if (layer := trace.fresh_layer(one)) is not None), None)
    if fresh is not None:
        return ModelError(
            f"The model's code makes a new layer in each call, {type(fresh).__name__}{where}, and torch.export cannot "
            "trace parameters that are made during the trace.",
            f"Build it once, in __init__; or {BY_TORCHSCRIPT}.",
        )
    if any(name in str(chain[-1]) for name in ("SymInt", "SymFloat", "SymBool")):
        return ModelError(
            f"The model's code uses the size of an open axis as a plain number{where}: "
            f"{type(chain[-1]).__name__}: {first_line(chain[-1]).rstrip('.')}.",
            "Leave that axis static, or compute with torch there.",
        )
    return ModelError(
        f"torch.export refuses the model: {type(chain[-1]).__name__}: {first_line(chain[-1]).rstrip('.')}{where}.",
        _export_remedy("".join(map(str, chain))),
    )


def _node_of(error: BaseException) -> torch.fx.Node | None:
    """The node whose translation raised an error; None without one."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node):
            return node
    return None


def _operator(node: torch.fx.Node) -> str:
    """The name of a node's operator as in PyTorch's documentation."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::")
    return getattr(node.target, "__name__", str(node.target))


def _untranslated(chain: Sequence[BaseException], node: torch.fx.Node) -> ModelError:
    module, line, operator = _module_of(node), _line_of(node), _operator(node)
    where = (f"Module {module}" if module else "The model") + (f" ({line})" if line else "")
    text = "\n".join(map(str, chain))
    if "Unsupported attribute type" in text and "SymbolicTensor" in text:
        found = re.search(r"'(\w+)': SymbolicTensor", text.rpartition("named_attrs=")[2])
        what = f"the attribute {found[1]} of" if found else "an argument of"
        return ModelError(
            f"{where}: {what} {operator} depends on an open axis, and ONNX holds it as a constant.",
            "Leave that axis static; for a convolution whose groups depend on the batch, leave --batch out.",
        )
    if operator in _RANDOM:
        return ModelError(
            f"{where} draws random numbers ({operator}), so the same input gives another output each time.",
            "Draw them once, in __init__; a layer that forward makes draws its weights there too.",
        )
    return ModelError(
        f"{where}: {operator} cannot be translated to ONNX: {first_line(chain[-1]).rstrip('.')}.",
        "Compute it in another way there.",
    )


def _export_remedy(text: str) -> str:
    if "data-dependent" in text or "GuardOnDataDependent" in text:
        return "The model branches on values; torch.export needs torch.cond or torch.where there."
    return "See torch.export's documentation for what it supports."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence logging, warnings and stdout of torch's exporter; errors are raised, not logged."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    exporter = logging.getLogger("torch.onnx")  # by name too: a model's code may turn logging on again
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        exporter.setLevel(level)
