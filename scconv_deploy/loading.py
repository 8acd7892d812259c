"""Weights and ScConv into a network that was built, in the order that fits the weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from scconv_deploy import signature as signatures
from scconv_deploy.errors import UsageError
from scconv_deploy.spec import ModelSpec, source_kind
from scconv_deploy.weights import load_state, read_state_dict, without_wrapper
from scconv_deploy.zoo.embed import EmbedResult, Example, embed_on


def weigh_and_embed(model: nn.Module, spec: ModelSpec, noted: list[str]) -> tuple[nn.Module, EmbedResult | None]:
    """Load ``spec.weights`` and follow ``spec.embed``.

    Weights that hold a ScConv where the network has a convolution (``conv2.SRU.gn.gamma``) are those of the embedded
    network and load after embedding, any others before. ``strict`` is judged against the network that they load into.

    Args:
        model: in eval mode, float32, on the CPU; the weights may be loaded into it.
        noted: gets a line on what of the weights was missing or unexpected, empty if nothing was.

    Returns:
        The model to use, and what was embedded.

    Raises:
        UsageError, ModelError, IntegrityError, UntrustedError: see :func:`scconv_deploy.spec.load` and
            :func:`scconv_deploy.embed`.
    """
    state = None if spec.weights is None else read_state_dict(spec.weights, spec.trust_checkpoint)
    if spec.embed is None or state is None:
        after = False
    else:
        after = _holds_scconv(without_wrapper(state, set(model.state_dict())), model)
    if after and spec.embed is not None and spec.embed.calibrate:
        raise UsageError(
            f"--embed: {spec.weights} holds weights of the embedded network, with its statistics.",
            "Leave calibrate out.",
        )
    if state is not None and spec.weights is not None and not after:
        noted.append(load_state(model, state, spec.weights, spec.source, strict=spec.strict))
    embedded = _embed(model, spec)
    if embedded is None:
        return model, None
    if state is not None and spec.weights is not None and after:
        noted.append(load_state(embedded.model, state, spec.weights, spec.label, strict=spec.strict))
        embedded = replace(embedded, untrained=False)
    return embedded.model, embedded


def _holds_scconv(keys: Iterable[str], model: nn.Module) -> bool:
    """Whether a key lies below a convolution, which itself has no modules."""
    own = set(model.state_dict())
    convolutions = {path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for key in keys:
        parts = key.split(".")
        if key not in own and any(".".join(parts[:n]) in convolutions for n in range(1, len(parts))):
            return True
    return False


def _embed(model: nn.Module, spec: ModelSpec) -> EmbedResult | None:
    if spec.embed is None:
        return None
    example = None
    if spec.inputs or source_kind(spec.source) == "zoo":
        signature = signatures.from_specs(model, spec.resolved().inputs, spec.dynamic, spec.seed)
        example = Example(signature.args, signature.kwargs)
    return embed_on(model, spec.embed.rule, example, spec.embed.calibrate, spec.embed.scconv)
