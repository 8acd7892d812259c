"""Verdict on an ONNX file against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import onnx

from scconv_deploy.errors import ModelError
from scconv_deploy.exporters.onnx import PRODUCER
from scconv_deploy.graph import instrument
from scconv_deploy.graph.quantization import read_quantization, read_trained
from scconv_deploy.model.fake_quantize import other_kind
from scconv_deploy.model.fake_quantizers import fake_quantizers
from scconv_deploy.model.prepare import Reference
from scconv_deploy.model.replay import RecordedGate, record_gates
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.stage import StageLog
from scconv_deploy.verification.metrics import relative_l2
from scconv_deploy.verification.onnx import matching
from scconv_deploy.verification.onnx.chain import ONNX_LINK, SWAPPED_LINK, Artifact, Judging, Shards, verify_artifact
from scconv_deploy.verification.reference.expected import ExpectedQuantization
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.reference.quantized import QuantizedReference, TrainedReference
from scconv_deploy.verification.reference.run import ReferenceRun
from scconv_deploy.verification.samples import Sample

_WEIGHTS_OF_INT8 = 0.1
"""Relative L2 of dequantised weights: 127 levels of a channel cost 0.005, one scale for all some hundredths."""

__all__ = [
    "ONNX_LINK",
    "SWAPPED_LINK",
    "Artifact",
    "Judging",
    "Reference",
    "known_sites",
    "source_of",
    "source_of_engine",
    "verify_onnx",
]


def verify_onnx(
    reference: Reference,
    artifact: Artifact,
    samples: Iterable[Sample],
    log: StageLog,
    *,
    judging: Judging = Judging(),
    provenance: Mapping[str, str] | None = None,
    shards: Shards | None = None,
    on_run: Callable[[ReferenceRun], None] = lambda run: None,
) -> ParityReport:
    """Judge an ONNX model against PyTorch; see :func:`.chain.verify_artifact`.

    A file of another exporter may have other names for inputs, outputs and SRUs; they are matched first.
    """
    artifact = replace(artifact, proto=_with_names_of(reference, artifact.proto))
    source, artifact = _quantized_alike(reference, artifact)
    return verify_artifact(
        source, artifact, samples, log, judging=judging, provenance=provenance, shards=shards, on_run=on_run
    )


def _quantized_alike(reference: Reference, artifact: Artifact) -> tuple[TorchReference, Artifact]:
    """The reference with fake quantisation at the artifact's sites; as it is if these cannot be found in it."""
    if fake_quantizers(reference.model):
        return _trained_alike(reference, artifact)
    if not artifact.quantization:
        return TorchReference(reference), artifact
    found, why = read_quantization(artifact.proto), ""
    if found.unknown:
        node, reason = next(iter((found.misplaced or found.unknown).items()))
        more = f" (and {len(found.unknown) - 1} more)" if len(found.unknown) > 1 else ""
        why = f"PyTorch has no place for the quantisers of {node}: {reason}{more}"
    elif not found.layers:
        why = "none of its quantisers stands before a Conv or Gemm"
    else:
        why = next((why for site in found.layers if (why := other_kind(reference.model, site.path))), "")
    try:
        source = QuantizedReference(reference, found) if not why else None
    except ModelError as error:
        if found.record is not None:
            raise
        source, why = None, error.message.rstrip(".")
    if source is not None and found.record is None and (path := _another_weight(source.expected)):
        source, why = None, f"the weights of {path} are not the module's: it may have been changed or folded otherwise"
    if source is None:
        return TorchReference(reference), replace(artifact, quantized=why)
    return source, replace(artifact, quantized=source.expected)


def _trained_alike(reference: Reference, artifact: Artifact) -> tuple[TorchReference, Artifact]:
    """A model that was trained with fake quantisation, which rounds by itself."""
    if not artifact.quantization:
        raise ModelError(
            f"{artifact.name} has no quantisers, and {reference.name} was trained with fake quantisation.",
            "Export the model again, or give the float model as the reference.",
        )
    source = TrainedReference(reference, read_trained(artifact.proto))
    return source, replace(artifact, quantized=source.expected)


def _another_weight(expected: ExpectedQuantization) -> str:
    """Path of a layer whose dequantised weights are farther from the module's than int8 explains; "" if there is none.

    A file of another tool may hold weights that were folded or equalised; nothing says so, and they prove nothing.
    """
    for site in expected.found.layers:
        ours, theirs = expected.weights[site.path].weight, site.weights.dequantized
        if theirs.size != ours.size or relative_l2(theirs.reshape(ours.shape), ours) > _WEIGHTS_OF_INT8:
            return site.path
    return ""


def source_of(reference: Reference, artifact: Artifact) -> TorchReference:
    """The reference that judges an artifact of this model: with fake quantisation if the artifact is quantised."""
    return _quantized_alike(reference, artifact)[0]


def source_of_engine(reference: Reference, artifact: Artifact) -> TorchReference:
    """:func:`source_of` for an engine that was built from the artifact.

    Raises:
        ModelError: the artifact is quantised, and PyTorch has no place for its quantisers.
    """
    source, judged = _quantized_alike(reference, artifact)
    if artifact.quantization and not source.rounds_to_codes:
        raise ModelError(
            f"{artifact.name} is {artifact.quantization}, and cannot be judged: {judged.quantized}.",
            "Quantise with scconv-deploy quantize, whose quantisers have places in the model.",
        )
    return source


def known_sites(gates: Mapping[str, RecordedGate]) -> dict[str, matching.KnownSite]:
    """Parameters and input of every SRU call in PyTorch, to match nodes by."""
    return {
        site: matching.KnownSite(tuple(v.numpy() for v in gate.swapped.gate.operator_inputs().values()), gate.x.numpy())
        for site, gate in gates.items()
    }


def _with_names_of(reference: Reference, proto: onnx.ModelProto) -> onnx.ModelProto:
    """Rename a file to the reference's names; a file of this exporter must have the input and output names already."""
    ours, signature = proto.producer_name == PRODUCER, reference.signature
    paths = {found.path for found in reference.recognition.srus}
    nodes = instrument.sites(proto)
    if ours and all(name.split("#")[0] in paths for name in nodes):
        return proto
    if not ours:
        outputs = list(signature.call(reference.model, signature.tensors))
        proto = matching.renamed(proto, matching.match_names(proto, signature.names, outputs))
    if not nodes or not paths:
        return proto
    _, gates = record_gates(reference.swapped, signature, signature.tensors)
    known = known_sites(gates)
    inputs = {name: tensor.numpy() for name, tensor in signature.tensors.items()}
    pairs = matching.match_sites(proto, known, inputs, matching.same_parameters(proto, known))
    return matching.with_site_names(proto, pairs)
