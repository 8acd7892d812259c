"""Checks of what was measured; what fails here fails the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx

from scconv_deploy.graph import instrument
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.verification.checks import static
from scconv_deploy.verification.checks.gates import gates_check, unexplained
from scconv_deploy.verification.measure import FLOAT32, AgainstNoise, Measured, repeated, total_flips


def swapped_checks(recognised: bool, measured: Measured) -> list[Check]:
    """The link from PyTorch as given to PyTorch with its SRUs swapped."""
    if not recognised:
        return [Check("swap", "not run", "no SRU was recognised; the model was exported as it is")]
    total = total_flips(measured.swapped_flips)
    apart, limit = measured.swapped_distance, measured.limits["swapped_values"].value
    return [
        Check(
            "gates",
            "failed" if total.unexplained > measured.limits["unexplained_flips"].value else "passed",
            f"same input, gates changed: {total.flips:,} of {total.gates:,} ({total.unexplained:,} unexplained)"
            + measured.coverage,
            (unexplained(total, measured),),
        ),
        Check(
            "values",
            "passed" if apart <= limit else "failed",
            f"values agree to {apart:.1e} relative L2 (limit {limit:.0e}){measured.coverage}",
            (Quantity("swapped_values", apart, limit),),
        ),
        *_against_floor("whole model", "swapped against given", measured.swapped_error, measured),
    ]


def static_checks(proto: onnx.ModelProto, nodes: Mapping[str, onnx.NodeProto], measured: Measured) -> dict[str, Check]:
    """The static link of every SRU of the reference."""
    checks = {}
    for name, found in measured.sites.items():
        if name in nodes:
            checks[name] = static.check_site(proto, nodes[name], found.site)
        elif not nodes:
            checks[name] = Check(static.NAME, "not run", "the artifact holds no scconv node")
        elif name in measured.redundant:
            checks[name] = Check(static.NAME, "not run", f"{name} has no node: {measured.redundant[name]}")
        else:
            reason = f"{name} has no node: the artifact computes it otherwise, so its parameters cannot be inspected"
            checks[name] = Check(static.NAME, "not run", reason)
    return checks


def static_summary(
    proto: onnx.ModelProto, nodes: Mapping[str, onnx.NodeProto], checks: Mapping[str, Check], measured: Measured
) -> Check:
    """One check for all SRUs."""
    failed = [c.reason for c in checks.values() if c.status == "failed"] + static.whole_model(proto)
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return Check(static.NAME, "failed", failed[0] + more)
    if not nodes:
        return Check(static.NAME, "not run", "the artifact holds no scconv node, so its gates cannot be inspected")
    if not checks:
        return Check(static.NAME, "not run", "the reference has no SRU module to compare with")
    same = sum(c.status == "passed" for c in checks.values())
    if not same:
        return Check(static.NAME, "not run", next(c.reason for c in checks.values()))
    left = sorted(site for site in checks if site not in nodes and site not in measured.redundant)
    without = f"; without a node: {', '.join(left)}" if left else ""
    without += "".join(f"; {c.reason}" for site, c in checks.items() if site in nodes and c.status == "not run")
    return Check(static.NAME, "passed", f"{same} SRUs are bit for bit the reference's{without}")


def unread_checks(nodes: Mapping[str, onnx.NodeProto], checks: Mapping[str, Check], measured: Measured) -> list[Check]:
    """SRUs of the reference without a node, beside others that have one; without any the summary says so."""
    left = sorted(name for name in checks if name not in nodes and name not in measured.redundant)
    if not left or not nodes:
        return []
    why = "no node: the artifact computes it otherwise, so its parameters and gates cannot be inspected"
    return [Check(static.NAME, "not run", f"{', '.join(left)}: {why}")]


def rewritten_checks(nodes: Mapping[str, onnx.NodeProto], measured: Measured) -> list[Check]:
    """SRUs that were read from the graph: no module of the reference stands beside them."""
    found = [site for site in nodes if site not in measured.sites]
    why = "read from the graph, and no SRU of the reference stands beside it; judged by the outputs alone"
    return [Check("rewritten", "not run", f"{', '.join(found)}: {why}")] if found else []


def quantized_checks(
    proto: onnx.ModelProto, quantization: str, statics: Mapping[str, Check], measured: Measured
) -> list[Check]:
    """Of a quantised artifact: its SRUs, which are float32 whatever is around them; its outputs are not judged.

    Every tensor between quantisers is rounded to some hundred values: no limit for the rounding of floats says what
    that may cost, and weights are stored as integers.
    """
    apart = ", ".join(f"{name} is {found.relative_l2:.1e} away" for name, found in measured.end_to_end.items())
    reason = f"the parity of {quantization} is not judged by this version; relative L2 from the reference: {apart}"
    return [
        static_summary(proto, instrument.sites(proto), statics, measured),
        *unread_checks(instrument.sites(proto), statics, measured),
        teacher_forced_check(measured),
        *second_opinion_checks(measured),
        Check("quantization", "not run", reason),
        *contract_checks(measured),
        *finite_checks(measured),
    ]


def teacher_forced_check(measured: Measured) -> Check:
    """Gates of the artifact, each SRU fed the reference's input."""
    counts = {n: s.teacher_forced for n, s in measured.sites.items() if s.teacher_forced is not None}
    unfed = [name for name in measured.sites if name in measured.unfed and name not in counts]
    coverage = measured.coverage
    if unfed and not counts:
        return Check("teacher-forced gates", "not run", "the reference kept no input of an SRU")
    if unfed:
        coverage += f", on {len(counts)} of {len(measured.sites)} SRUs: the reference kept no input of the others"
    else:
        coverage += _of_srus(counts, measured)
    return _gates("teacher-forced gates", "same input, gates changed", counts, measured, coverage)


def free_running_check(measured: Measured) -> Check:
    """Gates of the artifact as it runs."""
    counts = {n: s.free_running for n, s in measured.sites.items() if s.free_running is not None}
    return _gates("free-running gates", "running free, gates changed", counts, measured, _of_srus(counts, measured))


def _of_srus(counts: Mapping[str, FlipCount], measured: Measured) -> str:
    """Of how many SRUs gates were compared, where it is not all of those that the artifact has."""
    there = [name for name in measured.sites if name not in measured.redundant]
    return f", on {len(counts)} of {len(there)} SRUs" if len(counts) < len(there) else ""


def second_opinion_checks(measured: Measured) -> list[Check]:
    """The artifact's SRUs in onnx.reference, on small inputs."""
    name = "second opinion"
    asked = {n: s.second_opinion for n, s in measured.sites.items() if s.second_opinion is not None}
    if not asked:
        return [Check(name, "not run", measured.opinion_refusal)] if measured.opinion_refusal else []
    counts = {n: count for n, (count, _) in asked.items()}
    check = _gates(name, "onnx.reference, gates changed", counts, measured, _of_srus(counts, measured))
    worst, (_, apart) = max(asked.items(), key=lambda item: item[1][1])
    limit = measured.limits["second_opinion"].value
    decided = (*check.quantities, Quantity("second_opinion", apart, limit))
    if check.status == "failed" or decided[-1].within:
        return [replace(check, quantities=decided)]
    reason = f"onnx.reference: values of {worst} are {apart:.1e} apart (limit {limit:.0e})"
    return [Check(name, "failed", reason, decided)]


def _gates(name: str, what: str, counts: Mapping[str, FlipCount], measured: Measured, coverage: str = "") -> Check:
    if not counts:
        return Check(name, "not run", "no gate of the artifact can be read")
    return gates_check(name, what, counts, measured, coverage)


def replay_checks(measured: Measured) -> list[Check]:
    """Each output with the reference's gates, against the noise floor."""
    why = "no rounded reference, and float32's own noise is no ruler for half; what rounding costs is judged"
    unruled = [Check("replay", "not run", f"{output}: {why}") for output in measured.unruled]
    return _against_floor("replay", "replay error", measured.replay, measured) + unruled


def rounding_checks(measured: Measured) -> list[Check]:
    """What half costs each output: information, with a budget."""
    checks = []
    for output, found in measured.rounding.items():
        name = f"half_budget.{measured.data.name}"
        limit, cost = measured.limits[name].value, found.relative_l2
        words = [f"{found.snr_db:.0f} dB"] if found.snr_db is not None else []
        words += [f"top-1 agrees {found.top1_agreement:.1%}"] if found.top1_agreement is not None else []
        said = f" ({', '.join(words)})" if words else ""
        text = f"{output}: rounding costs {cost:.1e} relative L2{said} (limit {limit:g}){measured.coverage}"
        good = cost <= limit
        text += "" if good else ": this network is another one in half; --keep leaves layers in float32"
        checks.append(Check("rounding", "passed" if good else "failed", text, (Quantity(name, cost, limit),)))
    return checks


def native_checks(measured: Measured) -> list[Check]:
    """The half file in the runtime by itself, which rounds at other places than the file says."""
    name = "runtime"
    if not measured.native:
        return [Check(name, "not run", measured.native_refusal)] if measured.native_refusal else []
    limit = measured.largest_multiple("replay_multiple")
    output, worst = max(measured.native.items(), key=lambda item: item[1].badness)
    good = worst.ratio <= limit
    text = f"ONNX Runtime by itself: {output}: {worst.error:.1e}, {worst.ratio:.1f}x the rounding {worst.floor:.1e}"
    decided = (Quantity("replay_multiple", worst.ratio, limit),)
    return [Check(name, "passed" if good else "failed", f"{text} (limit {limit:.3g}x)", decided)]


def finite_checks(measured: Measured) -> list[Check]:
    """NaN and Inf by the tensors' names."""
    if not measured.non_finite:
        return []
    return [Check("finite", "failed", f"NaN or Inf in {repeated(measured.non_finite)}; not compared")]


def contract_checks(measured: Measured) -> list[Check]:
    """Shape, type and order of the outputs."""
    if not measured.contract:
        return []
    return [Check("contract", "failed", repeated(measured.contract))]


def layers_check(measured: Measured) -> list[Check]:
    """The input of every SRU with the reference's gates, which sees what later layers would hide."""
    if not measured.layers:
        return []
    multiple, limit = measured.multiple, measured.largest_multiple(measured.multiple)
    largest = measured.limits[measured.largest_floor(measured.data)].value
    layers = [layer for layer in measured.layers.values() if layer.floor <= largest]
    left = [layer for layer in layers if not layer.ratio <= limit]
    noisy = len(measured.layers) - len(layers)
    unjudged = f"; {noisy} not judged, for their own noise is above {largest:g}" if noisy else ""
    if not layers:
        return [Check("layers", "not run", unjudged.removeprefix("; "))]
    decided = (Quantity(multiple, max(layer.ratio for layer in layers), limit),)
    if not left:
        text = f"{len(layers)} inputs of SRUs stay within {limit:.3g}x their noise{measured.coverage}{unjudged}"
        return [Check("layers", "passed", text, decided)]
    first = left[0]
    where = f"{first.name} ({first.module or 'module unknown'})"
    noise = f"{first.ratio:.1f}x the noise floor {first.floor:.1e} (limit {limit:.3g}x)"
    more = f", and {len(left) - 1} more" if len(left) > 1 else ""
    return [Check("layers", "failed", f"{where}: {first.relative_l2:.1e}, {noise}{more}", decided)]


def _against_floor(name: str, what: str, outputs: Mapping[str, AgainstNoise], measured: Measured) -> list[Check]:
    checks = []
    for output, found in outputs.items():
        error, floor, limit = found.error, found.floor, measured.largest_multiple(found.multiple)
        jumped = measured.others.jumped.get(output) if name == "replay" else None
        if jumped is not None and jumped.undecided(limit):
            checks.append(Check(name, "not run", f"{output} {jumped.words}"))
            continue
        decided = (
            Quantity(found.floor_name, floor, found.largest_floor),
            Quantity(found.multiple, found.ratio, limit),
        )
        if not floor <= found.largest_floor:
            noise = f"{floor:.1e} (limit {found.largest_floor:g})"
            text = f"{output}: the reference's own noise is {noise}, so nothing can be judged by it"
            # which of two scores is larger, half need not tell: that says nothing of the file, one way or the other
            tied = name == "replay" and measured.data != FLOAT32 and found.floor_name == "largest_floor.index"
            checks.append(Check(name, "not run", text) if tied else Check(name, "failed", text, decided))
            continue
        # not (>), so that a ratio that is not a number fails
        good = found.ratio <= limit
        text = f"{output}: {what} {error:.1e}, {found.ratio:.1f}x the noise floor {floor:.1e} (limit {limit:.3g}x)"
        text += measured.coverage
        checks.append(Check(name, "passed" if good else "failed", text, decided))
    return checks
