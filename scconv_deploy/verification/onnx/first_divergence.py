"""First tensor of a failed ONNX artifact that is beyond its tolerance, and the PyTorch module that computes it.

With the reference's gates on both sides everything is continuous, so an error has one place of origin. The outputs of
all modules are compared in the graph's order (the exporter stores the module of a node as ``scconv.module``).

This is no bisection, because an error may return within its tolerance: in a sum the other term adds noise. Measured on
the small ScConv-ResNet of the tests (37 values): one weight of a grouped convolution off by 1e-4 of its norm is beyond
the tolerance at that convolution, and within it at the next four values and at three more after the next SRU. Bisection
would name the BatchNorm five modules later. One weight of the stem off by as much would be named a stage too late.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import onnx

from scconv_deploy.graph import gates as onnx_gates
from scconv_deploy.graph import instrument
from scconv_deploy.runtimes.half import runner_of
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.verification.metrics import comparable
from scconv_deploy.verification.onnx.artifact_checks import ArtifactChecks
from scconv_deploy.verification.reference.run import ReferenceRun, ReferenceSource
from scconv_deploy.verification.ruler import FLOAT32, AgainstNoise

_AT_ONCE = 16  # values compared in one run: all their tensors are in memory at once


def first_divergence(
    source: ReferenceSource, proto: onnx.ModelProto, judged: ArtifactChecks, options: RuntimeOptions
) -> str:
    """First value beyond its tolerance, as text; if there is none, the first SRU with unexplained flips.

    Call it for a failed artifact only: it runs the worst sample again.
    """
    found = first_value(source, proto, judged, options)
    if found:
        return found
    for name, gates in judged.shared.sites.gates.items():
        where = name if name == gates.site.path else f"{name} ({gates.site.path})"
        for flips in (judged.forced.flips, judged.free.flips):
            count = flips.counts.get(name)
            if count is not None and count.unexplained:
                return f"gates of {where}: {count.unexplained:,} of {count.gates:,} unexplained"
        if judged.static.by_site[name].status == "failed":
            return f"node {where}: {judged.static.by_site[name].reason.removeprefix(f'{name}: ')}"
    for name, gate in judged.others.sites.items():
        if gate.flips.unexplained:
            return f"gates of {name}: {gate.flips.unexplained:,} of {gate.flips.gates:,} unexplained"
    return judged.weights.found.reason if judged.weights.found.status == "failed" else ""


def first_value(
    source: ReferenceSource, proto: onnx.ModelProto, judged: ArtifactChecks, options: RuntimeOptions
) -> str:
    """First value beyond its tolerance, its module and its error, as text; "" if there is none."""
    replay, ruler = judged.replay, judged.shared.ruler
    if (run := replay.worst_run) is None:
        return ""
    # PyTorch's modules are float32: no reference for the values of a half file
    candidates = list(module_outputs(proto)) if ruler.data == FLOAT32 else []
    for start in range(0, len(candidates), _AT_ONCE):
        found = first_of(source, proto, run, judged, options, candidates[start : start + _AT_ONCE])
        if found:
            return found
    # the reference has no module outputs: use the layers compared on every sample
    for name, layer in replay.layers.found.items():
        if not layer.error <= ruler.largest_multiple(layer.multiple) * layer.floor:
            return _words(name, replay.layers.modules[name], layer)
    for name, output in (replay.outputs | replay.parts.judged).items():
        if not output.ratio <= ruler.largest_multiple(output.multiple):
            return _words(name, _module_of_value(proto, name), output)
    return ""


def module_outputs(proto: onnx.ModelProto) -> dict[str, tuple[str, int]]:
    """Outputs of PyTorch modules in the graph: value -> (path, call from 1), in the graph's order.

    A module's output is produced by one of its nodes and used by a node outside of it, or a graph output. A call with
    several such values is left out because they cannot be told apart; so is the whole model.
    """
    leaving: dict[str, list[str]] = defaultdict(list)
    users: dict[str, list[str]] = defaultdict(list)
    for node in proto.graph.node:
        for name in node.input:
            users[name].append(instrument.module_of(node))
    outputs = {value.name for value in proto.graph.output}
    for node in proto.graph.node:
        module = instrument.module_of(node)
        for name in node.output if module else ():
            if name in outputs or any(not _inside(user, module) for user in users[name]):
                leaving[module].append(name)
    found = {name: (module, call) for module, names in leaving.items() for call, name in enumerate(names, start=1)}
    order = [name for node in proto.graph.node for name in node.output if name in found]
    return {name: found[name] for name in order}


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


def first_of(
    source: ReferenceSource,
    proto: onnx.ModelProto,
    run: ReferenceRun,
    judged: ArtifactChecks,
    options: RuntimeOptions,
    values: Sequence[str],
) -> str:
    """First of these module outputs beyond its tolerance on one run, as text; "" if there is none."""
    ruler = judged.shared.ruler
    places = {name: place for name, place in module_outputs(proto).items() if name in values}
    paths = sorted({path for path, _ in places.values()})
    expected = {(path, call): (y, floor) for path, call, y, floor in source.modules(run, paths)}
    if not expected:
        return ""
    forced = instrument.inject_gates(proto, list(run.sites), values)
    here = [gate for gate in (site.found for site in judged.others.sites.values()) if gate.name in run.others]
    onnx_gates.inject(forced, here)
    with runner_of(forced, options) as runner:
        actual = runner.run(run.feeds(runner.inputs))
    made = Counter(path for path, _ in expected)
    stored = Counter(path for path, _ in module_outputs(proto).values())
    for name in values:
        path, _ = place = places[name]
        if place not in expected or made[path] != stored[path]:
            continue
        y, floor = expected[place]
        if actual[name].shape != y.shape:
            continue
        found = ruler.measure(actual[name], y, floor)
        if not comparable(actual[name], y) or not found.ratio <= ruler.largest_multiple(found.multiple):
            return _words(name, path, found)
    return ""


def _module_of_value(proto: onnx.ModelProto, value: str) -> str:
    return next((instrument.module_of(node) for node in proto.graph.node if value in node.output), "")


def _words(value: str, module: str, found: AgainstNoise) -> str:
    where = f"{value} ({module})" if module else f"{value} (module unknown)"
    return f"{where}: {found.error:.1e} relative L2, {found.error / found.floor:.1f}x the noise floor {found.floor:.1e}"
