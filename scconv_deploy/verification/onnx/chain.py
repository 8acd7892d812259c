"""Chain from the reference to an ONNX artifact, link by link, and the verdict. No torch.

``PyTorch as given -> with SRUs swapped -> ONNX Runtime -> precision``. Teacher-forced, the gates of each SRU are
compared one by one. Running free, the error of a gate's input must explain each flip. In the replay, with the
reference's gates, the rest is continuous: its error is judged in multiples of the noise floor. See DESIGN section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import onnx

from scconv_deploy.errors import UsageError
from scconv_deploy.gate.other_gates import Found
from scconv_deploy.graph.quantization import read_quantization
from scconv_deploy.graph.types import Precision, precision_of, quantization_of
from scconv_deploy.records import tolerances
from scconv_deploy.records.parity import Link, ParityReport
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.system.environment import environment_facts, installed_version, sha256_of
from scconv_deploy.verification.checks.tally import Tally
from scconv_deploy.verification.onnx.artifact_checks import ArtifactChecks
from scconv_deploy.verification.onnx.first_divergence import first_divergence
from scconv_deploy.verification.onnx.fused import FUSED_LINK, FusedSRUs
from scconv_deploy.verification.reference.expected import ExpectedQuantization
from scconv_deploy.verification.reference.run import ReferenceRun, ReferenceSource

SWAPPED_LINK = "PyTorch with SRUs swapped"
ONNX_LINK = "onnxruntime"
PRECISION_LINK = "precision"
BUDGET_LINK = "budget"
UNPROVED = "fake-quantised PyTorch would prove it, and was not run (name the model with --reference MODEL)"
"""Why a quantised file that is judged against a float file has no verdict."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Artifact:
    """ONNX artifact to judge.

    Attributes:
        proto: model with its external data loaded.
        name: name of the file.
        content: bytes of the file, for its SHA-256.
        float32_model: the model that a half artifact was converted from, judged as its own link; None if there is none.
        quantized: quantisers that the reference has too, or why it does not have them.
    """

    proto: onnx.ModelProto
    name: str
    content: bytes
    float32_model: onnx.ModelProto | None = None
    quantized: ExpectedQuantization | str = UNPROVED

    @property
    def precision(self) -> Precision:
        """Type of the data."""
        return precision_of(self.proto)

    @property
    def quantization(self) -> str:
        """Kind of quantisation, as text; "" if not quantised."""
        return quantization_of(self.proto)


@dataclass(frozen=True)
class Judging:
    """Settings of a verdict.

    Attributes:
        overrides: tolerances by name that replace the table's.
        runtime: settings of ONNX Runtime.
        operators: library of the fused SRU for CPUs, judged as a link of its own; None without that link.
    """

    overrides: Mapping[str, float] = field(default_factory=dict)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    operators: Path | None = None


def verify_artifact(
    source: ReferenceSource,
    artifact: Artifact,
    samples: Iterable[object],
    log: StageLog,
    *,
    judging: Judging = Judging(),
    provenance: Mapping[str, str] | None = None,
    shards: Shards | None = None,
    on_run: Callable[[ReferenceRun], None] = lambda run: None,
) -> ParityReport:
    """Judge an ONNX model against a reference.

    Args:
        samples: samples of the source; read once, one at a time.
        shards: further samples, which run free in other processes; they come after ``samples``.
        on_run: given the reference's run of each of ``samples``.

    Returns:
        The report; falsy if a check failed.

    Raises:
        UsageError: there is no sample, a label is no class of the model, the artifact's inputs or outputs are not the
            reference's, or an override names no tolerance.
        MissingRuntimeError: the provider cannot run here.
        ModelError: ONNX Runtime or the reference cannot run the inputs.
    """
    with log.stage("verify") as stage, checks_of(source, artifact, judging) as all_checks, ExitStack() as stack:
        fused: FusedSRUs | None = None
        if judging.operators is not None:
            limits = tolerances.table(judging.overrides)
            fused = stack.enter_context(FusedSRUs(source, artifact.proto, judging.operators, limits))
        judged, shared = all_checks[0], all_checks[0].shared
        float32_checks = all_checks[1] if len(all_checks) > 1 else None
        for sample in samples:
            run = source.run(sample)
            on_run(run)
            for one in all_checks:
                one.add(run)
            if fused is not None and run.deep:  # the others may run in another process
                fused.add(run)
        if shards is not None:
            for tallies in shards.measure(source, artifact, judging, [one.fixed for one in all_checks]):
                for one, tally in zip(all_checks, tallies, strict=True):
                    one.merge(tally)
        if not shared.samples.names:
            raise UsageError("There is no sample, so nothing can be judged.", "Give at least one.")
        stage.applied += shared.samples.names
        stage.skipped += shared.sites.redundant.items()
        if shared.ruler.float64_refusal:
            stage.skipped.append(("float64 among the runs whose distance is the noise", shared.ruler.float64_refusal))
    links = _links(source, artifact, judged, float32_checks)
    if fused is not None:
        links = (*links[:-1], Link.of(FUSED_LINK, fused.checks()), links[-1])
    failed = any(link.status == "failed" for link in links)
    return ParityReport(
        model=source.name,
        artifact=artifact.name,
        artifact_sha256=sha256_of(artifact.content),
        links=links,
        srus=judged.srus,
        outputs=judged.outputs,
        samples=shared.samples.names,
        left_alone=source.left_alone,
        provenance=_provenance(judging) | dict(provenance or {}),
        stages=tuple(log.records),
        layers=judged.replay.layers.errors,
        first_departure=first_divergence(source, artifact.proto, judged, judged.options) if failed else "",
        worst_inputs=shared.answers.worst_inputs,
        accuracy=shared.answers.accuracy,
        overrides=dict(judging.overrides),
        other_gates=judged.others.records(),
    )


@contextmanager
def checks_of(source: ReferenceSource, artifact: Artifact, judging: Judging) -> Iterator[list[ArtifactChecks]]:
    """Open the checks of an artifact, and second those of the float32 model that a half one was converted from."""
    limits, runtime = tolerances.table(judging.overrides), judging.runtime
    with ExitStack() as stack:
        opened = [ArtifactChecks(source, artifact.proto, limits, runtime, artifact.float32_model, artifact.quantized)]
        if artifact.float32_model is not None and not source.is_float32_form:
            opened.append(ArtifactChecks(source, artifact.float32_model, limits, runtime))
        yield [stack.enter_context(one) for one in opened]


class Shards(Protocol):
    """Samples that run free in other processes."""

    def measure(
        self, source: ReferenceSource, artifact: Artifact, judging: Judging, fixed: Sequence[list[Found]]
    ) -> Iterator[Sequence[Tally]]:
        """Yield what each shard gave, in the order of the samples: a tally for each of :func:`checks_of`.

        Args:
            fixed: for each of the checks, the gates of no known SRU that are exposed.
        """
        ...


def recorded_quantization(artifact: Artifact) -> ExpectedQuantization | str:
    """Quantisers of an artifact whose codes a recorded run of fake-quantised PyTorch holds; or why they are not there.

    The recorded run holds no weights: those of the file are judged by its outputs.
    """
    found = read_quantization(artifact.proto) if artifact.quantization else None
    if found is None or found.unknown or not found.layers:
        return artifact.quantized
    return ExpectedQuantization(found, {})


def _links(
    source: ReferenceSource, artifact: Artifact, judged: ArtifactChecks, float32_checks: ArtifactChecks | None
) -> tuple[Link, ...]:
    swapped = Link(SWAPPED_LINK, "not run", source.swapped_link)
    if not source.swapped_link:
        swapped = Link.of(SWAPPED_LINK, judged.swapped.checks())
    engine = Link("engine", "not run", "no engine was built")
    if artifact.precision == "fp32" and not artifact.quantization:
        converted = Link(PRECISION_LINK, "not run", "the artifact computes in fp32; nothing was converted")
        return (swapped, Link.of(ONNX_LINK, judged.checks()), converted, engine)
    if artifact.quantization:
        before = Link(ONNX_LINK, "not run", f"the artifact is {artifact.quantization}; its float form is not at hand")
    elif float32_checks is not None:
        before = Link.of(ONNX_LINK, float32_checks.checks())
    else:
        away = f"the artifact computes in {artifact.precision}; its float32 form is not at hand"
        before = Link(ONNX_LINK, "not run", source.swapped_link or away)
    converted = Link.of(PRECISION_LINK, judged.checks())
    if artifact.quantization:
        return (swapped, before, Link.of(BUDGET_LINK, judged.budget.checks()), converted, engine)
    return (swapped, before, converted, engine)


def _provenance(judging: Judging) -> dict[str, str]:
    facts = environment_facts() | {"provider": judging.runtime.resolved_provider()}
    if judging.operators is not None:
        facts["fused SRU"] = f"{judging.operators.name}, sha256 {sha256_of(judging.operators)}"
    names = ("torch", "onnx", "onnxruntime", "onnxsim", "onnxscript", "numpy")
    return facts | {
        name: found for name in names if (found := installed_version(name))
    }  # a bundle does not need all of them
