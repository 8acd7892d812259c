"""PyTorch model as the reference: outputs, masks and noise floors for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.flips import changed_gates, relative_l2
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.other_gates import JUMP_DISTURBANCE, UNIT_ROUNDOFF, OtherGate
from scconv_deploy.gate.planes import as_planes
from scconv_deploy.gate.swap import SwappedSRU, site_name
from scconv_deploy.graph.nodes import variant_attributes
from scconv_deploy.model import steps
from scconv_deploy.model.float64 import Float64Replay
from scconv_deploy.model.prepare import Reference
from scconv_deploy.model.replay import (
    Disturbance,
    RecordedGate,
    all_finite,
    record_gates,
    record_modules,
    replay,
    run_as_given,
    run_between,
    run_disturbed,
)
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.rewrite.reader.variant import weight_error
from scconv_deploy.verification import metrics
from scconv_deploy.verification.detections import align_rows
from scconv_deploy.verification.reference.noise import NoiseRuns, disturbed_modules, followed
from scconv_deploy.verification.reference.rounding import RoundedRuns
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun, RoundedRun, Site, SiteRun
from scconv_deploy.verification.samples import Sample

_DRAWS = 8
_JUMP_DRAWS = 8
_JUMP_NOISES = 4
"""Disturbance of the margin of a gate that is not fixed, in multiples of its noise."""
_DISTURBANCE = {"float32": 2.0**-18, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Disturbance of a gate's input relative to its rms, by dtype. In float32, ten times the error in a healthy artifact
(1e-7 to 4e-7 measured in ONNX Runtime; Winograd convolutions lose up to four bits more); in half, a unit in the last
place."""


class TorchReference:
    """:class:`.run.ReferenceSource` of a PyTorch model."""

    swapped_link = ""
    rounds_to_codes = False
    is_float32_form = False

    def __init__(self, reference: Reference) -> None:
        self.name = reference.name
        self.left_alone = reference.recognition.refused
        self._reference = reference
        self._modules = {m.path: m for m in reference.swapped.modules() if isinstance(m, SwappedSRU)}
        self._float64 = Float64Replay(reference.swapped, reference.signature)
        self._noise = NoiseRuns(reference.swapped, reference.signature, self._float64)
        self._rounded = RoundedRuns(reference.swapped, reference.signature)
        self._sites: dict[str, Site] = {}

    @property
    def recognised(self) -> bool:
        return bool(self._reference.recognition.srus)

    @property
    def weights(self) -> Arrays:
        """Parameters and buffers of the model as given, by name."""
        return weights_of(self._reference.model)

    def run(self, sample: object) -> ReferenceRun:
        """Run a :class:`.samples.Sample` and measure its noise.

        Raises:
            ModelError, RuntimeError: the model refuses the sample.
        """
        if not isinstance(sample, Sample):
            raise TypeError(f"expected a Sample, found {type(sample).__name__}")
        if not sample.deep:
            return self._run_free(sample)
        reference, signature = self._reference, self._reference.signature
        both = self._run_both(sample)
        outputs, gates, given, swapped = both.outputs, both.gates, both.given, both.swapped
        as_given = outputs
        if swapped.given_masks:
            masks = both.others.decided | {site: gate.mask for site, gate in gates.items()} | swapped.given_masks
            as_given = replay(reference.swapped, signature, sample.tensors, masks)
        noise = self._noise.measure(sample.tensors, outputs, gates, both.others)
        return ReferenceRun(
            sample.name,
            _arrays(sample.tensors),
            _arrays(given),
            _arrays(outputs),
            _arrays(as_given),
            noise.outputs,
            {
                name: SiteRun(self._site(name, gate.swapped), gate.x.numpy(), gate.mask.numpy(), noise.sites.get(name))
                for name, gate in gates.items()
            },
            swapped.flips,
            swapped.distance,
            tuple(swapped.non_finite),
            noise.refusal,
            sample.labels,
            sample.count,
            sample.kind,
            others=noise.others,
            spread=noise.spread,
            continuous=noise.continuous,
            part_floors=noise.parts,
        )

    def _run_both(self, sample: Sample) -> _Both:
        """Run the given and the swapped model, with the given model's decisions at gates of no known SRU in both.

        A swapped SRU sums in another order, which may flip such a gate after it; then the swapped model runs again.
        """
        recognised = [found.module for found in self._reference.recognition.srus]
        reference, signature, tensors = self._reference, self._reference.signature, sample.tensors
        decided: Mapping[str, Tensor] | None = None
        while True:
            with steps.recording(reference.swapped, tensors, decided=decided) as others:
                outputs, gates = record_gates(reference.swapped, signature, tensors)
            swapped = _Comparison(self._modules, gates)
            with steps.recording(reference.model, tensors, recognised) as of_given:
                compare_ = of_given.outside(swapped.compare)
                given = run_as_given(reference.model, reference.recognition, signature, tensors, compare_)
            if decided is not None or not others.same_gates(of_given) or others.same_decisions(of_given):
                return _Both(outputs, gates, others, given, swapped)
            decided = of_given.decided

    def _run_free(self, sample: Sample) -> ReferenceRun:
        """Run the model as given once; compute the mask of each SRU's input by its formula."""
        sites: dict[str, SiteRun] = {}

        def keep(path: str, call: int, x: Tensor, y: Tensor) -> None:
            module, name = self._modules[path], site_name(path, call)
            if module.conv is not None and module.conv_place == "before":
                x = module.conv(x)
            x = as_planes(x)
            sites[name] = SiteRun(self._site(name, module), x.numpy(), module.gate.mask(x).numpy())

        reference = self._reference
        outputs = run_as_given(reference.model, reference.recognition, reference.signature, sample.tensors, keep)
        given = _arrays(outputs)
        return ReferenceRun(
            sample.name,
            _arrays(sample.tensors),
            given,
            given,
            given,
            dict.fromkeys(given),
            sites,
            labels=sample.labels,
            count=sample.count,
            kind=sample.kind,
            deep=False,
        )

    def _site(self, name: str, module: SwappedSRU) -> Site:
        if name not in self._sites:
            gate, variant = module.gate, module.gate.variant
            of_a_sum = variant.weighting in ("sum", "torch_sum")
            self._sites[name] = Site(
                name,
                module.path,
                str(variant),
                variant.operator,
                {key: value.numpy() for key, value in gate.operator_inputs().items()},
                variant_attributes(variant),
                bool(gate.channels % variant.num_groups),
                gate.form,
                weight_error(gate.gamma.double().numpy()) if of_a_sum else 0.0,
            )
        return self._sites[name]

    def redundant(self, run: ReferenceRun, missing: Sequence[str], present: Sequence[str]) -> dict[str, str]:
        """Sites that an exporter dropped: merged with an equal call, or unused; with the reason."""
        return {name: reason for name in missing if (reason := self._why_redundant(run, name, present))}

    def _why_redundant(self, run: ReferenceRun, name: str, present: Sequence[str]) -> str:
        site = run.sites[name]
        gate = self._modules[site.site.path].gate
        for other, twin in run.sites.items():
            if other in present and _equal(twin.x, site.x) and _same(self._modules[twin.site.path].gate, gate):
                return f"{other} computes the same"
        masks = {n: torch.from_numpy(mask) for n, mask in (run.masks | {name: ~site.mask}).items()}
        inputs = {n: torch.from_numpy(value) for n, value in run.inputs.items()}
        inverted = _arrays(replay(self._reference.swapped, self._reference.signature, inputs, masks))
        unchanged = all(np.array_equal(inverted[n], value, equal_nan=True) for n, value in run.outputs.items())
        return "no output depends on it" if unchanged else ""

    def sru(self, site: Site, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Output and mask of one SRU for any input, in PyTorch's float32."""
        gate, tensor = self._modules[site.path].gate, torch.from_numpy(x)
        mask = gate.mask(tensor)
        return gate.apply(tensor, mask).numpy(), mask.numpy()

    def free_noise(self, run: ReferenceRun, rounding: str) -> dict[str, float]:
        """Largest change of each output over several draws with disturbed gate inputs, running free."""
        tensors = {name: torch.from_numpy(value) for name, value in run.inputs.items()}
        noise = dict.fromkeys(run.given, 0.0)
        if not self._modules and not run.others:
            return noise
        for seed in range(_DRAWS):
            moved = run_disturbed(
                self._reference.swapped, self._reference.signature, tensors, _DISTURBANCE[rounding], seed, run.others
            )
            aligned = align_rows(_arrays(moved), run.given)
            for name, given in run.given.items():
                noise[name] = max(noise[name], metrics.distance(aligned[name], given))
        return noise

    def jumps(self, run: ReferenceRun, free: Sequence[str], data: str) -> dict[str, float]:
        """Largest change of each output and each SRU's input over several draws with inputs moved by rounding."""
        tensors = {name: torch.from_numpy(value) for name, value in run.inputs.items()}
        masks = {name: torch.from_numpy(mask) for name, mask in run.masks.items()}
        free_srus = [name for name in free if name in run.sites]
        found: dict[str, float] = {}
        for seed in range(-1, _JUMP_DRAWS):  # -1 is the undisturbed run
            generator = torch.Generator().manual_seed(max(seed, 0))
            decide = {n: _decider(run.others[n], generator, data) for n in free if n in run.others and seed >= 0}
            own = {n: self._own_gates(run.sites[n], generator, data) for n in free_srus if seed >= 0}
            seen: dict[str, np.ndarray] = {}

            def watch(name: str, x: Tensor, seen: dict[str, np.ndarray] = seen) -> None:
                seen[name] = x.numpy().copy()

            moved = {n: _moved(t, generator, data) for n, t in tensors.items()} if seed >= 0 else tensors
            model, signature = self._reference.swapped, self._reference.signature
            try:
                outputs = _arrays(replay(model, signature, moved, masks, watch, decide, own))
            except (RuntimeError, ModelError):  # a gate changed the number of rows
                return {}
            expected = dict(run.outputs) | {n: site.x for n, site in run.sites.items() if site.x is not None}
            aligned = align_rows(outputs, run.outputs) | {name: x for name, x in seen.items() if name in run.sites}
            apart = {n: metrics.distance(aligned[n], value) for n, value in expected.items() if n in aligned}
            if seed < 0 and any(apart.values()):
                return {}  # the model is random: that is no jump
            # an infinite jump would excuse any error
            found |= {n: max(found.get(n, 0.0), value) for n, value in apart.items() if math.isfinite(value)}
        return found

    def _own_gates(self, site: SiteRun, generator: torch.Generator, data: str) -> Callable[[Tensor], Tensor]:
        """Function that computes an SRU's mask from an input moved by the artifact's rounding."""
        gate = self._modules[site.site.path].gate

        def decide(x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=generator) * (_DISTURBANCE[data] * x.square().mean().sqrt())
            return gate.mask(x + noise)

        return decide

    def between(self, run: ReferenceRun, outputs: Arrays) -> tuple[Arrays, Arrays]:
        """Inputs of SRUs by site and outputs of the swapped model, with these tensors as its SRUs' outputs."""
        tensors = {name: torch.from_numpy(value) for name, value in run.inputs.items()}
        given = {name: torch.from_numpy(value) for name, value in outputs.items()}
        inputs, found = run_between(self._reference.swapped, self._reference.signature, tensors, given)
        return _arrays(inputs), align_rows(_arrays(found), run.given)

    def between_noise(self, run: ReferenceRun, outputs: Arrays, rounding: str) -> tuple[Arrays, Arrays]:
        """Largest changes of :meth:`between` over several draws with the operands of gates of no SRU disturbed."""
        tensors = {name: torch.from_numpy(value) for name, value in run.inputs.items()}
        given = {name: torch.from_numpy(value) for name, value in outputs.items()}
        usual = self.between(run, outputs)
        largest: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
        for seed in range(_DRAWS):
            disturbance = Disturbance(_DISTURBANCE[rounding], seed, tuple(run.others))
            found = run_between(self._reference.swapped, self._reference.signature, tensors, given, disturbance)
            moved = _arrays(found[0]), align_rows(_arrays(found[1]), run.given)
            for noise, now, before in zip(largest, moved, usual, strict=True):
                for name, value in before.items():
                    apart = np.float64(metrics.distance(now[name], value))
                    noise[name] = np.maximum(noise.get(name, np.float64(0)), apart)
        return largest

    def rounded(self, run: ReferenceRun, artifact: onnx.ModelProto | None, data: str) -> RoundedRun | None:
        """Run the swapped model with every value rounded to half, see :mod:`.rounding`."""
        return self._rounded.measure(run, data, self._float64.rows_apart)

    def modules(self, run: ReferenceRun, paths: Sequence[str]) -> Iterator[tuple[str, int, np.ndarray, float | None]]:
        """Yield (path, call, output, noise floor) of the swapped model's modules with this run's gates."""
        masks = {name: torch.from_numpy(mask) for name, mask in run.masks.items()}
        inputs = {name: torch.from_numpy(value) for name, value in run.inputs.items()}
        signature = self._reference.signature
        single = record_modules(
            self._reference.swapped, paths, lambda: replay(self._reference.swapped, signature, inputs, masks)
        )
        exact: Mapping[tuple[str, int], Tensor] = {}
        if not run.float64_refusal:
            exact = record_modules(self._float64.model, paths, lambda: self._float64.run(inputs, masks))
        others = disturbed_modules(
            followed(inputs, masks),
            lambda: record_modules(
                self._reference.swapped, paths, lambda: replay(self._reference.swapped, signature, inputs, masks)
            ),
        )
        for place, value in single.items():
            apart = [
                metrics.distance(value.numpy(), ruler[place].numpy())
                for ruler in (exact, *others)
                if place in ruler and ruler[place].shape == value.shape
            ]
            yield *place, value.numpy(), max(apart, default=None)


@dataclass(frozen=True, eq=False)
class _Both:
    """Outputs and gates of the swapped model, outputs of the given model, and the comparison of their SRUs."""

    outputs: dict[str, Tensor]
    gates: dict[str, RecordedGate]
    others: steps.Steps
    given: dict[str, Tensor]
    swapped: _Comparison


class _Comparison:
    """Comparison of each SRU call with its variant, made while the model as given runs."""

    def __init__(self, modules: Mapping[str, SwappedSRU], gates: Mapping[str, RecordedGate]) -> None:
        self._modules, self._gates = modules, gates
        self.flips: dict[str, FlipCount] = {}
        self.distance = 0.0
        self.given_masks: dict[str, Tensor] = {}
        self.non_finite: list[str] = []

    def compare(self, path: str, call: int, x: Tensor, y: Tensor) -> None:
        """Compare one call; keep the mask as given if it has a flip."""
        site, swapped = site_name(path, call), self._modules[path]
        if not (all_finite(x) and all_finite(y)):
            self.non_finite.append(f"the input or output of {site} in PyTorch")
            return
        recorded = self._gates.get(site)
        known = recorded is not None and swapped.conv_place != "before" and torch.equal(as_planes(x), recorded.x)
        if known and recorded is not None and torch.equal(y, recorded.y):  # bit for bit equal: no flips
            count, apart, mask = FlipCount(recorded.mask.numel()), 0.0, None
        else:
            gate_input = swapped.conv(x) if swapped.conv is not None and swapped.conv_place == "before" else x
            count, apart, mask = _compare_call(swapped, gate_input, x, y)
        self.flips[path] = self.flips.get(path, FlipCount(0)) + count
        self.distance = max(self.distance, apart if apart == apart else math.inf)  # max() would ignore NaN
        if mask is not None:
            self.given_masks[site] = mask


def _compare_call(
    swapped: SwappedSRU, gate_input: Tensor, x: Tensor, y: Tensor
) -> tuple[FlipCount, float, Tensor | None]:
    """Flips of one SRU call against its variant, distance of the other elements, and its mask if it has a flip."""
    expected = swapped(x)
    if swapped.conv_place == "after":  # a convolution mixes the channels: gates cannot be read from the output
        return FlipCount(y.numel()), relative_l2(y, expected), None
    y, expected, gate_input = as_planes(y), as_planes(expected), as_planes(gate_input)
    differs, apart = changed_gates(y, expected, gate_input, swapped.gate)
    count = swapped.gate.count_flips(differs, gate_input)
    return count, apart, swapped.gate.mask(gate_input) ^ differs if differs.any() else None


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Parameters and buffers of a model by name."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().numpy() for name, tensor in state.items()}


def _moved(tensor: Tensor, generator: torch.Generator, data: str) -> Tensor:
    """Move a floating tensor by rounding; other dtypes are not changed."""
    if not tensor.is_floating_point():
        return tensor
    return tensor * (1 + JUMP_DISTURBANCE[data] * torch.randn(tensor.shape, generator=generator))


def _decider(gate: OtherGate, generator: torch.Generator, data: str) -> Callable[[steps.Operand], Tensor]:
    """Function that decides a gate of no known SRU from a margin moved by its noise."""
    view = gate.views[0]
    smallest = view.scale * UNIT_ROUNDOFF[data]
    size = torch.from_numpy(smallest if view.noise is None else np.maximum(smallest, view.noise))
    return lambda operand: steps.disturbed(operand, _JUMP_NOISES * size, generator)


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is not None and other is not None and np.array_equal(one, other)


def _same(one: Gate, other: Gate) -> bool:
    same = one.variant == other.variant and torch.equal(one.gamma, other.gamma) and torch.equal(one.beta, other.beta)
    return one is other or same


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}
