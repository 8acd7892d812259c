"""3x3 convolutions of a network: the block of each, and the reason if ScConv cannot or should not replace it."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from scconv_deploy.gate.candidates import ROOT

BlockKind = Literal["bottleneck", "basic, second", "basic, first", "stem", "none"]

BY_PATTERN = "a pattern replaces it all the same"
"""End of the reasons that only the paper's rule gives."""


@dataclass(frozen=True, eq=False)
class Convolution:
    """A 3x3 convolution, or one that a pattern may name.

    Attributes:
        paths: every name that it is registered under; empty for a model that is one itself.
        module: an ``nn.Conv2d``, or whatever else has kernel, input and output channels.
        block: where it stands.
        obstacle: why ScConv cannot take its place whatever the rule, or None.
    """

    paths: tuple[str, ...]
    module: Any
    block: BlockKind
    obstacle: str | None

    @property
    def path(self) -> str:
        """Its name in messages."""
        return self.paths[0] or ROOT


def find_convolutions(model: nn.Module) -> list[Convolution]:
    """Every two-dimensional convolution of a model, by whichever class, in the order of registration."""
    paths: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        if _kernel(module) is not None:
            paths[id(module)].append(path)
    modules = {path: module for path, module in model.named_modules() if id(module) in paths}
    owners = _owners(model)
    blocks = _Blocks(model, modules)
    return [
        Convolution(
            tuple(paths[id(module)]),
            module,
            blocks.kind(path),
            _obstacle(module, [model.get_submodule(parent) for parent in _ancestors(path)], path, owners),
        )
        for path, module in modules.items()
    ]


def is_3x3(convolution: Convolution) -> bool:
    """Whether the convolution is a 3x3 that ScConv can replace."""
    return _kernel(convolution.module) == (3, 3)


def against_the_paper(convolution: Convolution) -> str | None:
    """The reason why the paper's rule leaves a 3x3, or None. It takes a bottleneck's, and a basic block's second."""
    conv = convolution.module
    if getattr(conv, "groups", 1) != 1:
        return f"{conv.groups} groups, which often makes it smaller than ScConv; {BY_PATTERN}"
    if convolution.block == "basic, first":
        return "the first 3x3 of a basic block; the paper's rule takes the second"
    if convolution.block == "stem":
        return "the stem, the network's first convolution"
    if convolution.block == "none":
        return f"in no bottleneck (1x1, 3x3, 1x1) or basic block (3x3, 3x3); {BY_PATTERN}"
    if conv.in_channels != conv.out_channels:
        return f"{conv.in_channels} channels in, {conv.out_channels} out, which needs a 1x1 more; {BY_PATTERN}"
    return None


def is_named(convolution: Convolution, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches; ``*`` matches dots too, and every name of a shared module counts."""
    return any(fnmatch.fnmatchcase(path or ROOT, pattern) for path in convolution.paths for pattern in patterns)


def against_the_pattern(convolution: Convolution) -> str | None:
    """The reason why a convolution that a pattern names is left, or None."""
    if not is_3x3(convolution):
        rows, columns = _kernel(convolution.module) or (0, 0)
        return f"its kernel is {rows}x{columns}, ScConv replaces 3x3"
    return None


# --- what any rule leaves ----------------------------------------------------------------------------------------


def _kernel(module: nn.Module) -> tuple[int, int] | None:
    """The kernel of a two-dimensional convolution of whatever class, else None; wrappers around one do not count."""
    if not isinstance(module, nn.Conv2d) and next(module.children(), None) is not None:
        return None
    kernel = getattr(module, "kernel_size", None)
    if not isinstance(getattr(module, "in_channels", None), int):
        return None
    if not isinstance(getattr(module, "out_channels", None), int):
        return None
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    return kernel if isinstance(kernel, tuple) and len(kernel) == 2 else None


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Parameter -> the modules that hold it, each once."""
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(path or ROOT)
    return owners


def _obstacle(module: Any, parents: Iterable[nn.Module], path: str, owners: dict[int, list[str]]) -> str | None:
    inside = next((type(p).__name__ for p in parents if type(p).__name__.lower() in ("scconv", "cru")), None)
    if inside is not None:
        return f"part of a {inside}"
    if type(module) is not nn.Conv2d:
        return f"a {type(module).__module__}.{type(module).__name__}, which may compute more than nn.Conv2d itself"
    if module._forward_hooks or module._forward_pre_hooks:
        return "forward hooks hang on it (weight_norm, pruning, a feature extractor)"
    shared = [o for p in module.parameters() for o in owners[id(p)] if o != (path or ROOT)]
    if shared:
        return f"it shares its weight with {', '.join(shared)}"
    if module.groups == module.in_channels and module.groups > 1:
        return "depthwise: ScConv mixes channels and is larger"
    if module.dilation != (1, 1):
        return f"dilation {module.dilation[0]}x{module.dilation[1]}: ScConv has none"
    if module.padding not in (1, (1, 1), "same"):
        return f"padding {module.padding}: ScConv keeps the size, as padding 1 does"
    if module.padding_mode != "zeros":
        return f"padding mode {module.padding_mode!r}: ScConv pads with zeros"
    return None


# --- the paper's blocks ------------------------------------------------------------------------------------------


class _Blocks:
    """A convolution's block is the innermost module around it that holds two convolutions; lists do not count."""

    def __init__(self, model: nn.Module, modules: dict[str, Any]) -> None:
        self._modules = modules
        self._first = next(iter(modules), None)
        self._inside: dict[str, list[str]] = defaultdict(list)
        for path in modules:
            for parent in _ancestors(path):
                self._inside[parent].append(path)
        self._lists = {
            p for p, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict, nn.ParameterList))
        }

    def kind(self, path: str) -> BlockKind:
        conv = self._modules[path]
        inside = self._inside.get(self._block(path), [path])
        spatial = [p for p in inside if _kernel(self._modules[p]) != (1, 1)]
        alone = all(self._block(p) == self._block(path) for p in spatial)  # else it holds blocks and is none itself
        if alone and all(_kernel(self._modules[p]) == (3, 3) for p in spatial):
            if len(spatial) == 1 and self._has_1x1_around(conv, path, inside):
                return "bottleneck"
            if len(spatial) == 2 and self._modules[spatial[0]].out_channels == self._modules[spatial[1]].in_channels:
                return "basic, first" if path == spatial[0] else "basic, second"
        return "stem" if path == self._first else "none"

    def _block(self, path: str) -> str:
        around = (p for p in _ancestors(path) if p not in self._lists and len(self._inside[p]) > 1)
        return next(around, "")

    def _has_1x1_around(self, conv: Any, path: str, inside: list[str]) -> bool:
        """Whether a 1x1 makes the convolution's input and another takes its output."""
        at = inside.index(path)
        before = any(self._modules[p].out_channels == conv.in_channels for p in inside[:at])
        return before and any(self._modules[p].in_channels == conv.out_channels for p in inside[at + 1 :])


def _ancestors(path: str) -> Iterator[str]:
    """The paths around a path, innermost first; the model itself is the empty one."""
    while path:
        path = path.rpartition(".")[0]
        yield path
