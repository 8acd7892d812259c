"""What accumulates over the samples; :mod:`.checks.parity` makes checks of it. It does not grow with their number."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from scconv_deploy.errors import UsageError
from scconv_deploy.gate.margins import MARGIN_EDGES, histogram
from scconv_deploy.gate.other_gates import OtherGates
from scconv_deploy.records import tolerances
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.metrics import OutputMetrics
from scconv_deploy.records.parity import LayerError, WorstInput
from scconv_deploy.records.tolerances import Table
from scconv_deploy.verification.accuracy import PairedCounts
from scconv_deploy.verification.metrics import distance, looks_like_logits, relative_l2, worst_of
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun, Site

_KEPT_WORST, _NAMED_NON_FINITE = 5, 8
NO_LOGITS = "no output looks like logits (float [N, K], K of at least 2)"
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class AgainstNoise:
    """An output's distance and the reference's own rounding noise, see :func:`.metrics.distance`.

    Attributes:
        floor_name, largest_floor: the tolerance that limits the noise.
        measured: whether the noise was; else it is assumed.
    """

    error: float
    floor: float
    floor_name: str
    largest_floor: float
    measured: bool = True

    @property
    def ratio(self) -> float:
        return self.error / self.floor

    @property
    def multiple(self) -> str:
        """The name of the tolerance that limits the ratio."""
        return "half_multiple" if self.floor_name.endswith(("float16", "bfloat16")) else "replay_multiple"

    @property
    def badness(self) -> tuple[bool, float]:
        """Grows with what is wrong: a floor above the largest one proves nothing, however small the ratio to it."""
        ratio = self.ratio
        return not self.floor <= self.largest_floor, ratio if ratio == ratio else float("inf")


@dataclass
class SiteMeasured:
    """One SRU.

    Attributes:
        teacher_forced, free_running: flips; None where the artifact's gates cannot be read.
        second_opinion: flips of the artifact's SRU in onnx.reference, and the distance of its values.
        opened, gates: of the reference.
        histogram: of its margins, see :func:`scconv_deploy.gate.margins.histogram`.
        jump: the largest change of the SRU's output that a flipped gate made, in units of the rms of its data.
    """

    site: Site
    teacher_forced: FlipCount | None = None
    free_running: FlipCount | None = None
    second_opinion: tuple[FlipCount, float] | None = None
    opened: int = 0
    gates: int = 0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(MARGIN_EDGES) - 1, dtype=np.int64))
    jump: float | None = None

    def jumped(self, jump: float) -> None:
        """Note the jump of a flipped gate."""
        self.jump = max(self.jump or 0.0, jump)


@dataclass
class Measured:
    """What accumulates over the samples.

    Attributes:
        limits: the tolerances that noise floors are clamped to.
        data: the type of the artifact's data, whose rounding no float output is below.
        sites: in the order of their calls.
        swapped_flips, swapped_distance: each SRU as given against its variant, fed the same input.
        swapped_error, replay: of the sample with the worst ratio; the swapped model against the given one, and the
            artifact with the reference's gates against the swapped model.
        redundant: sites that the artifact has no node for and no sample needs one, with the reason.
        layers: error of the values that both sides have, by name, the worst ratio over the samples.
        contract: where the artifact's outputs are not of the reference's order, shape or type, and how often.
        non_finite: tensors with NaN or Inf, and how often.
        described: samples, and how many batches of each kind.
        worst_run: the sample with the worst ratio of the replay; without the inputs of its gates.
        unfed: sites whose input the reference did not keep.
        paired: right and wrong answers on labelled data; ``no_accuracy`` why there are none in spite of labels.
        inputs, inputs_in_full: how many were compared, and how many of them in full.
        others: gates of no known SRU.
        rounding: of a half artifact, what rounding costs each output, the worst over the samples: the distance from
            float32 with the same gates.
        native: the same outputs of the runtime by itself, against the rounded reference.
        unruled: outputs of a half artifact on samples that the reference was not rounded for; as ``replay``, but
            float32's noise is no ruler for them, so it is information.
        spread: by which factor right runs of the reference scatter, the largest over the samples; ``half_spread`` those
            of the rounded reference.
        continuous: whether the reference was seen to be, on every sample whose noise is large; None if there is none.
    """

    limits: Table
    data: np.dtype = FLOAT32
    sites: dict[str, SiteMeasured] = field(default_factory=dict)
    swapped_flips: dict[str, FlipCount] = field(default_factory=dict)
    swapped_distance: float = 0.0
    swapped_error: dict[str, AgainstNoise] = field(default_factory=dict)
    redundant: dict[str, str] = field(default_factory=dict)
    end_to_end: dict[str, OutputMetrics] = field(default_factory=dict)
    replay: dict[str, AgainstNoise] = field(default_factory=dict)
    layers: dict[str, LayerError] = field(default_factory=dict)
    contract: Counter[str] = field(default_factory=Counter)
    non_finite: Counter[str] = field(default_factory=Counter)
    described: Counter[str] = field(default_factory=Counter)
    float64_refusal: str = ""
    opinion_refusal: str = ""
    worst_run: ReferenceRun | None = None
    unfed: set[str] = field(default_factory=set)
    paired: PairedCounts = field(default_factory=PairedCounts)
    no_accuracy: str = ""
    inputs: int = 0
    inputs_in_full: int = 0
    others: OtherGates = field(default_factory=OtherGates)
    rounding: dict[str, OutputMetrics] = field(default_factory=dict)
    native: dict[str, AgainstNoise] = field(default_factory=dict)
    native_refusal: str = ""
    unruled: dict[str, AgainstNoise] = field(default_factory=dict)
    spread: float = 1.0
    half_spread: float = 1.0
    continuous: bool | None = None
    _needed: set[str] = field(default_factory=set)
    _rows: dict[str, int] = field(default_factory=dict)
    _worst_inputs: list[tuple[float, str, int]] = field(default_factory=list)

    @property
    def coverage(self) -> str:
        """What to say of a check that the inputs which only ran free were not part of; "" if there are none."""
        if self.inputs == self.inputs_in_full:
            return ""
        return f", on {self.inputs_in_full:,} of {self.inputs:,} inputs"

    def note_noise(self, run: ReferenceRun) -> None:
        """Take over what a sample says of the reference's noise, before it is compared."""
        self.spread = max(self.spread, run.spread)
        usual = self.limits["largest_floor.float32"].value
        floors = [*run.floors.values(), *(site.floor for site in run.sites.values())]
        if any(floor is not None and not floor <= usual for floor in floors):
            self.continuous = run.continuous and self.continuous is not False

    @property
    def compared(self) -> int:
        """How many values were held against their noise, each on every sample."""
        return len(self.replay) + len(self.layers) + len(self.native)

    @property
    def multiple(self) -> str:
        """The name of the tolerance for multiples of the noise of the artifact's data."""
        return "replay_multiple" if self.data == FLOAT32 else "half_multiple"

    @property
    def other_gates(self) -> str:
        """The name of the tolerance for gates of no known SRU."""
        return "other_gates" if self.data == FLOAT32 else "other_gates_half"

    def largest_multiple(self, name: str) -> float:
        """Multiples of its noise that the worst of all values compared may be off.

        The largest of n draws whose logarithms have the deviation ln(spread) is about spread^sqrt(2 ln n).

        Args:
            name: of the tolerance for one value, ``replay_multiple`` or ``half_multiple``.
        """
        tolerance = self.limits[name]
        if tolerance.given:
            return tolerance.value
        smallest, largest = (tolerances.FIXED[f"{name}_spread"].value for name in ("smallest", "largest"))
        spread = min(max(self.half_spread if name == "half_multiple" else self.spread, smallest), largest)
        return float(tolerance.value * spread ** math.sqrt(2 * math.log(max(self.compared, 1))))

    def largest_floor(self, data: np.dtype) -> str:
        """The name of the tolerance that limits the noise of a value of this type."""
        if self.continuous and data == FLOAT32 and not self.limits["largest_floor.float32"].given:
            return "largest_scatter.float32"
        return tolerances.name_of(self.limits, "largest_floor", data)

    def against_noise(
        self, y: np.ndarray, expected: np.ndarray, floor: float | None, data: np.dtype | None = None
    ) -> AgainstNoise:
        """A distance, beside the reference's noise with the same gates (floor; None: assumed).

        Args:
            data: the type that y was computed in; the artifact's by default.
        """
        rounded = (data or self.data) if expected.dtype == np.float32 else expected.dtype
        smallest = self.limits[tolerances.name_of(self.limits, "smallest_floor", rounded)].value
        largest = self.largest_floor(rounded)
        measured = floor is not None
        if floor is None:
            floor = self.limits["assumed_floor"].value if expected.dtype.kind == "f" else 0.0
        # not max(), which would hide a floor that is not a number
        return AgainstNoise(
            distance(y, expected),
            smallest if floor < smallest else floor,
            largest,
            self.limits[largest].value,
            measured,
        )

    def add_redundant(self, missing: Sequence[str], found: Mapping[str, str]) -> None:
        """Sites without a node, and why this sample needs none: an SRU that one sample needs is needed."""
        self._needed |= set(missing) - set(found)
        kept = {**self.redundant, **found}
        self.redundant = {name: reason for name, reason in kept.items() if name not in self._needed}

    def keep_replay(self, name: str, found: AgainstNoise, run: ReferenceRun) -> None:
        """Keep the worst of an output, and the sample that it came from."""
        if _keep_worst(self.replay, name, found) and found is max(self.replay.values(), key=lambda f: f.badness):
            self._keep_run(run)

    def keep_unruled(self, name: str, found: AgainstNoise, run: ReferenceRun) -> None:
        """The same of one that there is no ruler for."""
        if _keep_worst(self.unruled, name, found) and self.worst_run is None:
            self._keep_run(run)

    def _keep_run(self, run: ReferenceRun) -> None:
        # without what it need not hold while the next sample runs
        sites = {site: replace(found, x=None) for site, found in run.sites.items()}
        self.worst_run = replace(run, sites=sites)

    def keep_rounding(self, name: str, metrics: OutputMetrics) -> None:
        """Keep the worst of what half costs an output."""
        kept = self.rounding.get(name)
        self.rounding[name] = metrics if kept is None else worst_of(kept, metrics, 1, 1)

    def keep_native(self, name: str, found: AgainstNoise) -> None:
        """Keep the worst of what a runtime gives by itself."""
        _keep_worst(self.native, name, found)

    def keep_swapped(self, name: str, as_given: np.ndarray, given: np.ndarray, floor: float | None) -> None:
        """Both are PyTorch's, in float32 whatever the artifact computes in."""
        found = self.against_noise(as_given, given, floor, data=FLOAT32)
        _keep_worst(self.swapped_error, name, found)

    def keep_metrics(self, name: str, metrics: OutputMetrics, rows: int = 1) -> None:
        """Keep the worst of each metric; agreements count over all rows."""
        kept, before = self.end_to_end.get(name), self._rows.get(name, 0)
        self.end_to_end[name] = metrics if kept is None else worst_of(kept, metrics, before, rows)
        self._rows[name] = before + rows

    def note_non_finite(self, tensor: str, run: ReferenceRun) -> None:
        """Count a tensor with NaN or Inf; only the first samples are named, so that no report grows with the data."""
        where = run.sample if len(self.non_finite) < _NAMED_NON_FINITE else run.kind or run.sample
        self.non_finite[f"{tensor} on {where}"] += 1

    def note_non_finite_output(self, name: str, run: ReferenceRun, y: np.ndarray, whose: str) -> None:
        """The same of an output, on whichever sides it is not finite; ``whose`` is y, the other is the reference's."""
        for side, values in (("reference", run.given[name]), (whose, y)):
            if not np.isfinite(values).all():
                self.note_non_finite(f"the {side}'s output {name}", run)

    def add_gates(self, run: ReferenceRun) -> None:
        """What the reference's gates look like."""
        for name, site in run.sites.items():
            found = self.sites.setdefault(name, SiteMeasured(site.site))
            found.opened += int(site.mask.sum())
            found.gates += site.mask.size
            if site.x is not None and site.finite:
                found.histogram += histogram(site.x, site.site.form)

    def add_answers(self, run: ReferenceRun, outputs: Arrays, rows: int | None) -> None:
        """Rank the inputs, and count right answers where there are labels.

        Args:
            rows: of the first output that count; None for all.
        """
        ((first, given), *_) = run.given.items()
        if given.ndim and given.shape == outputs[first].shape and given.dtype.kind == "f":
            self.keep_worst_inputs(run.sample, outputs[first], given, len(given) if rows is None else rows)
        if run.labels is None:
            return
        logits = next((n for n, g in run.given.items() if looks_like_logits(g)), None)
        if logits is None or len(run.labels) != len(run.given[logits]):
            self.no_accuracy = NO_LOGITS if logits is None else f"{logits} has another length than the labels"
        elif run.given[logits].shape != outputs[logits].shape:
            self.no_accuracy = f"{logits} has another shape in the artifact"
        else:
            self.paired.add(run.given[logits], outputs[logits], run.labels)

    def check_labels(self, run: ReferenceRun) -> None:
        """Refuse a label that no answer can be right for (UsageError); -1 stands for none."""
        logits = next((g for g in run.given.values() if looks_like_logits(g)), None)
        if run.labels is None or logits is None:
            return
        classes = logits.shape[1]
        for row in np.flatnonzero((run.labels < -1) | (run.labels >= classes))[:1]:
            raise UsageError(
                f"Label {run.labels[row]} of row {row} in {run.sample} is outside 0 to {classes - 1}: the model has "
                f"{classes} classes.",
                "Number the classes from 0 in the order of the model's outputs; -1 leaves a row out.",
            )

    def describe(self, run: ReferenceRun) -> None:
        """Count a sample under what samples like it are called."""
        self.described[run.kind or run.description] += 1

    @property
    def sample_names(self) -> tuple[str, ...]:
        """What was run, and in how many batches."""
        return tuple(text if n == 1 else f"{text}, {n} batches" for text, n in self.described.items())

    def keep_layer(self, found: LayerError) -> None:
        """Keep the worst of those that can be judged; one whose own noise is too large only where there is no other."""
        worst = self.layers.get(found.name)
        if worst is None or self._layer_badness(found) > self._layer_badness(worst):
            self.layers[found.name] = found

    def _layer_badness(self, layer: LayerError) -> tuple[bool, float]:
        largest = self.limits[self.largest_floor(self.data)].value
        return layer.floor <= largest, math.inf if math.isnan(layer.ratio) else layer.ratio

    def keep_worst_inputs(self, sample: str, y: np.ndarray, given: np.ndarray, rows: int) -> None:
        """Rank the rows of an output ``[N, ...]`` by their relative L2."""
        for index in range(min(rows, len(given))):
            entry = (relative_l2(y[index], given[index]), sample, index)
            if len(self._worst_inputs) < _KEPT_WORST:
                heapq.heappush(self._worst_inputs, entry)
            else:
                heapq.heappushpop(self._worst_inputs, entry)

    @property
    def worst_inputs(self) -> tuple[WorstInput, ...]:
        ranked = sorted(self._worst_inputs, key=lambda entry: (-entry[0], entry[1:]))
        return tuple(WorstInput(sample, index, error) for error, sample, index in ranked)


def _keep_worst(kept: dict[str, AgainstNoise], name: str, found: AgainstNoise) -> bool:
    worst = kept.get(name)
    if worst is not None and found.badness <= worst.badness:
        return False
    kept[name] = found
    return True


def total_flips(counts: Mapping[str, FlipCount]) -> FlipCount:
    """The sum over sites."""
    total = FlipCount(0)
    for count in counts.values():
        total = total + count
    return total


def repeated(messages: Mapping[str, int]) -> str:
    """Each message once, with how often it came."""
    return "; ".join(f"{text} ({count} times)" if count > 1 else text for text, count in messages.items())
