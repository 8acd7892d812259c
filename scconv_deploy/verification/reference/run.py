"""Reference results for one sample as NumPy arrays: outputs, masks, noise floors.

They come from PyTorch (:mod:`.pytorch`), from a bundle's ``reference/`` (:mod:`.workflows.verify`) or from an ONNX file
(:mod:`.onnx_file`). The checks do not depend on the source.
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
    """Expected content of one SRU node.

    Attributes:
        name: name of the node.
        path: path of the module; several calls share it.
        variant: variant, as text.
        operator: operator of the domain ``scconv``.
        parameters: parameters in the operator's order, float32 ``[C]`` each.
        attributes: attributes of the node.
        straddle: whether groups straddle channels.
        form: parameters of the margins.
        weight_error: largest relative error of the gate weight in another order of sum(gamma); 0 if unknown.
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
    """Reference results of one SRU call.

    Attributes:
        x: input of the gates, float32 ``[N, C, H, W]``; None if not kept.
        mask: mask of the reference, bool ``[N, C, H, W]``.
        floor: noise of x, relative L2, see :mod:`.noise`; None if not measured.
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
    """Reference results for one sample.

    Attributes:
        sample: name of the sample.
        inputs: inputs by name.
        given: outputs of the model as given.
        outputs: outputs of the swapped model, with the gates of ``sites``.
        as_given: outputs of the swapped model with the gates of the model as given.
        floors: noise of each output, see :mod:`.noise` and :func:`.metrics.distance`; None if not measured.
        sites: SRU calls by site, in order.
        swapped_flips, swapped_distance: flips and largest distance of each SRU as given (by path) from its variant.
        non_finite: tensors of the reference with NaN or Inf, as text.
        float64_refusal: why the noise was measured without float64; "" if it was not.
        labels: of the rows, see :class:`.data.blocks.Block`; None without labels.
        kind: name for all samples of this kind; "" if the sample has its own.
        count: number of rows that count; a padded last batch has fewer than it holds.
        deep: whether the sample is judged in full. Else only gates, end-to-end outputs and answers are compared:
            ``outputs`` and ``as_given`` are those of the model as given, and there are no floors.
        others: gates of no known SRU by name, in the order of calls; only in a deep run.
        spread: factor by which equally right runs scatter, see :attr:`.noise.Floors.spread`.
        continuous: whether larger disturbances moved the values in proportion; tested only if the noise is large.
        part_floors: noise of parts of outputs by name, see :func:`.metrics.parts`; empty if not measured.
        unquantized: outputs of the float model, where this is a run with fake quantisation; else empty.
        unquantized_masks: masks of the same by site.
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
    part_floors: Mapping[str, float] = field(default_factory=dict)
    unquantized: Arrays = field(default_factory=dict)
    unquantized_masks: Arrays = field(default_factory=dict)

    @property
    def description(self) -> str:
        shapes = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in self.inputs.items())
        return f"{self.sample}: {shapes}"

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """Masks of all SRUs by site, and decisions of other gates by name."""
        return {name: site.mask for name, site in self.sites.items()} | masks_of(self.others)

    def feeds(self, wanted: Iterable[str]) -> dict[str, np.ndarray]:
        """Inputs of a model with injected gates: the sample's inputs, and the masks that the model takes."""
        masks = {mask_input(site): mask for site, mask in self.masks.items()}
        return {**self.inputs, **{name: masks[name] for name in wanted if name in masks}}


@dataclass(frozen=True, eq=False)
class RoundedRun:
    """Reference results for one sample with every value rounded to half, with the gates of the float32 run.

    Attributes:
        outputs: outputs by name, float32 arrays of half values.
        floors: noise of each output, the largest distance of other right roundings; None if not measured.
        inputs: inputs of gates by site; empty if not kept.
        input_floors: noise of the inputs of gates by site.
        spread: as in :class:`ReferenceRun`.
        part_floors: as in :class:`ReferenceRun`; the parts are those of the float32 run's outputs.
        others: gates of no known SRU with their rounded margins and the noise of the margins, where it is known.
    """

    outputs: Arrays
    floors: Mapping[str, float | None]
    inputs: Arrays = field(default_factory=dict)
    input_floors: Mapping[str, float] = field(default_factory=dict)
    spread: float = 1.0
    others: Mapping[str, OtherGate] = field(default_factory=dict)
    part_floors: Mapping[str, float] = field(default_factory=dict)


class ReferenceSource(Protocol):
    """Reference that can be run on samples.

    Attributes:
        name: name of the model.
        left_alone: candidates that were not recognised.
        swapped_link: why the link from the given to the swapped model is not run; "" if it is.
        is_float32_form: whether it is the float32 form of a half artifact, which is then not judged again.
        recognised: whether any SRU was recognised.
        weights: weights of the model by name, for the static check; empty if not available.
        rounds_to_codes: whether layers are fake-quantised, and :meth:`free_noise` moves their codes too.
    """

    @property
    def rounds_to_codes(self) -> bool: ...

    @property
    def name(self) -> str: ...

    @property
    def left_alone(self) -> tuple[Refusal, ...]: ...

    @property
    def swapped_link(self) -> str: ...

    @property
    def is_float32_form(self) -> bool: ...

    @property
    def recognised(self) -> bool: ...

    @property
    def weights(self) -> Arrays: ...

    def run(self, sample: object) -> ReferenceRun: ...

    def redundant(self, run: ReferenceRun, missing: Sequence[str], present: Sequence[str]) -> dict[str, str]:
        """Sites missing in an artifact that need no node -> reason."""
        ...

    def sru(self, site: Site, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Output and mask of the reference's SRU on any input; None if not available."""
        ...

    def free_noise(self, run: ReferenceRun, rounding: str) -> Mapping[str, float]:
        """Change of each output caused by flips that rounding explains (:func:`.metrics.distance`).

        Args:
            rounding: ``float32``, ``float16`` or ``bfloat16``.

        Returns:
            Relative L2 by output; empty if the reference cannot be disturbed.
        """
        ...

    def jumps(self, run: ReferenceRun, free: Sequence[str], data: str) -> Mapping[str, float]:
        """Change of each output, and of each SRU's input by site, under rounding if some gates are not fixed.

        Args:
            free: names of the gates that are not fixed, of SRUs too; the others keep their decisions in this run.
            data: dtype whose rounding moves the inputs.

        Returns:
            Relative L2, finite; empty if the reference cannot be disturbed, or is random.
        """
        ...

    def between(self, run: ReferenceRun, outputs: Arrays) -> tuple[Arrays, Arrays] | None:
        """Run the sample with these tensors in place of the SRUs' outputs.

        Args:
            outputs: output of every SRU by site, float32 ``[N, C, H, W]``.

        Returns:
            The input of each SRU by site, and the model's outputs; None if the reference cannot start from there.
        """
        ...

    def between_noise(self, run: ReferenceRun, outputs: Arrays, rounding: str) -> tuple[Arrays, Arrays] | None:
        """:meth:`between` with the codes of quantisers moved by rounding: change of its results, relative L2 by name.

        Args:
            rounding: as for :meth:`free_noise`.
        """
        ...

    def rounded(self, run: ReferenceRun, artifact: Any, data: str) -> RoundedRun | None:
        """Run the sample in the arithmetic of a half file (float16 or bfloat16); None if not available.

        Args:
            artifact: the half file, for a reference that reads from it which values are rounded.
        """
        ...

    def modules(self, run: ReferenceRun, paths: Sequence[str]) -> Iterator[tuple[str, int, np.ndarray, float | None]]:
        """Yield (path, call from 1, output, noise floor) of modules with this run's gates; nothing if not available."""
        ...
