"""Facts of engines that ran, and of plans that were compiled, as text for every report format."""

from __future__ import annotations

from scconv_deploy.records.engine import PlanTraffic
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import EngineOutput, EngineParity, ParityReport


def engine_facts(engine: EngineParity) -> dict[str, str]:
    """Facts of an engine: library and GPU, flips of its SRUs, errors of its outputs, latency."""
    kind = f", {engine.precision}," if engine.precision else ""
    facts = {
        "engine": f"{engine.backend} {engine.version}{kind} on {engine.gpu or 'a GPU that was not named'}",
        "engine sha256": engine.artifact_sha256,
    }
    counts = [sru.teacher_forced for sru in engine.srus if sru.teacher_forced is not None]
    if engine.srus and counts:
        total = sum(counts, FlipCount(0))
        changed = f"gates changed: {total.flips:,} of {total.gates:,} ({total.unexplained:,} unexplained)"
        facts["engine gates"] = f"{len(counts)} of {len(engine.srus)} SRUs compared alone, same input, {changed}"
    elif engine.srus:
        facts["engine gates"] = f"not seen: none of the {len(engine.srus)} SRUs was compared alone"
    facts |= {f"engine output {output.name}": _output(output) for output in engine.outputs}
    if engine.latency is not None:
        facts["engine latency"] = str(engine.latency)
    return facts


def _output(output: EngineOutput) -> str:
    metrics = output.metrics
    top1 = "" if metrics.top1_agreement is None else f", top-1 agrees on {metrics.top1_agreement:.0%}"
    assumed = "" if output.noise_measured else " (assumed)"
    apart = f"relative L2 {metrics.relative_l2:.1e}, max abs {metrics.max_abs:.1e}"
    return f"{apart}, noise of explained gate changes {output.noise:.1e}{assumed}{top1}"


def plan_facts(report: ParityReport) -> dict[str, str]:
    """Memory traffic of each compiled plan, and how many times the baseline's it is."""
    bases = {plan.backend: plan for plan in report.plans if plan.baseline}
    return {
        f"plan {plan.name}": f"{plan}, weights not counted{_times(plan, bases.get(plan.backend))}"
        for plan in report.plans
    }


def _times(plan: PlanTraffic, base: PlanTraffic | None) -> str:
    if base is None or plan.baseline or not base.bytes_moved or plan.bytes_moved is None:
        return ""
    moved, launches = plan.bytes_moved / base.bytes_moved, plan.launches / base.launches
    return f"; {moved:.2f}x the bytes and {launches:.1f}x the kernels of {base.name}"
