"""What is measured of an artifact, sample by sample; :mod:`.judge` makes checks of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from scconv_deploy.errors import UsageError
from scconv_deploy.gate import FlipCount, Recognition, SwappedSRU, changed_gates, count_flips, relative_l2, site_name
from scconv_deploy.gate.variant import open_mask
from scconv_deploy.signature import Signature
from scconv_deploy.verification import instrument, tolerances
from scconv_deploy.verification.compare import OutputMetrics, comparable, compare, distance
from scconv_deploy.verification.detections import align_rows
from scconv_deploy.verification.runners.onnxruntime import OnnxRuntimeRunner
from scconv_deploy.verification.runners.pytorch import (
    Float64Replay,
    RecordedGate,
    record_gates,
    replay,
    run_as_given,
)
from scconv_deploy.verification.samples import Sample

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Reference:
    """The PyTorch side: the model as given, the same with its SRUs swapped, and how it is called."""

    name: str
    model: nn.Module
    swapped: nn.Module
    recognition: Recognition
    signature: Signature


@dataclass(frozen=True)
class AgainstNoise:
    """An output's distance and the reference's own rounding noise, see :func:`.compare.distance`."""

    error: float
    floor: float
    largest_floor: float

    @property
    def ratio(self) -> float:
        return self.error / self.floor


@dataclass
class Measured:
    """What accumulates over the samples.

    Attributes:
        swapped_flips, swapped_distance: each SRU as given against its variant, fed the same input.
        swapped_error, replay: of the sample with the worst ratio; the swapped model against the given one, and the
            artifact with the reference's gates against the swapped model.
        redundant: sites that the artifact has no node for and need none, with the reason.
        contract: where the artifact's outputs are not of the reference's order, shape or type.
    """

    swapped_flips: dict[str, FlipCount] = field(default_factory=dict)
    swapped_distance: float = 0.0
    swapped_error: dict[str, AgainstNoise] = field(default_factory=dict)
    teacher_forced: dict[str, FlipCount] = field(default_factory=dict)
    open_gates: dict[str, tuple[int, int]] = field(default_factory=dict)
    variants: dict[str, SwappedSRU] = field(default_factory=dict)
    redundant: dict[str, str] = field(default_factory=dict)
    end_to_end: dict[str, OutputMetrics] = field(default_factory=dict)
    replay: dict[str, AgainstNoise] = field(default_factory=dict)
    contract: list[str] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    float64_refusal: str = ""


class Measurement:
    """Runs samples through the reference and the artifact; a context manager, for it holds the artifact's sessions.

    Args:
        free: the artifact as it is.
    """

    def __init__(self, reference: Reference, proto: onnx.ModelProto, free: OnnxRuntimeRunner) -> None:
        self._reference, self._proto, self._free = reference, proto, free
        self._nodes = instrument.sites(proto)
        self._modules = {m.path: m for m in reference.swapped.modules() if isinstance(m, SwappedSRU)}
        self._float64 = Float64Replay(reference.swapped, reference.signature)
        self._probes: dict[str, OnnxRuntimeRunner | None] = {}
        self._forced: OnnxRuntimeRunner | None = None
        self.measured = Measured()

    def __enter__(self) -> Measurement:
        return self

    def __exit__(self, *exc: object) -> None:
        self._probes.clear()
        self._forced = None

    def run(self, sample: Sample) -> None:
        """Measure one sample.

        Raises:
            UsageError: the artifact's inputs or outputs are not the reference's.
            ModelError: ONNX Runtime or the reference cannot run it.
        """
        reference, signature = self._reference, self._reference.signature
        given_outputs, calls = run_as_given(reference.model, reference.recognition, signature, sample.tensors)
        _same_names("inputs", self._free.inputs, sample.tensors)
        _same_names("outputs", self._free.outputs, given_outputs)
        outputs, gates = record_gates(reference.swapped, signature, sample.tensors)
        masks = {site: gate.mask for site, gate in gates.items()}
        as_given = outputs
        given_masks = self._compare_swapped(calls)
        if given_masks:
            as_given = replay(reference.swapped, signature, sample.tensors, masks | given_masks)
        for site, gate in gates.items():
            if self._nodes and site not in self._nodes:
                self._note_redundancy(site, gates, sample, outputs)
            self._teacher_force(site, gate)
        arrays = _arrays(sample.tensors)
        free_outputs, forced_outputs = self._free.run(arrays), self._replay(arrays, masks)
        exact = self._float64_outputs(sample, masks)
        self._compare_outputs(
            sample, _arrays(given_outputs), _arrays(outputs), _arrays(as_given), free_outputs, forced_outputs,
            None if exact is None else _arrays(exact),
        )  # fmt: skip

    def _compare_outputs(
        self,
        sample: Sample,
        given: Arrays,
        swapped: Arrays,
        as_given: Arrays,
        free: Arrays,
        forced: Arrays,
        exact: Arrays | None,
    ) -> None:
        """Every output of the runs of one sample, by name."""
        as_given, free, forced = align_rows(as_given, given), align_rows(free, given), align_rows(forced, swapped)
        exact = None if exact is None else align_rows(exact, swapped)
        for name, value in swapped.items():
            if self._breaks_contract(name, free[name], given[name]):
                continue
            if not comparable(free[name], given[name]):
                self._note_non_finite(name, sample, free[name], given[name])
                continue
            _keep_worst_metrics(self.measured, name, compare(free[name], given[name]))
            ruler = None if exact is None else exact[name]
            _keep_worst(self.measured.swapped_error, name, _against_noise(as_given[name], given[name], value, ruler))
            _keep_worst(self.measured.replay, name, _against_noise(forced[name], value, value, ruler))

    def _compare_swapped(self, calls: Mapping[str, list[tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
        """Each SRU as given against its variant; returns the gates as given of those calls in which one differs."""
        given_masks: dict[str, Tensor] = {}
        for path, pairs in calls.items():
            swapped = self._modules[path]
            for call, (x, y) in enumerate(pairs, start=1):
                if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
                    self.measured.non_finite.append(f"the input or output of {site_name(path, call)} in PyTorch")
                    continue
                with torch.no_grad():
                    gate_input = swapped.conv(x) if swapped.conv is not None and swapped.conv_place == "before" else x
                    count, apart, mask = _compare_call(swapped, gate_input, x, y)
                self.measured.swapped_flips[path] = self.measured.swapped_flips.get(path, FlipCount(0)) + count
                self.measured.swapped_distance = max(self.measured.swapped_distance, apart)
                if mask is not None:
                    given_masks[site_name(path, call)] = mask
        return given_masks

    def _teacher_force(self, site: str, gate: RecordedGate) -> None:
        measured = self.measured
        measured.variants[site] = gate.swapped
        opened, total = measured.open_gates.get(site, (0, 0))
        measured.open_gates[site] = (opened + int(gate.mask.sum()), total + gate.mask.numel())
        if not torch.isfinite(gate.x).all():
            measured.non_finite.append(f"the input of {site}")
            return
        decided = self._gates(site, gate.x)
        if decided is None:
            return
        count = count_flips(decided != gate.mask, gate.x, gate.swapped.parameters_of_gate, gate.swapped.variant)
        measured.teacher_forced[site] = measured.teacher_forced.get(site, FlipCount(0)) + count

    def _gates(self, site: str, x: Tensor) -> Tensor | None:
        """The artifact's gates of a site for this x; None if it has no such site, or hides them."""
        if site not in self._probes:
            node = self._nodes.get(site)
            model = instrument.gate_probe(self._proto, node) if node is not None else None
            self._probes[site] = OnnxRuntimeRunner(model) if model is not None else None
        runner = self._probes[site]
        if runner is None:
            return None
        return torch.from_numpy(runner.run({instrument.PROBE_X: x.numpy()})[instrument.PROBE_OPEN])

    def _replay(self, arrays: Mapping[str, np.ndarray], masks: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The artifact's outputs with these gates at every site that it has."""
        if self._forced is None:
            self._forced = OnnxRuntimeRunner(instrument.with_injected_masks(self._proto, list(masks)))
        known = {instrument.mask_input(site): mask.numpy() for site, mask in masks.items()}
        return self._forced.run({**arrays, **{name: known[name] for name in self._forced.inputs if name in known}})

    def _note_redundancy(
        self, site: str, gates: Mapping[str, RecordedGate], sample: Sample, outputs: Mapping[str, Tensor]
    ) -> None:
        """Whether a site without a node needs none: an exporter merges equal calls and drops unused ones."""
        gate = gates[site]
        for other, twin in gates.items():
            same = other in self._nodes and twin.swapped.variant == gate.swapped.variant
            if same and torch.equal(twin.x, gate.x) and _same_parameters(twin.swapped, gate.swapped):
                self.measured.redundant[site] = f"{other} computes the same"
                return
        masks = {name: g.mask for name, g in gates.items()} | {site: ~gate.mask}
        inverted = replay(self._reference.swapped, self._reference.signature, sample.tensors, masks)
        if all(torch.equal(inverted[name], value) for name, value in outputs.items()):
            self.measured.redundant[site] = "no output depends on it"

    def _float64_outputs(self, sample: Sample, masks: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        try:
            return self._float64.run(sample.tensors, masks)
        except RuntimeError as error:  # the user's forward makes float32 tensors of its own
            reason = str(error).splitlines()[0]
            self.measured.float64_refusal = f"the reference cannot run in float64: {reason}"
            return None

    def _breaks_contract(self, name: str, actual: np.ndarray, expected: np.ndarray) -> bool:
        if actual.shape == expected.shape and actual.dtype == expected.dtype:
            return False
        found, wanted = (f"{a.dtype}{list(a.shape)}" for a in (actual, expected))
        self.measured.contract.append(f"output {name} is {found}, PyTorch's {wanted}")
        return True

    def _note_non_finite(self, name: str, sample: Sample, actual: np.ndarray, expected: np.ndarray) -> None:
        for whose, value in (("the reference's", expected), ("the artifact's", actual)):
            if not np.isfinite(value).all():
                self.measured.non_finite.append(f"{whose} output {name} on {sample.name}")


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _same_names(what: str, artifact: Iterable[str], reference: Iterable[str]) -> None:
    """In the same order too: programs that feed by position would mix them up."""
    if list(artifact) != list(reference):
        raise UsageError(
            f"The artifact's {what} are {', '.join(artifact)}; the reference's {', '.join(reference)}.",
            "Give the model that this artifact was exported from.",
        )


def _compare_call(
    swapped: SwappedSRU, gate_input: Tensor, x: Tensor, y: Tensor
) -> tuple[FlipCount, float, Tensor | None]:
    """One call of an SRU as given: flips against its variant, the distance elsewhere, and its gates if one differs."""
    expected = swapped(x)
    if swapped.conv_place == "after":  # a convolution mixes the channels, so gates cannot be read from the output
        return FlipCount(y.numel()), relative_l2(y, expected), None
    found = swapped.parameters_of_gate
    differs, apart = changed_gates(y, expected, gate_input, swapped.gamma, swapped.beta, swapped.variant)
    count = count_flips(differs, gate_input, found, swapped.variant)
    if not differs.any():
        return count, apart, None
    return count, apart, open_mask(gate_input, swapped.gamma, swapped.beta, swapped.variant) ^ differs


def _same_parameters(one: SwappedSRU, other: SwappedSRU) -> bool:
    return one is other or (torch.equal(one.gamma, other.gamma) and torch.equal(one.beta, other.beta))


def _against_noise(y: np.ndarray, expected: np.ndarray, value: np.ndarray, exact: np.ndarray | None) -> AgainstNoise:
    """A distance, beside that of PyTorch in float32 (value) from float64 with the same gates (exact)."""
    if value.dtype.kind == "f":
        smallest, largest = tolerances.SMALLEST_FLOOR.value, tolerances.LARGEST_FLOOR.value
        floor = tolerances.ASSUMED_FLOOR.value if exact is None else distance(value, exact)
    else:
        smallest, largest = tolerances.SMALLEST_SHARE.value, tolerances.LARGEST_SHARE.value
        floor = 0.0 if exact is None else distance(value, exact)
    # not max(), which would hide a floor that is not a number
    return AgainstNoise(distance(y, expected), smallest if floor < smallest else floor, largest)


def _keep_worst(kept: dict[str, AgainstNoise], name: str, found: AgainstNoise) -> None:
    worst = kept.get(name)
    if worst is None or not found.ratio <= worst.ratio:
        kept[name] = found


def _keep_worst_metrics(measured: Measured, name: str, metrics: OutputMetrics) -> None:
    worst = measured.end_to_end.get(name)
    if worst is None or metrics.relative_l2 > worst.relative_l2:
        measured.end_to_end[name] = metrics


def open_share(measured: Measured, site: str) -> float:
    """Share of a site's gates that are open in the reference."""
    opened, total = measured.open_gates[site]
    return opened / total


def total_flips(counts: Mapping[str, FlipCount]) -> FlipCount:
    """The sum over sites."""
    total = FlipCount(0)
    for count in counts.values():
        total = total + count
    return total


def repeated(messages: list[str]) -> str:
    """Each message once, with how often it came."""
    return "; ".join(f"{text} ({count} times)" if count > 1 else text for text, count in Counter(messages).items())
