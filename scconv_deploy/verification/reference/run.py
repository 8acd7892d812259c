"""What a reference leaves behind of one sample: everything that an artifact is held against, as NumPy arrays.

It comes from PyTorch (:mod:`.pytorch`), from a bundle's ``reference/`` (:mod:`.workflows.verify`) or from another ONNX
file (:mod:`.onnx_file`); what judges the artifact does not know which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from scconv_deploy.gate.margins import GateForm
from scconv_deploy.gate.other_gates import OtherGate, masks_of
from scconv_deploy.graph.contract import mask_input
from scconv_deploy.records.gates import FlipCount, Refusal

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Site:
    """What the node of one SRU must hold.

    Attributes:
        name: of the node; ``path`` of its module, shared by several calls.
        variant: in words; ``operator`` of the domain ``scconv``.
        parameters: of the node in the operator's order, float32 ``[C]`` each.
        attributes: of the node.
        straddle: whether groups straddle channels.
        form: what its margins depend on.
        weight_error: how far, relatively, the gate weight in another order of sum(gamma) can be off; 0 if unknown.
    """

    name: str
    path: str
    variant: str
    operator: str
    parameters: Arrays
    attributes: Mapping[str, int | float | str]
    straddle: bool
    form: GateForm
    weight_error: float = 0.0


@dataclass(frozen=True, eq=False)
class SiteRun:
    """One call of an SRU.

    Attributes:
        x: the gate's input, float32 ``[N, C, H, W]``; None where it was not kept.
        mask: what the reference decided, bool ``[N, C, H, W]``.
        floor: noise of x, relative L2, see :mod:`.noise`; None if it was not measured.
    """

    site: Site
    x: np.ndarray | None
    mask: np.ndarray
    floor: float | None = None

    @cached_property
    def finite(self) -> bool:
        """Whether x was kept and holds neither NaN nor infinity."""
        return self.x is not None and bool(np.isfinite(self.x).all())


@dataclass(frozen=True, eq=False)
class ReferenceRun:
    """One sample.

    Attributes:
        sample: its name.
        inputs: by name.
        given: outputs of the model as given; ``outputs`` of the same with its SRUs swapped, with the gates of
            ``sites``; ``as_given`` of the swapped one with the gates of the given one.
        floors: noise of every output, see :mod:`.noise` and :func:`.metrics.distance`; None where it was not measured.
        sites: in the order of their calls.
        swapped_flips, swapped_distance: each SRU as given (by path) against its variant.
        non_finite: tensors of the reference with NaN or Inf, in words.
        float64_refusal: why float64 is not among the runs whose distance is the noise.
        labels: int64 ``[N]``, -1 where there is none; None without labels.
        kind: what samples like this one are called together; "" for one of its own.
        count: rows that count; a last batch that was filled up has fewer than it holds.
        deep: whether it is judged in full. Else it runs free: the gates, the outputs as they are and the answers are
            compared; ``outputs`` and ``as_given`` are those of the model as given, and there are no floors.
        others: gates of no known SRU by name, in the order of their calls; of a deep run.
        spread: by which factor runs scatter that are all right, of the noise of one value.
        continuous: whether a larger disturbance was seen to move the values in proportion; tried where the noise is
            large.
    """

    sample: str
    inputs: Arrays
    given: Arrays
    outputs: Arrays
    as_given: Arrays
    floors: Mapping[str, float | None]
    sites: Mapping[str, SiteRun]
    swapped_flips: Mapping[str, FlipCount] = field(default_factory=dict)
    swapped_distance: float = 0.0
    non_finite: Sequence[str] = ()
    float64_refusal: str = ""
    labels: np.ndarray | None = None
    count: int = 0
    kind: str = ""
    deep: bool = True
    others: Mapping[str, OtherGate] = field(default_factory=dict)
    spread: float = 1.0
    continuous: bool = False

    @property
    def description(self) -> str:
        shapes = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in self.inputs.items())
        return f"{self.sample}: {shapes}"

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """Every gate's decisions, an SRU's by site."""
        return {name: site.mask for name, site in self.sites.items()} | masks_of(self.others)

    def feeds(self, wanted: Iterable[str]) -> dict[str, np.ndarray]:
        """The inputs of a model whose gates are injected: the sample's, and those masks that the model wants."""
        masks = {mask_input(site): mask for site, mask in self.masks.items()}
        return {**self.inputs, **{name: masks[name] for name in wanted if name in masks}}


@dataclass(frozen=True, eq=False)
class RoundedRun:
    """A sample in the reference with every value rounded as a half file does, with the gates of the float32 run.

    Attributes:
        outputs: by name, float32 arrays of half values.
        floors: noise of them: how far other right roundings are; None where it was not measured.
        inputs: of gates, by site; empty where they were not kept.
        input_floors: noise of them, by site.
        spread: as of :class:`ReferenceRun`.
        others: gates of no known SRU with their rounded margins, and the noise of those: how far other right roundings,
            and float32, are. Without those that it is not known of.
    """

    outputs: Arrays
    floors: Mapping[str, float | None]
    inputs: Arrays = field(default_factory=dict)
    input_floors: Mapping[str, float] = field(default_factory=dict)
    spread: float = 1.0
    others: Mapping[str, OtherGate] = field(default_factory=dict)


class ReferenceSource(Protocol):
    """A reference that can be run on samples.

    Attributes:
        name: of the model.
        left_alone: candidates that were not recognised.
        swapped_link: why the link from the given to the swapped model is not run; "" if it is.
        recognised: whether an SRU was.
        weights: of the model by name, for the static link; empty where they are not at hand.
    """

    @property
    def name(self) -> str: ...

    @property
    def left_alone(self) -> tuple[Refusal, ...]: ...

    @property
    def swapped_link(self) -> str: ...

    @property
    def recognised(self) -> bool: ...

    @property
    def weights(self) -> Arrays: ...

    def run(self, sample: object) -> ReferenceRun: ...

    def redundant(self, run: ReferenceRun, missing: Sequence[str], present: Sequence[str]) -> dict[str, str]:
        """Which of the sites that an artifact has no node for need none, with the reason."""
        ...

    def sru(self, site: Site, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The reference's own SRU on any input: output and gates; None where it is not at hand."""
        ...

    def free_noise(self, run: ReferenceRun, rounding: str) -> Mapping[str, float]:
        """How far changes of gates that rounding explains move the outputs, relative L2 (:func:`.metrics.distance`), of
        float32, float16 or bfloat16; nothing where the reference cannot be disturbed."""
        ...

    def jumps(self, run: ReferenceRun, free: Sequence[str], data: str) -> Mapping[str, float]:
        """How far the outputs, and the inputs of SRUs by site, move by rounding where gates are not fixed.

        Args:
            free: those gates, of SRUs too; the others decide what they decided in this run.
            data: the type whose rounding moves the inputs.

        Returns:
            relative L2, finite; nothing where the reference cannot be disturbed, or differs from itself.
        """
        ...

    def rounded(self, run: ReferenceRun, artifact: Any, data: str) -> RoundedRun | None:
        """The sample in the arithmetic of a half file (float16 or bfloat16); None where it is out of reach.

        Args:
            artifact: the file, for a reference that needs it to know what is rounded.
        """
        ...

    def modules(self, run: ReferenceRun, paths: Sequence[str]) -> Iterator[tuple[str, int, np.ndarray, float | None]]:
        """(path, call from 1, output, floor) of modules with this run's gates; nothing where they are out of reach."""
        ...
