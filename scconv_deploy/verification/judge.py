"""Checks of what was measured; what fails here fails the artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping

import onnx

from scconv_deploy.gate import Recognition
from scconv_deploy.report.records import Check
from scconv_deploy.rewrite.nodes import REWRITTEN
from scconv_deploy.verification import static, tolerances
from scconv_deploy.verification.measure import AgainstNoise, Measured, repeated, total_flips


def swapped_checks(recognition: Recognition, measured: Measured) -> list[Check]:
    """The link from PyTorch as given to PyTorch with its SRUs swapped."""
    if not recognition.srus:
        return [Check("swap", "not run", "no SRU was recognised; the model was exported as it is")]
    total = total_flips(measured.swapped_flips)
    apart, limit = measured.swapped_distance, tolerances.SWAPPED_VALUES.value
    return [
        Check(
            "gates",
            "failed" if total.unexplained else "passed",
            f"same input, gates changed: {total.flips} of {total.gates:,} ({total.unexplained} unexplained)",
        ),
        Check(
            "values",
            "passed" if apart <= limit else "failed",
            f"values agree to {apart:.1e} relative L2 (limit {limit:.0e})",
        ),
        *_against_floor("whole model", "swapped against given", measured.swapped_error),
    ]


def static_checks(proto: onnx.ModelProto, nodes: Mapping[str, onnx.NodeProto], measured: Measured) -> dict[str, Check]:
    """The static link of every SRU of the reference."""
    checks = {}
    for site, swapped in measured.variants.items():
        if site in nodes:
            checks[site] = static.check_site(proto, nodes[site], swapped)
        elif not nodes:
            checks[site] = Check(static.NAME, "not run", "the artifact holds no scconv node")
        elif site in measured.redundant:
            checks[site] = Check(static.NAME, "not run", f"{site} has no node: {measured.redundant[site]}")
        else:
            checks[site] = Check(static.NAME, "failed", f"{site}: the artifact has no node of this name")
    return checks


def static_summary(
    proto: onnx.ModelProto, nodes: Mapping[str, onnx.NodeProto], checks: Mapping[str, Check], measured: Measured
) -> Check:
    """One check for all SRUs."""
    failed = [c.reason for c in checks.values() if c.status == "failed"] + static.foreign_functions(proto)
    foreign = [site for site in nodes if site not in measured.variants and site not in _rewritten(proto)]
    if foreign:
        failed.append(f"the reference has no SRU for {', '.join(foreign)}")
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return Check(static.NAME, "failed", failed[0] + more)
    if not nodes:
        return Check(static.NAME, "not run", "the artifact holds no scconv node, so its gates cannot be inspected")
    if not checks:
        return Check(static.NAME, "not run", "the reference has no SRU module to compare with")
    same = sum(c.status == "passed" for c in checks.values())
    return Check(static.NAME, "passed", f"{same} SRUs are bit for bit the reference's")


def rewritten_checks(proto: onnx.ModelProto, nodes: Mapping[str, onnx.NodeProto], measured: Measured) -> list[Check]:
    """SRUs that were read from the graph: no module of the reference stands beside them."""
    found = [site for site in nodes if site in _rewritten(proto) and site not in measured.variants]
    reason = f"{', '.join(found)}: read from the graph, for no module was recognised; judged by the outputs alone"
    return [Check("rewritten", "not run", reason)] if found else []


def _rewritten(proto: onnx.ModelProto) -> list[str]:
    text = next((entry.value for entry in proto.metadata_props if entry.key == REWRITTEN), "[]")
    try:
        sites = json.loads(text)
    except ValueError:  # somebody else's file
        return []
    return [str(site) for site in sites] if isinstance(sites, list) else []


def teacher_forced_check(measured: Measured) -> Check:
    """Gates of the artifact, each SRU fed the reference's input."""
    name = "teacher-forced gates"
    if not measured.teacher_forced:
        return Check(name, "not run", "no gate of the artifact can be read")
    total = total_flips(measured.teacher_forced)
    text = f"same input, gates changed: {total.flips} of {total.gates:,} ({total.unexplained} unexplained)"
    if total.ill_conditioned:
        text += f", {total.ill_conditioned} more in ill-conditioned groups"
    if total.unexplained > tolerances.UNEXPLAINED_FLIPS.value:
        worst = max(measured.teacher_forced.items(), key=lambda item: item[1].unexplained)
        return Check(name, "failed", f"{text}; worst {worst[0]} with {worst[1].unexplained} unexplained")
    return Check(name, "passed", text)


def replay_checks(measured: Measured) -> list[Check]:
    """Each output with the reference's gates, against the noise floor."""
    return _against_floor("replay", "replay error", measured.replay)


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


def _against_floor(name: str, what: str, measured: Mapping[str, AgainstNoise]) -> list[Check]:
    checks = []
    limit = tolerances.REPLAY_MULTIPLE.value
    for output, found in measured.items():
        error, floor = found.error, found.floor
        if not floor <= found.largest_floor:
            noise = f"{floor:.1e} (limit {found.largest_floor:g})"
            text = f"{output}: the reference's own noise is {noise}, so nothing can be judged by it"
            checks.append(Check(name, "failed", text))
            continue
        # not (>), so that a ratio that is not a number fails
        good = found.ratio <= limit
        text = f"{output}: {what} {error:.1e}, {found.ratio:.1f}x the noise floor {floor:.1e} (limit {limit:g}x)"
        checks.append(Check(name, "passed" if good else "failed", text))
    return checks
