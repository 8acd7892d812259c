"""Export PyTorch to ONNX by torch.export, each recognised SRU as one ``scconv`` node with its model-local function.

The torch exporter's optimiser inlines functions and its version converter drops them. So the nodes are exported bare
and get their functions afterwards; onnxsim keeps them.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from importlib.metadata import version

import onnx
import onnx_ir as ir
import onnxsim
import torch
from torch import Tensor, nn

from scconv_deploy.errors import ModelError, first_line
from scconv_deploy.exporters.capture import capture
from scconv_deploy.exporters.layers import Layers
from scconv_deploy.gate.planes import as_planes, from_planes
from scconv_deploy.gate.recognize import Recognition
from scconv_deploy.gate.swap import StandIn, SwappedSRU, replace_modules, site_name
from scconv_deploy.graph.contract import (
    DOMAIN,
    DOMAIN_VERSION,
    IR_VERSION,
    LARGEST_PROTO_BYTES,
    MODULE,
    SITE,
    VARIANT,
    MaskForm,
    check_opset,
)
from scconv_deploy.graph.file import check
from scconv_deploy.graph.nodes import add_functions, variant_attributes
from scconv_deploy.model.signature import Signature, named_outputs, refuse_what_is_no_tensor
from scconv_deploy.records.stage import StageLog
from scconv_deploy.version import __version__

PRODUCER = "scconv-deploy"
"""``producer_name`` of the files that this exporter writes."""
_SCOPES = "pkg.torch.onnx.name_scopes"
_OTHER_OPERATORS = "Write that part of the model with other operators, or export with another --opset."
_ELIMINATED = "its result is not used, or another node computes the same"


class _SRUNode(StandIn):
    """Replacement of a :class:`SwappedSRU` in the trace: one symbolic node, named after the module and its call.

    Args:
        calls: counter of the calls of each path during the trace.
    """

    def __init__(self, swapped: SwappedSRU, calls: Counter[str]) -> None:
        super().__init__(swapped._original[0], swapped)
        vars(self).update(_sru=swapped, _sru_calls=calls)
        inputs = swapped.gate.operator_inputs()
        self._sru_inputs = tuple(f"_sru_{name}" for name in inputs)
        for name, value in inputs.items():
            self.register_buffer(f"_sru_{name}", value)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        sru, variant = self._sru, self._sru.gate.variant
        if sru.conv is not None and sru.conv_place == "before":
            x = sru.conv(x)
        self._sru_calls[sru.path] += 1
        planes = as_planes(x)
        made = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{variant.operator}",
            (planes, *(getattr(self, name) for name in self._sru_inputs)),
            variant_attributes(variant),
            dtype=planes.dtype,
            shape=planes.shape,
            version=DOMAIN_VERSION,
            metadata_props={
                SITE: site_name(sru.path, self._sru_calls[sru.path]),
                VARIANT: variant.label,
            },
        )
        y = from_planes(made, x)
        return sru.conv(y) if sru.conv is not None and sru.conv_place == "after" else y


def export_model(
    swapped: nn.Module,
    recognition: Recognition,
    signature: Signature,
    log: StageLog,
    *,
    opset: int = 18,
    mask_form: MaskForm = "multiply",
    metadata: dict[str, str] | None = None,
) -> ir.Model:
    """Export a model with swapped SRUs to ONNX.

    Args:
        swapped: from :func:`scconv_deploy.gate.swap`, in eval mode.
        recognition: what was swapped and what was left alone.
        signature: example arguments and open axes.
        log: gets the records ``export`` and ``simplify``.
        opset: 18 to 23.
        mask_form: how a mask is applied in the function bodies.
        metadata: further ``metadata_props``.

    Returns:
        A checked model of IR version 10 with its functions, every node of the domain named after its module.

    Raises:
        ModelError: torch.export, onnxsim or the checker refuses the model.
    """
    check_opset(opset)
    with log.stage("export") as stage:
        model, called, modules = _export_bare(swapped, signature, opset)
        norms = {path for path, m in swapped.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        layers = Layers(model, modules, norms)
        sites = _name_sites(model)
        add_functions(model, mask_form, opset)
        model.ir_version = IR_VERSION
        stage.applied += [f"{site}: {DOMAIN}::{op} [{variant}]" for site, (op, variant) in sites.items()]
        if not sites:
            stage.applied.append("no SRU was recognised; the model was exported as it is")
        stage.skipped += [(r.path, r.reason) for r in recognition.refused]
        stage.skipped += [(site, _ELIMINATED) for site in called if site not in sites]
    with log.stage("simplify") as stage:
        proto = ir.to_proto(model)
        size = proto.ByteSize()
        if size > LARGEST_PROTO_BYTES:
            raise ModelError(
                f"The model has {size / 2**30:.1f} GiB, more than an ONNX file can hold (2 GiB).",
                "Make it smaller, or export its parts as models of their own.",
            )
        before = len(proto.graph.node)
        proto = _simplify(proto)
        stage.applied.append(f"onnxsim: {before} -> {len(proto.graph.node)} nodes")
        kept = {node.name for node in proto.graph.node if node.domain == DOMAIN}
        stage.skipped += [(site, _ELIMINATED) for site in sites if site not in kept]
    final = ir.from_proto(proto)
    for node in final.graph:
        module = next((modules[value.name] for value in node.outputs if value.name in modules), "")
        if module:
            node.metadata_props[MODULE] = module
    layers.describe(final)
    return _finish(final, {site: sites[site] for site in sites if site in kept}, metadata or {})


def _export_bare(swapped: nn.Module, signature: Signature, opset: int) -> tuple[ir.Model, list[str], dict[str, str]]:
    """The graph with a bare node for each SRU, the sites called in the trace, and the module of each value."""
    output = signature.run(swapped, signature.tensors)
    refuse_what_is_no_tensor(output)
    output_names = tuple(named_outputs(output, signature.names))
    calls: Counter[str] = Counter()
    nodes = {id(m): _SRUNode(m, calls) for m in swapped.modules() if isinstance(m, SwappedSRU)}
    traced = replace_modules(swapped, dict(nodes))
    traced.register_forward_pre_hook(lambda *_: calls.clear())  # torch.export may trace more than once
    model = capture(traced, signature, output_names, opset)
    if model.opset_imports.get("") != opset:
        raise ModelError(
            f"The exporter produced opset {model.opset_imports.get('')}, expected {opset}.", "Use another --opset."
        )
    modules = _modules_of_values(model)
    _drop_exporter_metadata(model)
    return model, [site_name(path, call) for path, count in calls.items() for call in range(1, count + 1)], modules


def _finish(model: ir.Model, sites: dict[str, tuple[str, str]], metadata: dict[str, str]) -> ir.Model:
    """Restore the metadata that onnxsim dropped, remove its own, and run the full checker."""
    for node in model.graph:
        if node.domain == DOMAIN and node.name in sites:
            node.metadata_props[SITE] = node.name
            node.metadata_props[VARIANT] = sites[node.name][1]
    for key in [k for k in model.metadata_props if k.startswith("onnxsim.")]:
        del model.metadata_props[key]
    model.metadata_props.update(_metadata(sites, metadata))
    model.producer_name, model.producer_version = PRODUCER, __version__
    model.ir_version = IR_VERSION
    check(ir.to_proto(model))
    return model


def _modules_of_values(model: ir.Model) -> dict[str, str]:
    """PyTorch module of each value, from the exporter's metadata: value -> path.

    Keyed by values, because onnxsim renames nodes and drops their metadata but keeps the names of values.
    """
    found: dict[str, str] = {}
    for node in model.graph:
        try:
            scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        except (ValueError, SyntaxError):  # another release may write another format
            continue
        if isinstance(scopes, list) and len(scopes) > 1 and scopes[-2]:  # the last one is the operator
            found |= {value.name: str(scopes[-2]) for value in node.outputs if value.name}
    return found


def _drop_exporter_metadata(model: ir.Model) -> None:
    """Remove the exporter's metadata: its stack traces with local paths are not part of the artifact."""
    model.graph.doc_string = None
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.doc_string = None
        for key in [k for k in node.metadata_props if not k.startswith("scconv.")]:
            del node.metadata_props[key]
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _name_sites(model: ir.Model) -> dict[str, tuple[str, str]]:
    """Name each node of the domain after its site. Returns site -> (operator, variant)."""
    sites: dict[str, tuple[str, str]] = {}
    for node in model.graph:
        if node.domain == DOMAIN:
            node.name = node.metadata_props[SITE]
            sites[node.name] = (node.op_type, node.metadata_props[VARIANT])
    return sites


def _simplify(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        simplified, same = onnxsim.simplify(proto)
    except Exception as error:  # onnxsim raises RuntimeError and its runtime's own types
        raise ModelError(f"onnxsim refuses the graph: {first_line(error)}", _OTHER_OPERATORS) from error
    if not same:
        raise ModelError("onnxsim changed what the graph computes.", _OTHER_OPERATORS)
    return simplified


def _metadata(sites: dict[str, tuple[str, str]], further: dict[str, str]) -> dict[str, str]:
    """Metadata of the file, without times and local paths, so that equal inputs give equal bytes."""
    versions = {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxsim")}
    return {
        "scconv_deploy.version": __version__,
        "scconv_deploy.versions": json.dumps(versions, sort_keys=True),
        "scconv_deploy.sites": json.dumps({site: variant for site, (_, variant) in sites.items()}),
        **further,
    }
