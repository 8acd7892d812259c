"""Apply the rewrite rules to a graph; record fused SRUs, changed tensors and near misses.

Matching, checking and replacing are onnxscript's. Its driver is not used: it drops the reasons of refusals and writes
rule names into the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedFunctionsPass, RemoveUnusedNodesPass
from onnxscript.rewriter import RewriteRule

from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.swap import site_name
from scconv_deploy.graph.contract import DOMAIN, MODULE, SITE, CruForm, MaskForm
from scconv_deploy.graph.cru import module_of
from scconv_deploy.graph.nodes import add_functions
from scconv_deploy.rewrite.rules import cru_halves, cru_merged, gamma_sum, mask_arithmetic, sigmoid_threshold, sru


@dataclass(frozen=True)
class NearMiss:
    """A candidate that a rule refused: node, rule and reason."""

    node: str
    rule: str
    reason: str


@dataclass(frozen=True, eq=False)
class Fused:
    """An SRU that became a node.

    Attributes:
        site: the node's name.
        x, y: names of its input and its output.
        mask, mask_opened: name of the comparison that decided its gates, and its value where they are open.
        gate: its variant with gamma and beta.
        note: assumptions of the reading; "" for none.
    """

    site: str
    gate: Gate
    x: str
    y: str
    mask: str
    mask_opened: bool
    note: str = ""


@dataclass
class Applied:
    """Result of one run of the rules.

    Attributes:
        changed: names of the replaced tensors by rule, without those of CRUs.
        crus: names of the replaced places of CRUs by rule: their modules, or tensors if the file does not say.
        near_misses: candidates of a gate that were refused.
        left_alone: CRUs that stay as they are. Nothing is wrong with them: they could only be faster.
    """

    fused: list[Fused] = field(default_factory=list)
    changed: dict[str, list[str]] = field(default_factory=dict)
    crus: dict[str, list[str]] = field(default_factory=dict)
    near_misses: list[NearMiss] = field(default_factory=list)
    left_alone: list[NearMiss] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.gates or self.crus)

    @property
    def gates(self) -> bool:
        """Whether a gate was rewritten."""
        return bool(self.fused or self.changed)

    def lines(self) -> list[str]:
        """Fused SRUs and changed places as lines of a stage record."""
        fused = [
            f"{f.site}: {DOMAIN} node [{f.gate.variant.label}]" + (f"; {f.note}" if f.note else "") for f in self.fused
        ]
        changed = [f"{rule}: {len(names)} places" for rule, names in self.changed.items()]
        return fused + changed + [f"{rule}: {', '.join(names)}" for rule, names in self.crus.items()]

    def refusals(self) -> list[tuple[str, str]]:
        """Refused candidates as (place, reason) of a stage record."""
        return [(f"{miss.node} ({miss.rule})", miss.reason) for miss in (*self.near_misses, *self.left_alone)]


class _Refusals:
    """Stand-in for onnxscript's MatchingTracer that collects every match refused by a check."""

    def __init__(self) -> None:
        self.found: list[tuple[ir.Node, str, Sequence[Any]]] = []

    def log(self, rule: Any, container: Any, node: ir.Node, match: Any, status: Any) -> None:
        if match.reason and status.name in ("CONDITION_FAILED", "REPLACEMENT_FAILED"):
            self.found.append((node, match.reason, match.failure_nodes_and_values))


def apply_rules(model: ir.Model, mask_form: MaskForm, opset: int, cru: CruForm = "halves") -> Applied:
    """Rewrite the main graph in place; SRU nodes get their functions.

    Args:
        model: with inferred types and shapes.
        opset: the model's own.
        cru: form of the CRUs.
    """
    applied = Applied()
    existing = {id(node) for node in model.graph if node.domain == DOMAIN}
    reported: set[int] = set()
    readings = sru.read_all(model)
    for name, rules in rules_for(mask_form, cru).items():
        refusals = _Refusals()
        replaced = _apply(model, rules, refusals)
        names = [value for value, _ in replaced]
        if name in CRU_RULES:
            applied.left_alone += [NearMiss(module_of(node), name, reason) for node, reason, _ in refusals.found]
            if replaced:
                applied.crus[name] = [module or value for value, module in replaced]
                RemoveUnusedNodesPass()(model)
            continue
        for node, reason, sources in refusals.found:
            reported |= {id(source) for source in sources}
            applied.near_misses.append(NearMiss(_name(node), name, reason))
        if names:
            RemoveUnusedNodesPass()(model)
        if name == sru.NAME:
            missed = [NearMiss(node, name, reason) for node, reason in sru.uncrossed_gates(model, reported)]
            applied.near_misses += missed
            new = [node for node in model.graph if node.domain == DOMAIN and id(node) not in existing]
            applied.fused = _name_sites(model, new, readings)
        elif names:
            applied.changed[name] = names
    if applied:
        model.graph.sort()
        NameFixPass()(model)
        add_functions(model, mask_form, opset)
        RemoveUnusedFunctionsPass()(model)
    return applied


def _apply(model: ir.Model, rules: Sequence[RewriteRule], refusals: _Refusals) -> list[tuple[str, str]]:
    """Try each rule on each node. Returns the name and the module ("" if unknown) of each replaced value."""
    graph = model.graph
    replaced: list[tuple[str, str]] = []
    for node in list(graph):
        if node.graph is not graph or node.domain not in ("", "ai.onnx"):
            continue
        for rule in rules:
            delta = rule.try_rewrite(model, graph, node, tracer=refusals)
            if delta is None:
                continue
            for value in delta.new_initializers:
                _register(graph, value)
            module = node.metadata_props.get(MODULE, "")
            for new in delta.new_nodes if module else ():
                new.metadata_props.setdefault(MODULE, module)
            ir.convenience.replace_nodes_and_values(
                graph, node, [], delta.new_nodes, delta.match.outputs, delta.new_outputs
            )
            replaced += [(value.name or "", module) for value in delta.new_outputs]
            break
    return replaced


def _register(graph: ir.Graph, value: ir.Value) -> None:
    """Add an initializer under a free name."""
    name, count = value.name or "constant", 1
    while name in graph.initializers:
        count += 1
        name = f"{value.name}#{count}"
    value.name = name
    graph.register_initializer(value)


def _name_sites(model: ir.Model, new: Sequence[ir.Node], readings: Mapping[str, sru.SRUReading]) -> list[Fused]:
    """Name new SRU nodes after their modules, in the graph's order; further calls of a module get ``#2`` and so on."""
    taken: dict[str, int] = {node.name: 1 for node in model.graph if node.domain == DOMAIN and node.name}
    taken |= {node.name: 0 for node in new if node.name}
    fused = []
    for node in new:
        base = node.name or sru.NAME
        taken[base] = taken.get(base, 0) + 1
        node.name = node.metadata_props[SITE] = site_name(base, taken[base])
        note = node.metadata_props.pop(sru.NOTE, "")
        y = node.metadata_props.pop(sru.END, "")
        read = readings[y]
        fused.append(Fused(node.name, read.gate, read.x.name or "", y, read.mask.name or "", read.mask_opened, note))
    return fused


def _name(node: ir.Node) -> str:
    return node.metadata_props.get(SITE) or node.name or node.outputs[0].name or node.op_type


RULES: dict[str, Sequence[RewriteRule]] = {
    sru.NAME: sru.RULES,
    gamma_sum.NAME: gamma_sum.RULES,
    sigmoid_threshold.NAME: sigmoid_threshold.RULES,
    mask_arithmetic.NAME: mask_arithmetic.RULES,
}
CRU_RULES: dict[str, Sequence[RewriteRule]] = {
    cru_merged.NAME: cru_merged.RULES,
    cru_halves.NAME: cru_halves.RULES,
}


def rules_for(mask_form: MaskForm, cru: CruForm) -> dict[str, Sequence[RewriteRule]]:
    """The rules for a mask form and a form of CRUs, by name.

    In the mask form ``multiply``, products with a mask stay products.
    """
    of_gates = {name: rules for name, rules in RULES.items() if mask_form == "where" or name != mask_arithmetic.NAME}
    of_crus = {} if cru == "as-is" else CRU_RULES
    return of_gates | {name: rules for name, rules in of_crus.items() if cru == "merged" or name != cru_merged.NAME}
