"""Matching of SRU nodes in a rewritten file to modules of the PyTorch model that the file was exported from.

:mod:`.verification.onnx.matching` finds the module of each node. This file also restores what an exporter or simplifier
removed from a node: the module's own gamma.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import GateVariant
from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import VARIANT, WEIGHT
from scconv_deploy.model.prepare import Reference
from scconv_deploy.model.replay import RecordedGate, record_gates
from scconv_deploy.rewrite.apply import Applied, Fused, NearMiss
from scconv_deploy.rewrite.reader.variant import FOLDED, NO_EPS, REORDERED, weight_error
from scconv_deploy.rewrite.rules import sru
from scconv_deploy.verification.onnx import matching
from scconv_deploy.verification.onnx.parity import known_sites

_SUMS = ("sum", "torch_sum")


def adopt(proto: onnx.ModelProto, applied: Applied, reference: Reference, names: matching.Names) -> list[str]:
    """Name SRU nodes after the reference's modules, in place.

    A node matches a module if their parameters are equal bit for bit. If the file holds ``gamma * w`` as one constant,
    or does not show in which order gamma was summed, the node gets the module's parameters. A module without a node is
    a near miss with its reason; its part of the file is not changed.

    Returns:
        Names of the nodes that got parameters from the reference.
    """
    tensors = reference.signature.tensors
    _, gates = record_gates(reference.swapped, reference.signature, tensors)
    known = known_sites(gates)
    fused = {one.site: one for one in applied.fused}
    nodes = instrument.sites(proto)
    equal = matching.same_parameters(proto, known)

    def alike(node: str, site: str) -> bool:
        return equal(node, site) or (node in fused and _completes(fused[node], gates[site].swapped.gate))

    inputs = {name: tensor.numpy() for name, tensor in tensors.items()}
    pairs = matching.match_sites(matching.renamed(proto, names), known, inputs, alike)
    completed = {n: s for n, s in pairs.items() if n in fused and not equal(n, s) and alike(n, s)}
    for node, site in completed.items():
        fused[node] = _complete(proto, nodes[node], fused[node], gates[site].swapped.gate)
    if fused:  # else the file is not changed
        called = matching.rename_sites(proto, pairs)
        applied.fused = [replace(one, site=called[one.site]) for one in fused.values()]
    applied.near_misses += _left(gates, set(pairs.values()), applied)
    return list(completed.values())


def _left(gates: Mapping[str, RecordedGate], matched: set[str], applied: Applied) -> list[NearMiss]:
    """Modules without a node, each with the reason; calls that an exporter merged into an equal call are left out."""
    found = []
    told = {miss.node for miss in applied.near_misses if miss.rule == sru.NAME}
    for site, gate in gates.items():
        twins = (gates[other] for other in matched)
        if site in matched or site in told or any(_same_call(gate, twin) for twin in twins):
            continue
        variant = gate.swapped.gate.variant.name
        reason = (
            f"PyTorch's module is {variant}, but no such SRU was read from the graph; it stays as it is in the file"
        )
        found.append(NearMiss(site, sru.NAME, reason))
    return found


def _same_call(one: RecordedGate, other: RecordedGate) -> bool:
    return torch.equal(one.y, other.y) and torch.equal(one.x, other.x)


def _completes(fused: Fused, gate: Gate) -> bool:
    """Whether a node can be a module's although its parameters differ: only the gate weight differs."""
    if fused.gate.channels != gate.channels:
        return False
    with_eps = NO_EPS not in fused.note
    if _choices(fused.gate.variant, with_eps) != _choices(gate.variant, with_eps):
        return False
    return _is_reordered(fused.gate, gate) or _is_folded(fused.gate, gate)


def _choices(variant: GateVariant, with_eps: bool) -> tuple[object, ...]:
    """Parts of a variant that a graph shows: not the order of its sum of gamma, nor the form of its deviation."""
    eps = (variant.eps_var, variant.eps_std) if with_eps else ()
    return variant.operator, variant.comparison, variant.num_groups, variant.ddof, variant.threshold, *eps


def _is_folded(found: Gate, gate: Gate) -> bool:
    """Whether a gate without a weight is another gate after folding: ``a = gamma * w``, ``b = beta * w``."""
    if found.variant.weighting != "none" or gate.variant.weighting == "none":
        return False
    gamma, beta, weight = (t.double().numpy() for t in (gate.gamma, gate.beta, gate.weight))
    error = weight_error(gamma) if gate.variant.weighting in _SUMS else 1e-5
    pairs = ((found.gamma, gamma * weight), (found.beta, beta * weight))
    return all(bool(np.all(np.abs(values.numpy() - exact) <= error * np.abs(exact))) for values, exact in pairs)


def _is_reordered(found: Gate, gate: Gate) -> bool:
    """Whether two gates differ only in the order of sum(gamma), which a constant folder chose."""
    if gate.variant.weighting not in _SUMS or found.variant.weighting not in _SUMS:
        return False
    same = torch.equal(found.gamma, gate.gamma) and torch.equal(found.beta, gate.beta)
    return same and not torch.equal(found.weight, gate.weight)


def _complete(proto: onnx.ModelProto, node: onnx.NodeProto, fused: Fused, gate: Gate) -> Fused:
    """Replace a node's folded or differently rounded parameters by the module's."""
    for name, value in zip(node.input[1:], gate.operator_inputs().values(), strict=True):
        stored = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        stored.CopyFrom(numpy_helper.from_array(value.numpy(), name))
    for entry in list(node.metadata_props):
        if entry.key == VARIANT:
            entry.value = gate.variant.label
        elif entry.key == WEIGHT:
            node.metadata_props.remove(entry)
    for attribute in node.attribute:  # the eps of the file was assumed
        if attribute.name in ("eps_var", "eps_std"):
            attribute.f = getattr(gate.variant, attribute.name)
    note = fused.note.replace(FOLDED, "gamma is the reference's").replace(REORDERED, "cut is the reference's")
    return replace(fused, gate=gate, note=note)
