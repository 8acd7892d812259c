"""Weights and ScConv into a network that was built, in the order that fits the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from scconv_deploy import signature as signatures
from scconv_deploy.errors import UsageError
from scconv_deploy.initialisation import RandomParameters
from scconv_deploy.spec import ModelSpec, source_kind
from scconv_deploy.weights import read_entries
from scconv_deploy.weights_fit import Entry, Expected, fits
from scconv_deploy.weights_load import LoadedWeights, listed, load_entries
from scconv_deploy.zoo.embed import EmbedResult, Example, embed_on


@dataclass(frozen=True)
class LoadRecord:
    """How a model came by its numbers.

    Attributes:
        weights: what was loaded of ``spec.weights``.
        embedded: what ``spec.embed`` did.
        random: what of the parameters nobody trained.
    """

    weights: LoadedWeights | None
    embedded: EmbedResult | None
    random: RandomParameters

    @property
    def applied(self) -> tuple[str, ...]:
        """What was loaded, and what of the parameters is random, one line each."""
        lines = (self.weights.summary,) if self.weights else ()
        return (*lines, f"weights: {self.random}") if self.random.random else lines

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """(what, which) of the weights that were not loaded or not used."""
        if self.weights is None:
            return ()
        left = self.weights.left
        if self.random.random:
            left = (*left, ("parameters that stay at their random initialisation", listed(self.random.names)))
        return tuple((f"weights {self.weights.path}: {what}", which) for what, which in left)

    @property
    def notice(self) -> str:
        """What was read from the weights and what was not, in one line; "" without weights."""
        if self.weights is None:
            return ""
        left = [f"{what}: {which}" for what, which in self.weights.left]
        random = [f"{self.random}, in {listed(self.random.names)}"] if self.random.random else []
        return "; ".join([self.weights.summary, *left, *random])


def weigh_and_embed(model: nn.Module, spec: ModelSpec) -> tuple[nn.Module, LoadedWeights | None, EmbedResult | None]:
    """Load ``spec.weights`` and follow ``spec.embed``.

    Weights that hold a ScConv where the network has a convolution (``conv2.SRU.gn.gamma``) are those of the embedded
    network and load after embedding, any others before. ``strict`` is judged against the network that they load into.

    Args:
        model: in eval mode, float32, on the CPU; the weights may be loaded into it.

    Returns:
        The model to use, what was loaded, and what was embedded.

    Raises:
        UsageError, ModelError, IntegrityError, UntrustedError: see :func:`scconv_deploy.spec.load` and
            :func:`scconv_deploy.embed`.
    """
    entries = None if spec.weights is None else read_entries(spec.weights, spec.trust_checkpoint)
    after = spec.embed is not None and entries is not None and _of_embedded(entries, model, spec.weights_key)
    if after and spec.embed is not None and spec.embed.calibrate:
        raise UsageError(
            f"--embed: {spec.weights} holds weights of the embedded network, with its statistics.",
            "Leave calibrate out.",
        )
    loaded = None
    if not after:
        loaded = _weigh(model, entries, spec, spec.source)
    embedded = _embed(model, spec)
    if embedded is None:
        return model, loaded, None
    if after:
        loaded = _weigh(embedded.model, entries, spec, spec.label)
        embedded = replace(embedded, untrained=False)
    return embedded.model, loaded, embedded


def _weigh(model: nn.Module, entries: Sequence[Entry] | None, spec: ModelSpec, owner: str) -> LoadedWeights | None:
    if entries is None or spec.weights is None:
        return None
    return load_entries(model, entries, spec.weights, owner, strict=spec.strict, key=spec.weights_key)


def _of_embedded(entries: Sequence[Entry], model: nn.Module, key: str | None) -> bool:
    """Whether weights are those of the embedded network, by the names of what fits best or else of anything."""
    ways = fits(entries, Expected.of(model), key)
    if ways:
        return _holds_scconv(ways[0].inside, model)
    names = [name.split(".") for entry in entries for name in entry.tensors]
    return _holds_scconv((".".join(parts[n:]) for parts in names for n in range(len(parts))), model)


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
