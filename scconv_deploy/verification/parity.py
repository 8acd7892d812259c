"""The chain from PyTorch to the artifact, link by link, and the verdict.

``PyTorch as given -> with SRUs swapped -> ONNX Runtime``: each SRU is fed the reference's own input and its gates are
compared one by one; with the gates fixed the rest is continuous and is judged by its error against PyTorch's own
rounding noise. See DESIGN section 6.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from scconv_deploy import __version__
from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.gate import FlipCount, Recognition, SwappedSRU, compare_outputs, count_flips
from scconv_deploy.report.records import Check, Link, OutputParity, ParityReport, SRUParity, StageLog
from scconv_deploy.signature import Signature
from scconv_deploy.verification import instrument, static, tolerances
from scconv_deploy.verification.compare import OutputMetrics, compare, relative_l2
from scconv_deploy.verification.runners.onnxruntime import OnnxRuntimeRunner
from scconv_deploy.verification.runners.pytorch import Float64Replay, RecordedGate, record_gates, run_as_given
from scconv_deploy.verification.samples import Sample

SWAPPED_LINK = "PyTorch with SRUs swapped"
ONNX_LINK = "onnxruntime"


@dataclass(frozen=True, eq=False)
class Reference:
    """The PyTorch side: the model as given, the same with its SRUs swapped, and how it is called."""

    name: str
    model: nn.Module
    swapped: nn.Module
    recognition: Recognition
    signature: Signature


@dataclass
class _Measured:
    """What accumulates over the samples."""

    swapped_flips: dict[str, FlipCount] = field(default_factory=dict)
    swapped_distance: float = 0.0
    teacher_forced: dict[str, FlipCount] = field(default_factory=dict)
    open_gates: dict[str, tuple[int, int]] = field(default_factory=dict)
    variants: dict[str, SwappedSRU] = field(default_factory=dict)
    end_to_end: dict[str, OutputMetrics] = field(default_factory=dict)
    replay: dict[str, tuple[float, float]] = field(default_factory=dict)  # output -> (error, floor), worst ratio
    non_finite: list[str] = field(default_factory=list)
    float64_refusal: str = ""


def verify_onnx(
    reference: Reference,
    proto: onnx.ModelProto,
    artifact: str,
    artifact_bytes: bytes,
    samples: Sequence[Sample],
    log: StageLog,
    *,
    provenance: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Judge an ONNX model against PyTorch.

    Args:
        proto: the model, external data loaded; ``artifact_bytes`` is what is hashed.
        samples: inputs; at least one.
        progress: told what is being done, in words.

    Returns:
        The report; falsy when a check failed.

    Raises:
        UsageError: the artifact's inputs or outputs are not the reference's.
        ModelError: ONNX Runtime or the reference cannot run the inputs at all.
    """
    with log.stage("verify") as stage:
        measured = _Measured()
        nodes = instrument.sites(proto)
        replay64 = Float64Replay(reference.swapped, reference.signature)
        with OnnxRuntimeRunner(proto) as free, _Sessions(proto, nodes) as sessions:
            _same_names("inputs", free.inputs, samples[0].tensors)
            for sample in samples:
                progress(f"verifying on {sample}")
                _measure(reference, sample, free, sessions, replay64, measured)
        stage.applied += [str(sample) for sample in samples]
        if measured.float64_refusal:
            stage.skipped.append(("noise floor in float64", measured.float64_refusal))
        statics = _static_checks(proto, nodes, measured)
        links = (
            Link.of(SWAPPED_LINK, _swapped_checks(reference.recognition, measured)),
            Link.of(ONNX_LINK, [
                _static_summary(nodes, statics, measured),
                _teacher_forced_check(measured),
                *_replay_checks(measured),
                *_non_finite_checks(measured),
            ]),
            Link("precision", "not run", "the artifact computes in fp32; nothing was converted"),
            Link("engine", "not run", "no engine was built"),
        )  # fmt: skip
    return ParityReport(
        model=reference.name,
        artifact=artifact,
        artifact_sha256=hashlib.sha256(artifact_bytes).hexdigest(),
        links=links,
        srus=tuple(_sru(site, measured, statics) for site in measured.variants),
        outputs=tuple(_output(name, measured) for name in measured.end_to_end),
        samples=tuple(str(sample) for sample in samples),
        left_alone=reference.recognition.refused,
        provenance=_provenance() | dict(provenance or {}),
        stages=tuple(log.records),
    )


# --- measuring ---------------------------------------------------------------------------------------------------


class _Sessions:
    """The artifact with its gates laid open; each session is made when it is first asked for."""

    def __init__(self, proto: onnx.ModelProto, nodes: Mapping[str, onnx.NodeProto]) -> None:
        self._proto, self._nodes = proto, nodes
        self._probes: dict[str, OnnxRuntimeRunner | None] = {}
        self._forced: OnnxRuntimeRunner | None = None

    def __enter__(self) -> _Sessions:
        return self

    def __exit__(self, *exc: object) -> None:
        self._probes.clear()
        self._forced = None

    def gates(self, site: str, x: Tensor) -> Tensor | None:
        """The artifact's gates of a site for this x; None if it has no such site, or hides them."""
        if site not in self._probes:
            node = self._nodes.get(site)
            model = instrument.gate_probe(self._proto, node) if node is not None else None
            self._probes[site] = OnnxRuntimeRunner(model) if model is not None else None
        runner = self._probes[site]
        return torch.from_numpy(runner.run({"x": x.numpy()})["open"]) if runner is not None else None

    def replay(self, arrays: Mapping[str, np.ndarray], masks: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The artifact's outputs with these gates at every site that it has."""
        if self._forced is None:
            self._forced = OnnxRuntimeRunner(instrument.with_injected_masks(self._proto, list(masks)))
        known = {instrument.mask_input(site): mask.numpy() for site, mask in masks.items()}
        return self._forced.run({**arrays, **{name: known[name] for name in self._forced.inputs if name in known}})


def _measure(
    reference: Reference,
    sample: Sample,
    free: OnnxRuntimeRunner,
    sessions: _Sessions,
    replay64: Float64Replay,
    measured: _Measured,
) -> None:
    given_outputs, calls = run_as_given(reference.model, reference.recognition, reference.signature, sample.tensors)
    outputs, gates = record_gates(reference.swapped, reference.signature, sample.tensors)
    _compare_swapped(reference, calls, measured)
    for site, gate in gates.items():
        _teacher_force(site, gate, sessions, measured)
    arrays = {name: tensor.numpy() for name, tensor in sample.tensors.items()}
    masks = {site: gate.mask for site, gate in gates.items()}
    free_outputs = free.run(arrays)
    _same_names("outputs", free_outputs, outputs)
    forced_outputs = sessions.replay(arrays, masks)
    exact = _float64_outputs(replay64, sample, masks, measured)
    for name, tensor in outputs.items():
        expected = tensor.numpy()
        given = given_outputs[name].numpy()
        bad = [
            f"{whose} output {name} on {sample.name}"
            for whose, value in (("the reference's", given), ("the artifact's", free_outputs[name]))
            if not np.isfinite(np.asarray(value, dtype=np.float64)).all()
        ]
        if given.shape != free_outputs[name].shape:
            raise ModelError(
                f"Output {name}: the artifact returns {list(free_outputs[name].shape)}, PyTorch {list(given.shape)}."
            )
        if bad:
            measured.non_finite += bad
            continue
        _keep_worst_metrics(measured, name, compare(free_outputs[name], given))
        floor = tolerances.ASSUMED_FLOOR.value
        if exact is not None:
            floor = max(relative_l2(expected, exact[name].numpy()), tolerances.SMALLEST_FLOOR.value)
        error = relative_l2(forced_outputs[name], expected)
        worst = measured.replay.get(name)
        if worst is None or error / floor > worst[0] / worst[1]:
            measured.replay[name] = (error, floor)


def _compare_swapped(
    reference: Reference, calls: Mapping[str, list[tuple[Tensor, Tensor]]], measured: _Measured
) -> None:
    modules = {m.path: m for m in reference.swapped.modules() if isinstance(m, SwappedSRU)}
    for path, pairs in calls.items():
        swapped = modules[path]
        for x, y in pairs:
            with torch.no_grad():
                expected = swapped(x)
            if swapped.conv_place == "after":
                count, distance = FlipCount(y.numel()), relative_l2(y.numpy(), expected.numpy())
            else:
                gate_input = swapped.conv(x) if swapped.conv is not None else x
                count, distance = compare_outputs(
                    y, expected, gate_input, swapped.gamma, swapped.beta, swapped.parameters_of_gate, swapped.variant
                )
            measured.swapped_flips[path] = measured.swapped_flips.get(path, FlipCount(0)) + count
            measured.swapped_distance = max(measured.swapped_distance, distance)


def _teacher_force(site: str, gate: RecordedGate, sessions: _Sessions, measured: _Measured) -> None:
    measured.variants[site] = gate.swapped
    opened, total = measured.open_gates.get(site, (0, 0))
    measured.open_gates[site] = (opened + int(gate.mask.sum()), total + gate.mask.numel())
    if not torch.isfinite(gate.x).all():
        measured.non_finite.append(f"the input of {site}")
        return
    decided = sessions.gates(site, gate.x)
    if decided is None:
        return
    count = count_flips(decided != gate.mask, gate.x, gate.swapped.parameters_of_gate, gate.swapped.variant)
    measured.teacher_forced[site] = measured.teacher_forced.get(site, FlipCount(0)) + count


def _float64_outputs(
    replay64: Float64Replay, sample: Sample, masks: Mapping[str, Tensor], measured: _Measured
) -> dict[str, Tensor] | None:
    try:
        return replay64.run(sample.tensors, masks)
    except RuntimeError as error:  # the user's forward makes float32 tensors of its own
        measured.float64_refusal = f"the reference cannot run in float64: {str(error).splitlines()[0]}"
        return None


def _keep_worst_metrics(measured: _Measured, name: str, metrics: OutputMetrics) -> None:
    worst = measured.end_to_end.get(name)
    if worst is None or metrics.relative_l2 > worst.relative_l2:
        measured.end_to_end[name] = metrics


# --- judging -----------------------------------------------------------------------------------------------------


def _same_names(what: str, artifact: Iterable[str], reference: Iterable[str]) -> None:
    if set(artifact) != set(reference):
        raise UsageError(
            f"The artifact's {what} are {', '.join(artifact)}; the reference's {', '.join(reference)}.",
            "Give the model that this artifact was exported from.",
        )


def _swapped_checks(recognition: Recognition, measured: _Measured) -> list[Check]:
    if not recognition.srus:
        return [Check("swap", "not run", "no SRU was recognised; the model was exported as it is")]
    unexplained = sum(c.unexplained for c in measured.swapped_flips.values())
    flips = sum(c.flips for c in measured.swapped_flips.values())
    gates = sum(c.gates for c in measured.swapped_flips.values())
    text = f"same input, gates changed: {flips} of {gates:,} ({unexplained} unexplained)"
    distance = measured.swapped_distance
    limit = tolerances.SWAPPED_VALUES.value
    return [
        Check("gates", "failed" if unexplained else "passed", text),
        Check(
            "values",
            "passed" if distance <= limit else "failed",
            f"values agree to {distance:.1e} relative L2 (limit {limit:.0e})",
        ),
    ]


def _static_checks(
    proto: onnx.ModelProto, nodes: Mapping[str, onnx.NodeProto], measured: _Measured
) -> dict[str, Check]:
    checks = {}
    for site, swapped in measured.variants.items():
        if site in nodes:
            checks[site] = static.check_site(proto, nodes[site], swapped)
        elif nodes:
            checks[site] = Check(static.NAME, "failed", f"{site}: the artifact has no node of this name")
        else:
            checks[site] = Check(static.NAME, "not run", "the artifact holds no scconv node")
    return checks


def _static_summary(nodes: Mapping[str, onnx.NodeProto], checks: Mapping[str, Check], measured: _Measured) -> Check:
    failed = [c.reason for c in checks.values() if c.status == "failed"]
    foreign = [site for site in nodes if site not in measured.variants]
    if foreign:
        failed.append(f"the reference has no SRU for {', '.join(foreign)}")
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return Check(static.NAME, "failed", failed[0] + more)
    if not nodes:
        return Check(static.NAME, "not run", "the artifact holds no scconv node, so its gates cannot be inspected")
    return Check(static.NAME, "passed", f"{len(nodes)} SRUs are bit for bit the reference's")


def _teacher_forced_check(measured: _Measured) -> Check:
    name = "teacher-forced gates"
    if not measured.teacher_forced:
        return Check(name, "not run", "no gate of the artifact can be read")
    total = FlipCount(0)
    for count in measured.teacher_forced.values():
        total = total + count
    text = f"same input, gates changed: {total.flips} of {total.gates:,} ({total.unexplained} unexplained)"
    if total.ill_conditioned:
        text += f", {total.ill_conditioned} more in ill-conditioned groups"
    if total.unexplained > tolerances.UNEXPLAINED_FLIPS.value:
        worst = max(measured.teacher_forced.items(), key=lambda item: item[1].unexplained)
        return Check(name, "failed", f"{text}; worst {worst[0]} with {worst[1].unexplained} unexplained")
    return Check(name, "passed", text)


def _replay_checks(measured: _Measured) -> list[Check]:
    checks = []
    limit = tolerances.REPLAY_MULTIPLE.value
    for name, (error, floor) in measured.replay.items():
        if not floor <= tolerances.LARGEST_FLOOR.value:
            noise = f"{floor:.1e} (limit {tolerances.LARGEST_FLOOR.value:g})"
            text = f"{name}: the reference's own noise is {noise}, so nothing can be judged by it"
            checks.append(Check("replay", "failed", text))
            continue
        # not (>), so that a ratio that is not a number fails
        good = error / floor <= limit
        text = f"{name}: replay error {error:.1e}, {error / floor:.1f}x the noise floor {floor:.1e} (limit {limit:g}x)"
        checks.append(Check("replay", "passed" if good else "failed", text))
    return checks


def _non_finite_checks(measured: _Measured) -> list[Check]:
    if not measured.non_finite:
        return []
    return [Check("finite", "failed", f"NaN or Inf in {'; '.join(dict.fromkeys(measured.non_finite))}; not compared")]


def _sru(site: str, measured: _Measured, statics: Mapping[str, Check]) -> SRUParity:
    swapped = measured.variants[site]
    opened, total = measured.open_gates[site]
    return SRUParity(
        site=site,
        variant=str(swapped.variant),
        static=statics[site],
        swapped=measured.swapped_flips.get(swapped.path, FlipCount(0)),
        teacher_forced=measured.teacher_forced.get(site),
        open_share=opened / total,
    )


def _output(name: str, measured: _Measured) -> OutputParity:
    error, floor = measured.replay[name]
    return OutputParity(name, measured.end_to_end[name], error, floor, not measured.float64_refusal)


def _provenance() -> dict[str, str]:
    versions = {name: version(name) for name in ("torch", "onnx", "onnxruntime", "onnxsim", "onnxscript", "numpy")}
    return {
        "scconv_deploy": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **versions,
    }
