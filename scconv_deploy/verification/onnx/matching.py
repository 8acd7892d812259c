"""Matching of a file with its reference: SRU nodes to sites, and the names of inputs and outputs.

Names of nodes prove nothing, because exporters and simplifiers choose them freely. A node matches a site if its
parameters are equal bit for bit; if several sites share parameters, the node's input decides. A wrong match does no
harm: parity is judged afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import DOMAIN, SITE
from scconv_deploy.records.tolerances import SAME_PLACE
from scconv_deploy.runtimes.half import runner_of
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.verification.metrics import relative_l2


@dataclass(frozen=True)
class KnownSite:
    """SRU of the reference: its parameters in the operator's order, float32 ``[C]``, and its input x, ``[N, C, *]``."""

    parameters: tuple[np.ndarray, ...]
    x: np.ndarray

    @property
    def bytes(self) -> list[bytes]:
        return [value.tobytes() for value in self.parameters]


Alike = Callable[[str, str], bool]
"""(node name, site name) -> whether the node may be the site."""


def same_parameters(proto: onnx.ModelProto, known: Mapping[str, KnownSite]) -> Alike:
    """Predicate: whether a node's parameters equal a site's bit for bit."""
    stored = {
        name: [numpy_helper.to_array(t).tobytes() for t in instrument.parameters(proto, node).values()]
        for name, node in instrument.sites(proto).items()
    }
    return lambda node, site: stored[node] == known[site].bytes


def match_sites(
    proto: onnx.ModelProto, known: Mapping[str, KnownSite], inputs: Mapping[str, np.ndarray], alike: Alike
) -> dict[str, str]:
    """Match nodes to sites: node -> site.

    First, a node that is the only one alike to the site of its own name matches it. Then nodes and sites match that are
    alike and have the same x; then those that have the same x although not alike, so that a comparison can show the
    difference. If ONNX Runtime cannot run the file, alike ones are matched in the order of nodes and calls.

    Args:
        proto: file with the reference's input names.
        known: sites of the reference in the order of calls.
        inputs: inputs of the reference run that recorded each site's x.
    """
    nodes = list(instrument.sites(proto))
    likely = {node: [site for site in known if alike(node, site)] for node in nodes}
    pairs = {
        node: node
        for node, sites in likely.items()
        if node in known and (sites == [node] or not sites) and _alone(node, likely)
    }
    left = [node for node in nodes if node not in pairs]
    free = [site for site in known if site not in pairs.values()]
    if not left or not free:
        return pairs
    seen = _inputs_of(proto, inputs)
    distance = {(n, s): _apart(seen.get(n), known[s].x) for n in left for s in free}
    order = {pair: index for index, pair in enumerate(distance)}
    for wanted in (lambda n, s: s in likely[n], lambda n, s: distance[n, s] <= SAME_PLACE):
        candidates = sorted((p for p in distance if wanted(*p)), key=lambda p: (distance[p], order[p]))
        for node, site in candidates:
            if node not in pairs and site not in pairs.values():
                pairs[node] = site
    return pairs


def _alone(node: str, likely: Mapping[str, Sequence[str]]) -> bool:
    """Whether no other node is alike to the site of this node's name."""
    return all(node not in sites for other, sites in likely.items() if other != node)


def _inputs_of(proto: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Input x of each node on these inputs; empty if ONNX Runtime cannot run the file."""
    nodes = list(instrument.sites(proto))
    try:
        found = runner_of(instrument.expose_gates(proto, nodes), RuntimeOptions()).run(inputs)
    except ModelError:  # the later verdict reports it
        return {}
    return {node: found[name] for node in nodes if (name := instrument.gate_input(node)) in found}


def _apart(x: np.ndarray | None, expected: np.ndarray) -> float:
    """Relative L2 of two tensors; infinite if one is missing, not finite or of another shape."""
    if x is None or x.shape != expected.shape:
        return float("inf")
    apart = relative_l2(x, expected)
    return apart if np.isfinite(apart) else float("inf")


def with_site_names(proto: onnx.ModelProto, pairs: Mapping[str, str]) -> onnx.ModelProto:
    """Copy a model and name its SRU nodes after their sites; see :func:`rename_sites`."""
    if all(node == site for node, site in pairs.items()):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    rename_sites(copy, pairs)
    return copy


def rename_sites(proto: onnx.ModelProto, pairs: Mapping[str, str]) -> dict[str, str]:
    """Name SRU nodes after their sites, in place; a node without a site keeps its name, unless a site has it.

    Returns:
        Old name -> new name of every SRU node.
    """
    taken, renamed = set(pairs.values()), {}
    for node in proto.graph.node:
        if node.domain != DOMAIN:
            continue
        name = instrument.site_of(node)
        renamed[name] = pairs.get(name) or next(_free_names(name, taken))
        taken.add(renamed[name])
        node.name = renamed[name]
        for entry in node.metadata_props:
            if entry.key == SITE:
                entry.value = node.name
    return renamed


def _free_names(name: str, taken: set[str]) -> Iterator[str]:
    count = 0
    while True:
        candidate = name if not count else f"{name}::{count}"
        if candidate not in taken:
            yield candidate
        count += 1


@dataclass(frozen=True)
class Names:
    """Names of a file's inputs and outputs -> the reference's names."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    @property
    def renamed(self) -> list[str]:
        """Names that differ, as lines for a stage record."""
        pairs = [*self.inputs.items(), *self.outputs.items()]
        return [f"{theirs} is the reference's {ours}" for theirs, ours in pairs if theirs != ours]


def match_names(proto: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> Names:
    """Match inputs and outputs by name, or by position if the file has other names than the reference.

    Raises:
        UsageError: the file has another number of inputs or outputs.
    """
    return Names(
        _pairs("inputs", [v.name for v in proto.graph.input], inputs),
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
    """Copy a model with the reference's names for inputs and outputs; the model itself if the names are equal."""
    if not names.renamed:
        return proto
    model = ir.from_proto(proto)
    wanted = {**names.inputs, **names.outputs}
    for node in model.graph.all_nodes():  # rename other tensors of these names
        for value in node.outputs:
            if value.name in wanted.values() and value.name not in wanted:
                value.name = f"{value.name}::inner"
    for stored in [v for name, v in model.graph.initializers.items() if name in wanted.values()]:
        stored.name = f"{stored.name}::inner"
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = wanted.get(value.name or "", value.name)
    return ir.to_proto(model)
