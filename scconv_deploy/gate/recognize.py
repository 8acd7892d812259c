"""Find SRUs in any model: candidates by structure, the variant by behaviour.

All code in the wild shares attribute names and differs in meaning, so a name proves nothing. A candidate that behaves
like no known variant stays as it is, with the reason: nothing is fused on a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scconv_deploy.gate.candidates import ROOT, ConvPlace, PointwiseConv, find_candidates, has_hooks, record_inputs
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.hypotheses import Hypothesis, small_numbers
from scconv_deploy.gate.identify import identify
from scconv_deploy.gate.threads import one_thread
from scconv_deploy.gate.trial_run import NotIdentifiedError
from scconv_deploy.records.gates import Refusal


@dataclass(frozen=True, eq=False)
class RecognizedSRU:
    """One SRU of the model.

    Attributes:
        path: its name in the model; ``paths`` holds every name it is registered under.
        module: the module itself.
        gate: its variant with gamma and beta.
        conv: a convolution of kernel size 1 inside the module; ``conv_place`` says where it stands.
    """

    path: str
    paths: tuple[str, ...]
    module: nn.Module
    gate: Gate
    conv: PointwiseConv | None = None
    conv_place: ConvPlace = "none"


@dataclass(frozen=True, eq=False)
class Recognition:
    """SRUs and refused candidates of a model, in its order."""

    srus: tuple[RecognizedSRU, ...] = ()
    refused: tuple[Refusal, ...] = ()


def recognize(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 0) -> Recognition:
    """Find the SRUs of a model.

    Args:
        model: in eval mode, float32, on the CPU.
        args, kwargs: example inputs; the model is run on them once, to learn the shapes that reach each candidate.
        seed: of the probe inputs.
    """
    # the model may write into what it is given
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    return recognize_in_run(model, lambda m: m(*args, **kwargs), seed)


def recognize_in_run(model: nn.Module, run: Callable[[nn.Module], object], seed: int = 0) -> Recognition:
    """Find the SRUs of a model as :func:`recognize` does.

    Args:
        run: runs the model once on its example inputs; what it raises passes through.
    """
    candidates = list(find_candidates(model))
    inputs = record_inputs(model, [c.module for c in candidates], run)
    accepted: list[RecognizedSRU] = []
    refused: list[Refusal] = []
    remembered: dict[tuple[type, frozenset[float]], Hypothesis] = {}
    for candidate in candidates:
        if any(_is_inside(candidate.path, found.path) for found in accepted):
            continue
        try:
            x = inputs.get(id(candidate.module), "it is never called on the example input")
            if has_hooks(candidate):
                x = "it has forward hooks, which would be lost"
            if isinstance(x, str):
                raise NotIdentifiedError(x)
            kind = type(candidate.module), small_numbers(candidate.module)
            with one_thread():
                found = identify(candidate, x, seed, remembered.get(kind))
        except NotIdentifiedError as error:
            refused.append(Refusal(candidate.path, error.reason))
            continue
        hypothesis = found.hypothesis
        remembered[kind] = hypothesis
        accepted.append(
            RecognizedSRU(
                path=candidate.path,
                paths=tuple(n or ROOT for n, m in model.named_modules(remove_duplicate=False) if m is candidate.module),
                module=candidate.module,
                gate=found.gate,
                conv=candidate.conv if hypothesis.conv_place != "none" else None,
                conv_place=hypothesis.conv_place,
            )
        )
    return Recognition(tuple(accepted), tuple(r for r in refused if _worth_telling(r, refused, accepted)))


def _is_inside(path: str, outer: str) -> bool:
    return path != outer and (outer == ROOT or path.startswith(outer + "."))


def _worth_telling(refusal: Refusal, refused: list[Refusal], accepted: list[RecognizedSRU]) -> bool:
    """Whether to report a refusal: not inside another refused module, and not around an accepted SRU."""
    return not any(_is_inside(refusal.path, other.path) for other in refused) and not any(
        _is_inside(found.path, refusal.path) for found in accepted
    )
