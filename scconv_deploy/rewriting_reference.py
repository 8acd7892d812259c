"""What of a rewritten file belongs to what of the PyTorch model that it was exported from.

SRU nodes to modules, by their parameters; inputs and outputs to the model's, by name or else by position. A wrong
match does no harm: parity is judged afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper

from scconv_deploy.errors import UsageError
from scconv_deploy.exporters.onnx import node_inputs
from scconv_deploy.gate import SwappedSRU
from scconv_deploy.gate.variant import gate_weight
from scconv_deploy.rewrite.apply import Applied, Fused
from scconv_deploy.rewrite.functions import DOMAIN, SITE, VARIANT
from scconv_deploy.rewrite.interpret import FOLDED, REORDERED, Affine, weight_error
from scconv_deploy.verification import instrument
from scconv_deploy.verification.runners.pytorch import record_gates
from scconv_deploy.verification.torch_reference import Reference

_SUMS = ("sum", "torch_sum")


@dataclass(frozen=True)
class Names:
    """The file's inputs and outputs: its own name -> the reference's."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    @property
    def renamed(self) -> list[str]:
        """Those that differ, for a stage record."""
        pairs = [*self.inputs.items(), *self.outputs.items()]
        return [f"{theirs} is the reference's {ours}" for theirs, ours in pairs if theirs != ours]


def match_names(proto: onnx.ModelProto, reference: Reference) -> Names:
    """By name where the file has the reference's names, by position where it has others: exporters let users choose.

    Raises:
        UsageError: the file has more or fewer of them.
    """
    outputs = list(reference.signature.call(reference.model, reference.signature.tensors))
    return Names(
        _pairs("inputs", [v.name for v in proto.graph.input], list(reference.signature.names)),
        _pairs("outputs", [v.name for v in proto.graph.output], outputs),
    )


def _pairs(what: str, file: Sequence[str], reference: Sequence[str]) -> dict[str, str]:
    if len(file) != len(reference):
        raise UsageError(
            f"The file's {what} are {', '.join(file)}; the reference's {', '.join(reference)}.",
            "Give the model that this file was exported from.",
        )
    same = set(file) == set(reference)
    return {theirs: theirs if same else ours for theirs, ours in zip(file, reference, strict=True)}


def renamed(proto: onnx.ModelProto, names: Names) -> onnx.ModelProto:
    """The model with the reference's names for its inputs and outputs; itself where they are the same."""
    if not names.renamed:
        return proto
    model = ir.from_proto(proto)
    wanted = {**names.inputs, **names.outputs}
    for node in model.graph.all_nodes():  # what is called so and is another tensor makes room
        for value in node.outputs:
            if value.name in wanted.values() and value.name not in wanted:
                value.name = f"{value.name}::inner"
    for stored in [v for name, v in model.graph.initializers.items() if name in wanted.values()]:
        stored.name = f"{stored.name}::inner"
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = wanted.get(value.name or "", value.name)
    return ir.to_proto(model)


def adopt(proto: onnx.ModelProto, applied: Applied, reference: Reference) -> list[str]:
    """Name SRU nodes after the reference's modules, in the order of calls.

    A node is a module's if their parameters are equal to the bit. Where the file held ``gamma * w`` as one constant,
    a module is found by that product, and where it held a sum(gamma) in another order, by gamma and beta: the node gets
    the module's own parameters.

    Returns:
        the nodes that got parameters from the reference.
    """
    _, gates = record_gates(reference.swapped, reference.signature, reference.signature.tensors)
    free = {site: gate.swapped for site, gate in gates.items()}
    nodes = instrument.sites(proto)
    completed = []
    for index, one in enumerate(applied.fused):
        site = next((s for s, m in free.items() if _is_folded(one, m) or _is_reordered(one, m)), None)
        if site is not None:
            applied.fused[index] = _complete(proto, nodes[one.site], one, free[site])
            completed.append(one.site)
            del free[site]
    free = {site: gate.swapped for site, gate in gates.items()}
    sites: dict[str, str] = {}
    for name, node in nodes.items():
        stored = [numpy_helper.to_array(t).tobytes() for t in instrument.parameters(proto, node).values()]
        site = next((s for s, module in free.items() if _bytes(module) == stored), None)
        if site is not None:
            del free[site]
            sites[name] = site
    _rename_nodes(proto, applied, sites)
    return [sites.get(name, name) for name in completed]


def _bytes(module: SwappedSRU) -> list[bytes]:
    return [value.numpy().tobytes() for value in node_inputs(module).values()]


def _is_folded(fused: Fused, module: SwappedSRU) -> bool:
    """Whether a node without a gate weight is what folding leaves of a module: ``a = gamma * w``, ``b = beta * w``."""
    variant = module.variant
    if fused.variant.weighting != "none" or variant.weighting == "none" or fused.gamma.numel() != module.gamma.numel():
        return False
    if replace(fused.variant, weighting=variant.weighting) != variant:
        return False
    gamma, beta = (t.detach().double().reshape(-1).numpy() for t in (module.gamma, module.beta))
    weight = gate_weight(module.gamma.detach(), variant).double().numpy()
    error = weight_error(gamma) if variant.weighting in _SUMS else 1e-5
    pairs = ((fused.gamma, gamma * weight), (fused.beta, beta * weight))
    return all(bool(np.all(np.abs(found.numpy() - value) <= error * np.abs(value))) for found, value in pairs)


def _is_reordered(fused: Fused, module: SwappedSRU) -> bool:
    """Whether a node is a module but for the order in which sum(gamma) was added up: whoever folded it chose one."""
    if module.variant.weighting not in _SUMS or fused.variant.weighting not in _SUMS:
        return False
    if replace(fused.variant, weighting=module.variant.weighting) != module.variant:
        return False
    pairs = ((fused.gamma, module.gamma), (fused.beta, module.beta))
    same = all(torch.equal(found, of_module.detach().reshape(-1)) for found, of_module in pairs)
    return same and not torch.equal(fused.weight, module.gate_weight)


def _complete(proto: onnx.ModelProto, node: onnx.NodeProto, fused: Fused, module: SwappedSRU) -> Fused:
    """Give a node what folding took or rounded otherwise: the module's own parameters."""
    for name, value in zip(node.input[1:], node_inputs(module).values(), strict=True):
        stored = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        stored.CopyFrom(numpy_helper.from_array(value.numpy(), name))
    for entry in node.metadata_props:
        if entry.key == VARIANT:
            entry.value = module.variant.label
    gamma, beta = (torch.clone(t.detach().reshape(-1)) for t in (module.gamma, module.beta))
    note = fused.note.replace(FOLDED, "gamma is the reference's").replace(REORDERED, "cut is the reference's")
    return replace(fused, variant=module.variant, affine=Affine(gamma, beta), note=note)


def _rename_nodes(proto: onnx.ModelProto, applied: Applied, sites: Mapping[str, str]) -> None:
    taken = set(instrument.sites(proto)) - set(sites)
    for node in proto.graph.node:
        site = sites.get(node.name) if node.domain == DOMAIN else None
        if site is None or site in taken:
            continue
        node.name = site
        for entry in node.metadata_props:
            if entry.key == SITE:
                entry.value = site
    applied.fused = [replace(one, site=sites.get(one.site, one.site)) for one in applied.fused]
