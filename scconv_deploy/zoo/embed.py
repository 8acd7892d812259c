"""ScConv in place of any network's 3x3 convolutions, with what was replaced, what was left and why, and the cost."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from scconv_deploy.errors import ConfigurationError, ModelError, UsageError, first_line
from scconv_deploy.gate.swap import replace_modules
from scconv_deploy.nn import ScConv
from scconv_deploy.zoo import blocks
from scconv_deploy.zoo.blocks import Convolution
from scconv_deploy.zoo.embed_spec import PAPER
from scconv_deploy.zoo.layers import LARGEST_GAIN

_NEAR_MATCHES = 3
_UNNAMED = "the pattern does not name it"


@dataclass(frozen=True, eq=False)
class EmbedResult:
    """A network with ScConv in it, and the record of replaced and left convolutions.

    Attributes:
        model: the embedded copy.
        rule: that was followed.
        replaced: (path, what stood there and what stands there now).
        left: (path, reason) of every other 3x3 convolution, and of whatever else a pattern names.
        parameters_before, parameters_after: numbers that training moves.
        multiply_adds_before, multiply_adds_after: of one sample, convolutions and matrix products (what papers call
            FLOPs); None without example inputs.
        calibrated: norms whose statistics were taken from the example inputs.
        seconds: wall clock.
        untrained: the ScConvs have their initial values.
    """

    model: nn.Module
    rule: str
    replaced: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int | None = None
    multiply_adds_after: int | None = None
    calibrated: tuple[str, ...] = ()
    seconds: float = 0.0
    untrained: bool = True

    @property
    def summary(self) -> tuple[str, ...]:
        """Replaced convolutions, costs before and after, and the state of the weights, one line each."""
        lines = [f"rule {self.rule}: {len(self.replaced)} convolutions replaced, {len(self.left)} left"]
        lines += [f"parameters {_change(self.parameters_before, self.parameters_after)}"]
        if self.multiply_adds_before is not None and self.multiply_adds_after is not None:
            lines.append(f"multiply-adds a sample {_change(self.multiply_adds_before, self.multiply_adds_after)}")
        if self.calibrated:
            lines.append(f"statistics of {len(self.calibrated)} norms taken from the example inputs")
        if self.untrained:
            lines.append("ScConv has its initial values: fine-tune the embedded network before it is of use")
        return tuple(lines)


@dataclass(frozen=True, eq=False)
class Example:
    """Arguments that a network can be called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, inputs: Any) -> Example:
        """A tensor, a tuple of positional arguments, or a dictionary of named ones."""
        if isinstance(inputs, dict):
            return cls((), inputs)
        return cls(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})

    @property
    def batch(self) -> int:
        tensors = [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor) and t.dim()]
        return max((len(t) for t in tensors), default=1)

    def run(self, model: nn.Module) -> None:
        """Call the model on copies, for code in the wild writes into its inputs."""
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (self.args, dict(self.kwargs))
        )
        with torch.no_grad():
            model(*args, **kwargs)


def embed(
    model: nn.Module, rule: str = PAPER, *, example_inputs: Any = None, calibrate: bool = False, **scconv: Any
) -> EmbedResult:
    """Replace a network's 3x3 convolutions by ScConv.

    The paper's rule (its ResNets: section 4 and tables 1 and 5) takes, by the order in which a block's convolutions
    are registered, the 3x3 of each bottleneck (1x1, 3x3, 1x1) and the second 3x3 of each basic block (3x3, 3x3), if it
    keeps the number of channels and has no groups. A pattern takes whatever 3x3 it names. What ScConv cannot stand for
    is left by either, with its reason: depthwise and dilated convolutions, paddings other than 1 with zeros,
    subclasses, hooks, shared weights, channels that ScConv cannot hold, and, with example inputs, what the model does
    not call or does not run without.

    A stride is average pooling before ScConv, which itself keeps the size, rounded up as padding 1 does (7 -> 4). A
    change of channels is a 1x1 convolution between the two. A bias goes; ScConv has its own. A convolution registered
    in several places is replaced in all of them by one ScConv.

    What is put in is untrained, and ScConv's channel softmax makes its output small beside that of the convolution, so
    the network needs fine-tuning before it is worth anything. ``calibrate`` makes its gates matter before that.

    Args:
        model: is not changed, and shares nothing with the result.
        rule: ``paper``, or patterns over module paths, separated by commas: ``layer[34].*.conv2``. ``*`` matches dots.
        example_inputs: a tensor, a tuple of positional arguments, or a dictionary of named ones. With them the result
            is run (in eval mode), and multiply-adds are counted.
        calibrate: give every norm that keeps statistics, from the first ScConv on, those of the example inputs (best
            a batch of real images), and let none amplify by more than 8, as the zoo does. Trained statistics there are
            lost; they belonged to other inputs.
        scconv: arguments of :class:`~scconv_deploy.nn.ScConv`. Its initial values come from torch's generator.

    Raises:
        UsageError: a pattern that names no convolution, or ``calibrate`` without example inputs.
        ModelError: nothing could be replaced, with the first reason; or the model does not run.
    """
    example = None if example_inputs is None else Example.of(example_inputs)
    return embed_on(model, rule, example, calibrate, scconv)


def embed_on(
    model: nn.Module, rule: str, example: Example | None, do_calibrate: bool, scconv: Mapping[str, Any]
) -> EmbedResult:
    """:func:`embed`, for arguments that are both positional and named."""
    start = time.perf_counter()
    if do_calibrate and example is None:
        raise UsageError("embed: calibrate needs example inputs.", "Give example_inputs, best a batch of real images.")
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper hides the modules
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("The model is TorchScript, which hides its modules.", "Give the eager nn.Module.")
    lazy = next((name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise ModelError(f"embed: {lazy} has no shape yet.", "Run the model once before.")
    plan = _Plan(model, rule, scconv)
    before = plan.run_before(example) if example is not None else None
    after = plan.run_after(example) if example is not None else None
    plan.require_some()
    embedded = plan.finished()
    calibrated: tuple[str, ...] = ()
    if do_calibrate and example is not None:
        calibrated = calibrate_norms(embedded, plan.replaced_paths, example)
    return EmbedResult(
        embedded,
        rule,
        tuple((path, _describe(convolution, new)) for path, (convolution, new) in plan.chosen.items()),
        tuple((path, plan.left[path]) for path in plan.order if path in plan.left),
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in embedded.parameters()),
        before,
        after,
        calibrated,
        time.perf_counter() - start,
    )


class _Plan:
    """Replacements and convolutions to leave; running the model moves some from the first to the second."""

    def __init__(self, model: nn.Module, rule: str, scconv: Mapping[str, Any]) -> None:
        self._model = model
        self._rule = rule
        self.chosen: dict[str, tuple[Convolution, nn.Module]] = {}
        self.left: dict[str, str] = {}
        considered = _considered(model, rule)
        self.order = [convolution.path for convolution, _ in considered]
        self._wanted = {convolution.path for convolution, reason in considered if reason is None}
        for convolution, reason in considered:
            if reason is None:
                try:
                    self.chosen[convolution.path] = convolution, _replacement(convolution.module, scconv)
                except ConfigurationError as error:
                    reason = error.message
            if reason is not None:
                self.left[convolution.path] = reason

    @property
    def replaced_paths(self) -> list[str]:
        return [convolution.paths[0] for convolution, _ in self.chosen.values()]

    def run_before(self, example: Example) -> int:
        """Run the original; leave convolutions that it does not call; count its multiply-adds."""
        probe = replace_modules(self._model, {}).eval()
        modules = {path: probe.get_submodule(c.paths[0]) for path, (c, _) in self.chosen.items()}
        try:
            called, multiply_adds = _run(probe, modules, example)
        except Exception as error:  # the user's own code
            name = type(self._model).__name__
            raise ModelError(f"{name} refuses its inputs: {_first_line(error)}", "Give another --input.") from error
        uncalled = "the model does not call it (an unused branch, or another module reads its weight)"
        self._leave(dict.fromkeys(set(self.chosen) - called, uncalled))
        return multiply_adds

    def run_after(self, example: Example) -> int | None:
        """Run the embedded model; leave convolutions without which it does not run; count its multiply-adds."""
        while self.chosen:
            modules = {path: new for path, (_, new) in self.chosen.items()}
            try:
                called, multiply_adds = _run(self._embedded(self.chosen).eval(), modules, example)
                reasons = dict.fromkeys(set(modules) - called, "the model calls it through a reference of its own")
            except Exception as error:  # the user's own code, which does not get along with one of them: which?
                reasons = self._misfits(example)
                if not reasons:
                    name = type(self._model).__name__
                    raise ModelError(
                        f"{name} does not run with ScConv in it: {_first_line(error)}", "Name fewer by a pattern."
                    ) from error
            if not reasons:
                return multiply_adds
            self._leave(reasons)
        return None

    def require_some(self) -> None:
        if self.chosen:
            return
        path, reason = next(iter(self.left.items()), (type(self._model).__name__, "it has no 3x3 convolution"))
        remedy = "Leave it out."
        wanted = next((p for p in self.left if p in self._wanted), None)
        other = next((p for p, why in self.left.items() if why.endswith(blocks.BY_PATTERN)), None)
        if wanted is not None:
            path, reason, remedy = wanted, self.left[wanted], "Name others, or change ScConv's arguments."
        elif other is not None:
            path, reason, remedy = other, self.left[other], f"Name what to replace, for example --embed {other!r}."
        raise ModelError(
            f"embed {self._rule!r}: nothing was replaced, {len(self.left)} were left; {path}: {reason.rstrip('.')}.",
            remedy,
        )

    def finished(self) -> nn.Module:
        """The result, with tensors of its own and each ScConv in the mode of the module that it replaces."""
        for convolution, new in self.chosen.values():
            new.train(convolution.module.training)
        return self._embedded(self.chosen, share_tensors=False)

    def _embedded(self, chosen: Mapping[str, tuple[Convolution, nn.Module]], share_tensors: bool = True) -> nn.Module:
        replacements = {id(convolution.module): new for convolution, new in chosen.values()}
        return replace_modules(self._model, replacements, share_tensors=share_tensors)

    def _misfits(self, example: Example) -> dict[str, str]:
        reasons = {}
        for path, pair in self.chosen.items():
            try:
                example.run(self._embedded({path: pair}).eval())
            except Exception as error:  # see run_after
                reasons[path] = f"the model does not run with ScConv there: {_first_line(error)}"
        return reasons

    def _leave(self, reasons: Mapping[str, str]) -> None:
        for path, reason in reasons.items():
            self.left[path] = reason
            del self.chosen[path]


# --- which ones --------------------------------------------------------------------------------------------------


def _considered(model: nn.Module, rule: str) -> list[tuple[Convolution, str | None]]:
    """Every 3x3, and others that a pattern names, with the reason to leave it, or None."""
    convolutions = blocks.find_convolutions(model)
    if rule == PAPER:
        return [(c, c.obstacle or blocks.against_the_paper(c)) for c in convolutions if blocks.is_3x3(c)]
    patterns = [pattern.strip() for pattern in rule.split(",") if pattern.strip()]
    considered: list[tuple[Convolution, str | None]] = []
    for convolution in convolutions:
        if blocks.is_named(convolution, patterns):
            considered.append((convolution, blocks.against_the_pattern(convolution) or convolution.obstacle))
        elif blocks.is_3x3(convolution):
            considered.append((convolution, _UNNAMED))
    if all(reason == _UNNAMED for _, reason in considered):
        raise _no_match(rule, [convolution.path for convolution, _ in considered])
    return considered


def _no_match(rule: str, paths: list[str]) -> UsageError:
    near = difflib.get_close_matches(rule, paths, n=_NEAR_MATCHES, cutoff=0.0)
    hint = f"The nearest are {', '.join(near)}." if near else "The model has no 3x3 convolution."
    return UsageError(f"embed {rule!r} is not {PAPER!r} and names no convolution of the model.", hint)


# --- what stands there now ---------------------------------------------------------------------------------------


def _replacement(conv: nn.Conv2d, scconv: Mapping[str, Any]) -> nn.Module:
    """``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``, as the 3x3."""
    layers: list[nn.Module] = []
    if conv.stride != (1, 1):
        rows, columns = conv.stride
        layers.append(nn.AvgPool2d((rows, columns), (rows, columns), ceil_mode=True))
    if conv.in_channels != conv.out_channels:
        layers.append(nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False))
    layers.append(ScConv(conv.out_channels, **scconv))
    new = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
    return new.to(conv.weight.device, conv.weight.dtype)


def _describe(convolution: Convolution, new: nn.Module) -> str:
    conv = convolution.module
    stride = "" if conv.stride == (1, 1) else f", stride {conv.stride[0]}x{conv.stride[1]}"
    groups = "" if conv.groups == 1 else f", {conv.groups} groups"
    bias = "" if conv.bias is None else ", with a bias"
    names = {
        nn.AvgPool2d: "average pooling",
        nn.Conv2d: f"1x1 {conv.in_channels} -> {conv.out_channels}",
        ScConv: f"ScConv {conv.out_channels}",
    }
    now = ", ".join(names[type(layer)] for layer in (new if isinstance(new, nn.Sequential) else [new]))
    also = f" (also at {', '.join(convolution.paths[1:])})" if len(convolution.paths) > 1 else ""
    return f"3x3 {conv.in_channels} -> {conv.out_channels}{stride}{groups}{bias}: {now}{also}"


# --- running it --------------------------------------------------------------------------------------------------


def _run(model: nn.Module, watched: Mapping[str, nn.Module], example: Example) -> tuple[set[str], int]:
    """Run a model; return the watched modules that were called, and the multiply-adds of one sample."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path)) for path, module in watched.items()
    ]
    try:
        with FlopCounterMode(display=False) as counter:  # two operations for each multiply-add
            example.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return called, counter.get_total_flops() // 2 // example.batch


def calibrate_norms(model: nn.Module, after: Iterable[str], example: Example) -> tuple[str, ...]:
    """Set running statistics to those of the example inputs, in norms from the first of some modules on.

    Each takes mean and unbiased variance of its own input just before it runs, so those behind it see its new output;
    frozen norms, which never train, do too. The variance is at least 1/64: no norm amplifies by more than 8 (see
    :func:`scconv_deploy.zoo.layers.initialize`). A norm that runs twice keeps those of its first run.

    Args:
        model: is changed.
        after: paths of modules; norms that run before all of them keep their statistics.

    Returns:
        The paths of those norms, in the order in which they ran.

    Raises:
        ModelError: a norm gets one value for a channel, which has no variance.
    """
    calibrated: list[str] = []
    begun: list[bool] = []

    def take(module: nn.Module, args: tuple[Any, ...], path: str) -> None:
        if not begun or path in calibrated:
            return
        x = args[0]
        if x.numel() <= x.shape[1]:
            raise ModelError(f"embed: norm {path} gets one value a channel.", "Calibrate on a batch of at least 2.")
        dims = [d for d in range(x.dim()) if d != 1]
        module.running_mean.copy_(x.mean(dims))  # type: ignore[operator]
        module.running_var.copy_(x.var(dims).clamp(min=LARGEST_GAIN**-2))  # type: ignore[operator]
        calibrated.append(path)

    handles = [model.get_submodule(path).register_forward_hook(lambda *_: begun.append(True)) for path in after]
    handles += [
        module.register_forward_pre_hook(lambda module, args, path=path: take(module, args, path))
        for path, module in model.named_modules()
        if all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        example.run(model.eval())
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return tuple(calibrated)


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / before - 1:+.1%})" if before else f"{before:,} -> {after:,}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
