"""Runs the artifact against what a reference left behind, sample by sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.gate.margins import count_flips, count_free_flips, decide
from scconv_deploy.graph import instrument
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import LayerError
from scconv_deploy.runtimes.half import HalfRunner, needs_stand_in, runner_of, runs_here
from scconv_deploy.runtimes.onnx_reference import OnnxReferenceRunner
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.detections import align_rows
from scconv_deploy.verification.measure import AgainstNoise, Measured
from scconv_deploy.verification.metrics import comparable, compare, distance, relative_l2
from scconv_deploy.verification.onnx import jump
from scconv_deploy.verification.onnx.other_gates import OtherGateRuns
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun, ReferenceSource, RoundedRun, SiteRun

Runner = OnnxRuntimeRunner | HalfRunner
_OPINION_SIZE = 8
"""Height and width to which an SRU's input is cut for onnx.reference, which is a hundred times slower."""


class ArtifactMeasurement:
    """Holds the artifact's sessions; a context manager.

    Args:
        source: the reference.
        proto: the artifact.
        options: of ONNX Runtime.
    """

    def __init__(
        self, source: ReferenceSource, proto: onnx.ModelProto, measured: Measured, options: RuntimeOptions
    ) -> None:
        self._source, self._proto, self._options = source, proto, options
        self._free = runner_of(proto, options)
        self._nodes = instrument.sites(proto)
        self._producers = {output: node for node in proto.graph.node for output in node.output}
        self._probes: dict[str, Runner | None] = {}
        self._open: Runner | None = None
        self._forced: Runner | None = None
        self._others = OtherGateRuns(source, proto, measured, options)
        self._native: Runner | None = None
        self._rounded: RoundedRun | None = None
        self.measured = measured

    def __enter__(self) -> ArtifactMeasurement:
        return self

    def __exit__(self, *exc: object) -> None:
        self._probes.clear()
        self._open = self._forced = self._native = None

    def run(self, run: ReferenceRun) -> None:
        """Measure one sample.

        Raises:
            UsageError: the artifact's inputs or outputs are not the reference's.
            ModelError: ONNX Runtime cannot run it.
        """
        _same_names("inputs", self._free.inputs, run.inputs)
        _same_names("outputs", self._free.outputs, run.given)
        self.measured.check_labels(run)
        self._add_reference(run)
        if run.deep:
            self.measured.note_noise(run)
            self._rounded = self._in_half(run)
            self._judge_reference(run)
            if self._others.align(run):
                self._open = self._forced = self._native = None
            for site in run.sites.values():
                self._teacher_force(site)
        self._run_free(run)
        self._compare_outputs(run, self._free.run(run.inputs))

    def _in_half(self, run: ReferenceRun) -> RoundedRun | None:
        """The reference in the artifact's own arithmetic."""
        if self.measured.data == np.float32:
            return None
        rounded = self._source.rounded(run, self._proto, self.measured.data.name)
        if rounded is not None:
            self.measured.half_spread = max(self.measured.half_spread, rounded.spread)
        return rounded

    def _judge_reference(self, run: ReferenceRun) -> None:
        """The swapped model against the given one, and the sites that need no node."""
        measured = self.measured
        for path, count in run.swapped_flips.items():
            measured.swapped_flips[path] = measured.swapped_flips.get(path, FlipCount(0)) + count
        measured.swapped_distance = max(measured.swapped_distance, run.swapped_distance)
        measured.float64_refusal = run.float64_refusal
        measured.non_finite.update(run.non_finite)
        missing = [name for name in run.sites if name not in self._nodes]
        if self._nodes and missing:
            measured.add_redundant(missing, self._source.redundant(run, missing, list(self._nodes)))

    def _add_reference(self, run: ReferenceRun) -> None:
        """What the reference's gates look like."""
        measured = self.measured
        measured.inputs += run.count
        measured.inputs_in_full += run.count if run.deep else 0
        measured.add_gates(run)

    # --- gates ---------------------------------------------------------------------------------------------------

    def _teacher_force(self, site: SiteRun) -> None:
        """The artifact's gates for the reference's own input."""
        name = site.site.name
        if site.x is None:
            self.measured.unfed.add(name)
            return
        if not site.finite:
            self.measured.non_finite[f"the input of {name}"] += 1
            return
        if name not in self._probes:
            model = self._probe_of(name)
            self._probes[name] = runner_of(model, self._options) if model is not None else None
            if model is not None:
                self._ask_second_opinion(model, site)
        runner = self._probes[name]
        if runner is None:
            return
        x, expected = self._as_data(site)
        decided = runner.run({instrument.PROBE_X: x})[instrument.PROBE_OPEN]
        differs, found = decided != expected, self.measured.sites[name]
        if differs.any():
            found.jumped(jump.largest(x, differs, site.site))
        found.teacher_forced = (found.teacher_forced or FlipCount(0)) + count_flips(differs, x, site.site.form)

    def _as_data(self, site: SiteRun) -> tuple[np.ndarray, np.ndarray]:
        """The reference's input of a gate as the artifact can take it, and what is right for it."""
        assert site.x is not None  # noqa: S101  (for the type checker: the caller looked)
        if self.measured.data == np.float32:
            return site.x, site.mask
        with np.errstate(over="ignore"):
            x = site.x.astype(self.measured.data).astype(np.float32)
        return x, decide(x, site.site.form)

    def _probe_of(self, name: str) -> onnx.ModelProto | None:
        node = self._nodes.get(name)
        return instrument.gate_probe(self._proto, node) if node is not None else None

    def _ask_second_opinion(self, probe: onnx.ModelProto, site: SiteRun) -> None:
        """The same node in onnx.reference on a small input, gates and values."""
        form = site.site.form
        if self.measured.data != np.float32:
            self.measured.opinion_refusal = (
                f"an SRU alone in PyTorch is float32; the artifact's data are {self.measured.data}"
            )
            return
        assert site.x is not None  # noqa: S101  (for the type checker: the caller looked)
        x = np.ascontiguousarray(site.x[:1, :, :_OPINION_SIZE, :_OPINION_SIZE])
        if x[0].size % form.num_groups or x[0].size == form.num_groups:
            return
        expected = self._source.sru(site.site, x)
        if expected is None:
            self.measured.opinion_refusal = "this reference cannot compute an SRU for another input"
            return
        y, mask = expected
        try:
            with OnnxReferenceRunner(probe) as runner:
                found = runner.run({instrument.PROBE_X: x})
        except ModelError as error:
            self.measured.opinion_refusal = error.message
            return
        differs = found[instrument.PROBE_OPEN] != mask
        half = x.shape[1] // 2
        touched = differs | np.roll(differs, half, axis=1)  # a gate shows in both of the channels that cross
        apart = relative_l2(np.where(touched, y, found[instrument.PROBE_Y]), y)
        self.measured.sites[site.site.name].second_opinion = (count_flips(differs, x, form), apart)

    def _run_free(self, run: ReferenceRun) -> None:
        """The artifact's gates where its own rounding has led it."""
        if self._open is None:
            exposed = instrument.expose_gates(self._proto, list(run.sites))
            self._open = runner_of(self._others.expose(exposed), self._options)
        if set(self._open.outputs) == set(run.given):
            return  # no gate can be read
        found = self._open.run(run.inputs)
        self._others.compare_free(run, found)
        for name, site in run.sites.items():
            decided, x = found.get(instrument.gate_output(name)), found.get(instrument.gate_input(name))
            if decided is None or x is None or site.x is None:
                continue  # the check says of how many SRUs
            if decided.shape != site.mask.shape:
                self.measured.contract[_other_shape(name, decided, site.mask)] += 1
                continue
            if not site.finite or not np.isfinite(x).all():
                whose = "artifact" if site.finite else "reference"
                self.measured.note_non_finite(f"the input of {name} in the {whose}", run)
                continue
            differs, measured = decided != site.mask, self.measured.sites[name]
            if differs.any():
                measured.jumped(jump.largest(x, differs, site.site))
            count = count_free_flips(site.mask, decided, site.x, x, site.site.form)
            measured.free_running = (measured.free_running or FlipCount(0)) + count

    def _injected(self, run: ReferenceRun) -> onnx.ModelProto:
        return self._others.inject(instrument.inject_gates(self._proto, list(run.sites)))

    # --- values --------------------------------------------------------------------------------------------------

    def _compare_outputs(self, run: ReferenceRun, free: Arrays) -> None:
        """Outputs end to end, and with the reference's gates."""
        forced = self._replay(run) if run.deep else {}
        free, as_given = self._aligned(free, run.given), self._aligned(run.as_given, run.given)
        for name, value in run.outputs.items():
            given = run.given[name]
            if self._breaks_contract(name, free[name], given):
                continue
            if not comparable(free[name], given):
                self.measured.note_non_finite_output(name, run, free[name], "artifact")
                continue
            self.measured.keep_metrics(name, compare(free[name], given), len(given) if given.ndim else 1)
            if not run.deep:
                continue
            floor = self._floor(run, name, value)
            self.measured.keep_swapped(name, as_given[name], given, floor)
            found = self._against(name, forced[name], value, floor)
            if self._unruled:
                self.measured.keep_unruled(name, found, run)
            else:
                self._others.excuse(run, name, found)
                self.measured.keep_replay(name, found, run)
            if self.measured.data != np.float32 and value.dtype.kind == "f" and comparable(forced[name], value):
                self.measured.keep_rounding(name, compare(forced[name], value))
        if run.deep and self.measured.data != np.float32:
            self._compare_native(run)
        self.measured.add_answers(run, free, run.count)

    @property
    def _unruled(self) -> bool:
        """Whether float32 with its noise is all that a half artifact can be held against: rounding alone is more."""
        return self.measured.data != np.float32 and self._rounded is None

    def _floor(self, run: ReferenceRun, name: str, value: np.ndarray) -> float | None:
        """An output's noise floor; None where it is to be assumed."""
        largest = self.measured.limits[self.measured.largest_floor(value.dtype)].value
        return self._others.floor(run, name, run.floors[name], largest)

    def _against(self, name: str, y: np.ndarray, value: np.ndarray, floor: float | None) -> AgainstNoise:
        """An output with the reference's gates against the reference; of a half artifact against the rounded one.

        A file that keeps layers in float32 rounds less than every value, and is then nearer to float32: it may be.
        """
        measured = self.measured
        rounded = None if self._rounded is None else self._rounded.outputs.get(name)
        if self._rounded is None or rounded is None or rounded.shape != y.shape:
            return measured.against_noise(y, value, floor)
        noise = self._rounded.floors.get(name)
        noise = floor if noise is None else noise
        if value.dtype.kind != "f" and noise is not None:  # one entry of few flips by luck in few runs
            noise = max(noise, distance(rounded, value))
        pair = [measured.against_noise(y, expected, noise) for expected in (rounded, value)]
        return min(pair, key=lambda found: found.badness)

    def _compare_native(self, run: ReferenceRun) -> None:
        """What the runtime makes of the half file by itself: within rounding of the file's own arithmetic."""
        if self.measured.native_refusal or not needs_stand_in(self._proto, self._options):
            return
        if self._native is None:
            if not runs_here(self._proto, self._options):
                self.measured.native_refusal = "ONNX Runtime cannot run bf16 here"
                return
            model = self._injected(run)
            try:
                self._native = HalfRunner(model, self._options, native=True)
            except ModelError as error:  # an operator that its CPU provider has no kernel of this type for
                self.measured.native_refusal = error.message
                return
        found = self._aligned(self._native.run(run.feeds(self._native.inputs)), run.outputs)
        for name, value in run.outputs.items():
            y, rounded = found[name], None if self._rounded is None else self._rounded.outputs.get(name)
            if y.shape != value.shape:
                shapes = f"{list(y.shape)}, PyTorch's {list(value.shape)}"
                self.measured.contract[f"the runtime's own output {name} is {shapes}"] += 1
                continue
            if not comparable(y, value):
                self.measured.note_non_finite_output(name, run, y, "runtime")
                continue
            near = self._against(name, y, value, self._floor(run, name, value))
            if rounded is not None and rounded.shape == value.shape and comparable(rounded, value):
                # it rounds at fewer places, so it lies anywhere between float32 and every value rounded
                near = replace(near, floor=max(near.floor, distance(rounded, value)))
            self.measured.keep_native(name, near)

    def _replay(self, run: ReferenceRun) -> Arrays:
        """The outputs with the reference's gates; the layers, and gates of no known SRU, are compared here."""
        forced = self._forced_outputs(run)
        self._others.compare_same_input(run, self._rounded, forced)
        for name, site in run.sites.items():
            x = forced.get(instrument.gate_input(name))
            if x is not None and site.x is not None and not self._unruled:
                self._keep_layer(self._before_reshapes(self._nodes[name]), x, site, run)
        return self._aligned(forced, run.outputs)

    def _aligned(self, outputs: Arrays, reference: Arrays) -> dict[str, np.ndarray]:
        return align_rows(outputs, reference, self.measured.limits["equal_scores"].value)

    def _forced_outputs(self, run: ReferenceRun) -> dict[str, np.ndarray]:
        if self._forced is None:
            self._forced = runner_of(self._injected(run), self._options)
        return self._forced.run(run.feeds(self._forced.inputs))

    def _before_reshapes(self, node: onnx.NodeProto) -> str:
        """The value that an SRU takes, before its own module brings it to ``[N, C, H, W]``."""
        value = node.input[0]
        while (producer := self._producers.get(value)) is not None and producer.op_type in ("Reshape", "Unsqueeze"):
            if instrument.module_of(producer) != instrument.module_of(node):
                break
            value = producer.input[0]
        return value

    def _keep_layer(self, value: str, x: np.ndarray, site: SiteRun, run: ReferenceRun) -> None:
        assert site.x is not None  # noqa: S101  (for the type checker: the caller looked)
        if x.shape != site.x.shape:
            self.measured.contract[_other_shape(site.site.name, x, site.x)] += 1
            return
        if not comparable(x, site.x):
            self.measured.note_non_finite(f"the input of {site.site.name} with the reference's gates", run)
            return
        found = self._layer_against(site, x)
        if self._others.excuse(run, site.site.name, found):
            return
        producer = self._producers.get(value)
        module = "" if producer is None else instrument.module_of(producer)
        self.measured.keep_layer(LayerError(value, module, found.error, found.floor))

    def _layer_against(self, site: SiteRun, x: np.ndarray) -> AgainstNoise:
        assert site.x is not None  # noqa: S101  (for the type checker: the caller looked)
        name, measured = site.site.name, self.measured
        if self._rounded is None:
            return measured.against_noise(x, site.x, site.floor)
        noise = self._rounded.input_floors.get(name, site.floor)
        rounded = self._rounded.inputs.get(name)
        expected = [site.x] if rounded is None or rounded.shape != x.shape else [rounded, site.x]
        return min((measured.against_noise(x, e, noise) for e in expected), key=lambda found: found.badness)

    def _breaks_contract(self, name: str, actual: np.ndarray, expected: np.ndarray) -> bool:
        if actual.shape == expected.shape and actual.dtype == expected.dtype:
            return False
        found, wanted = (f"{a.dtype}{list(a.shape)}" for a in (actual, expected))
        self.measured.contract[f"output {name} is {found}, PyTorch's {wanted}"] += 1
        return True


def _other_shape(site: str, found: np.ndarray, expected: np.ndarray) -> str:
    return f"the input of {site} is {list(found.shape)}, PyTorch's {list(expected.shape)}"


def _same_names(what: str, artifact: Iterable[str], reference: Iterable[str]) -> None:
    """In the same order too: programs that feed by position would mix them up."""
    if list(artifact) != list(reference):
        raise UsageError(
            f"The artifact's {what} are {', '.join(artifact)}; the reference's {', '.join(reference)}.",
            "Give the model that this artifact was exported from.",
        )
