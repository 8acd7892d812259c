"""Static check of SRU nodes: parameters, attributes and function bodies, bit for bit.

Only this check is sure to find a cut that is off by one unit in the last place, or ``>`` in place of ``>=``: on most
inputs no gate shows them.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property

import numpy as np
import onnx
from onnx import numpy_helper

from scconv_deploy.gate.margins import LARGEST_WEIGHT_ERROR
from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import (
    ATTRIBUTES,
    DOMAIN,
    DOMAIN_VERSION,
    MASK_FORMS,
    OPSETS,
    VARIANT,
    WEIGHT,
    FunctionKey,
)
from scconv_deploy.graph.functions import fingerprint, function_proto
from scconv_deploy.records.parity import Check
from scconv_deploy.records.tolerances import FOLDED_ULPS
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun, ArtifactRuns
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.reference.run import ReferenceRun, ReferenceSource, Site

NAME = "static"
UNWEIGHTED = "unweighted"


class Static(ArtifactCheck):
    """Static check of all SRUs, including those of the reference without a node."""

    def __init__(self, source: ReferenceSource, shared: Shared, runs: ArtifactRuns) -> None:
        self._source, self._shared, self._model, self._nodes = source, shared, runs.proto, runs.nodes

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        missing = [name for name in run.sites if name not in self._nodes]
        if run.deep and self._nodes and missing:
            self._shared.sites.add_missing(missing, self._source.redundant(run, missing, list(self._nodes)))

    @cached_property
    def by_site(self) -> dict[str, Check]:
        """Static check of every SRU of the reference by site; valid after all samples have run."""
        return {name: self._check(name, found.site) for name, found in self._shared.sites.gates.items()}

    def _check(self, name: str, site: Site) -> Check:
        redundant = self._shared.sites.redundant
        if name in self._nodes:
            return check_site(self._model, self._nodes[name], site)
        if not self._nodes:
            return Check(NAME, "not run", "the artifact holds no scconv node")
        if name in redundant:
            return Check(NAME, "not run", f"{name} has no node: {redundant[name]}")
        reason = f"{name} has no node: the artifact computes it otherwise, so its parameters cannot be inspected"
        return Check(NAME, "not run", reason)

    def checks(self) -> list[Check]:
        """One check for all SRUs, and one for SRUs without a node if others have one."""
        unread = sorted(n for n in self.by_site if n not in self._nodes and n not in self._shared.sites.redundant)
        if not unread or not self._nodes:  # without any node the summary says it
            return [self._summary(unread)]
        why = "no node: the artifact computes it otherwise, so its parameters and gates cannot be inspected"
        return [self._summary(unread), Check(NAME, "not run", f"{', '.join(unread)}: {why}")]

    def _summary(self, unread: list[str]) -> Check:
        checks = self.by_site
        failed = [c.reason for c in checks.values() if c.status == "failed"] + whole_model(self._model)
        if failed:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            return Check(NAME, "failed", failed[0] + more)
        if not self._nodes:
            return Check(NAME, "not run", "the artifact holds no scconv node, so its gates cannot be inspected")
        if not checks:
            return Check(NAME, "not run", "the reference has no SRU module to compare with")
        same = sum(c.status == "passed" for c in checks.values())
        if not same:
            return Check(NAME, "not run", next(c.reason for c in checks.values()))
        without = f"; without a node: {', '.join(unread)}" if unread else ""
        without += "".join(f"; {c.reason}" for n, c in checks.items() if n in self._nodes and c.status == "not run")
        return Check(NAME, "passed", f"{same} SRUs are bit for bit the reference's{without}")


class Rewritten(ArtifactCheck):
    """Check that names SRUs read from the graph that match no module of the reference."""

    def __init__(self, shared: Shared, runs: ArtifactRuns) -> None:
        self._shared, self._nodes = shared, runs.nodes

    def checks(self) -> list[Check]:
        found = [site for site in self._nodes if site not in self._shared.sites.gates]
        why = "read from the graph, and no SRU of the reference stands beside it; judged by the outputs alone"
        return [Check("rewritten", "not run", f"{', '.join(found)}: {why}")] if found else []


def check_site(model: onnx.ModelProto, node: onnx.NodeProto, site: Site) -> Check:
    """Compare a node with the parameters, attributes and function computed from the reference."""
    problems = [
        *_operator(node, site),
        *_parameters(model, node, site),
        *_attributes(node, site),
        *_body(model, node, site),
    ]
    if problems and problems == _parameters(model, node, site):
        reason = ""
        if _is_folded(model, node, site):
            reason = "a simplifier merged gamma and its weight into one constant"
        elif _has_own_weight(model, node, site):
            reason = "the file has sum(gamma) added up in another order"
        if reason:
            reason += ", so its parameters are within their rounding"
            return Check(NAME, "not run", f"{node.name}: {reason}; rewrite --reference restores them")
    if problems:
        return Check(NAME, "failed", f"{node.name}: {'; '.join(problems)}")
    return Check(NAME, "passed", "parameters, attributes and function are bit for bit the reference's")


def whole_model(model: onnx.ModelProto) -> list[str]:
    """Problems of the whole model: redefined standard operators, shared node names, another version of our domain."""
    problems = [
        f"the artifact redefines the standard operator {function.name}"
        for function in model.functions
        if function.domain in ("", "ai.onnx")
    ]
    sites = Counter(instrument.site_of(node) for node in model.graph.node if node.domain == DOMAIN)
    problems += [
        f"{count} nodes are called {site}, so only one can be judged" for site, count in sites.items() if count > 1
    ]
    versions = [o.version for o in model.opset_import if o.domain == DOMAIN]
    if any(number != DOMAIN_VERSION for number in versions):
        problems.append(f"the domain {DOMAIN} has version {versions[0]}, expected {DOMAIN_VERSION}")
    return problems


def _operator(node: onnx.NodeProto, site: Site) -> list[str]:
    expected = site.operator
    return [] if node.op_type == expected else [f"operator {node.op_type}, expected {expected}"]


def _parameters(model: onnx.ModelProto, node: onnx.NodeProto, site: Site) -> list[str]:
    stored = instrument.parameters(model, node)
    expected = site.parameters
    given = list(node.input[1:])
    if len(given) != len(expected):
        return [f"{len(given)} parameters, expected {len(expected)}"]
    problems = []
    for actual_name, (name, value) in zip(given, expected.items(), strict=True):
        if actual_name not in stored:
            problems.append(f"{name} is not a constant")
            continue
        actual = numpy_helper.to_array(stored[actual_name])
        if actual.dtype != value.dtype or actual.shape != value.shape:
            problems.append(f"{name} is {actual.dtype}{list(actual.shape)}, expected {value.dtype}{list(value.shape)}")
        elif actual.tobytes() != value.tobytes():
            differing = int(np.sum(actual.view(np.uint32) != value.view(np.uint32)))
            problems.append(f"{name} differs in {differing} of {value.size} channels")
    return problems


def _is_folded(model: onnx.ModelProto, node: onnx.NodeProto, site: Site) -> bool:
    """Whether a node read from a folded graph (see its variant) equals the reference up to float32 rounding."""
    variant = _metadata(node, VARIANT).split(" ")[0]  # after the space: the order of the sum
    stored = instrument.parameters(model, node)
    if UNWEIGHTED not in variant.split("-") or len(stored) != len(site.parameters):
        return False
    pairs = zip((numpy_helper.to_array(tensor) for tensor in stored.values()), site.parameters.values(), strict=True)
    return all(
        found.shape == value.shape and bool(np.allclose(found, value, rtol=FOLDED_ULPS * 2.0**-23, atol=0))
        for found, value in pairs
    )


def _has_own_weight(model: onnx.ModelProto, node: onnx.NodeProto, site: Site) -> bool:
    """Whether a node with the file's own gate weight equals the reference up to the order of the sum."""
    stored = instrument.parameters(model, node)
    if not _metadata(node, WEIGHT) or not 0 < site.weight_error <= LARGEST_WEIGHT_ERROR:
        return False
    if len(stored) != len(site.parameters):
        return False
    off = 2 * site.weight_error + FOLDED_ULPS * 2.0**-23  # each order is off by at most the error
    for tensor, (name, value) in zip(stored.values(), site.parameters.items(), strict=True):
        found = numpy_helper.to_array(tensor)
        size = {"cut": site.form.cut_scale, "scale": np.abs(value), "shift": np.abs(value)}.get(name, 0.0)
        if found.shape != value.shape:
            return False
        with np.errstate(invalid="ignore"):  # the cut is infinite where gamma is 0
            near = (found == value) | (np.abs(found.astype(np.float64) - value) <= off * size)
        if not near.all():
            return False
    return True


def _metadata(node: onnx.NodeProto, key: str) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == key), "")


def _attributes(node: onnx.NodeProto, site: Site) -> list[str]:
    actual = instrument.attributes(node)
    problems = []
    for name, value in site.attributes.items():
        wanted: object = float(np.float32(value)) if isinstance(value, float) else value
        if actual.get(name) != wanted:
            problems.append(f"{name} is {actual.get(name)}, expected {value}")
    problems += [f"unknown attribute {name}" for name in actual if name not in ATTRIBUTES]
    return problems


def _body(model: onnx.ModelProto, node: onnx.NodeProto, site: Site) -> list[str]:
    function = instrument.function_of(model, node)
    if function is None:
        return ["its function is missing"]
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset not in OPSETS:
        return [f"opset {opset} has no known function bodies"]
    bodies = (
        [site.straddle] if site.straddle else [False, True]
    )  # the body for straddling groups is right for whole ones too
    known = {
        fingerprint(function_proto(FunctionKey(site.operator, straddle, form, opset)))
        for straddle in bodies
        for form in MASK_FORMS
    }
    return [] if fingerprint(function) in known else ["its function body is not the one of the contract"]
