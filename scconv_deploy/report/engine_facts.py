"""Facts of an engine that ran, as text for every report format."""

from __future__ import annotations

from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import EngineOutput, EngineParity


def engine_facts(engine: EngineParity) -> dict[str, str]:
    """Facts of an engine: library and GPU, flips of its SRUs, errors of its outputs, latency."""
    facts = {
        "engine": f"{engine.backend} {engine.version} on {engine.gpu or 'a GPU that was not named'}",
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
