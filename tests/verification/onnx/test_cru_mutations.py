"""Damage to the weights and the graph of merged CRUs is caught; so is what was merged of weights that are not known."""

from __future__ import annotations

import onnx
import pytest
from onnx import numpy_helper

from scconv_deploy.graph import merged
from scconv_deploy.graph.file import serialize
from scconv_deploy.records.stage import StageLog
from scconv_deploy.workflows.export import ExportOptions, export_to_ir, in_precision
from tests.mutations import MERGED, MERGED_MUTATIONS
from tests.verification.onnx.test_mutations import DYNAMIC, failed_checks, judge


@pytest.fixture(scope="module")
def in_two(exported):
    """(reference, bytes of its model.onnx with merged CRUs, onnx-ir model)."""
    model = export_to_ir(exported[0], ExportOptions(cru="merged"), StageLog())
    return exported[0], serialize(model), model


def weights_of(report):
    return next(c for link in report.links for c in link.checks if c.name == "weights")


def test_undamaged_it_passes_and_every_merge_is_accounted_for(in_two):
    report = judge(in_two[0], onnx.load_model_from_string(in_two[1]))
    assert report, report.failures
    assert "9 of merged convolutions are what the reference's give" in weights_of(report).reason
    assert "not in the file" not in weights_of(report).reason


@pytest.mark.parametrize("name", MERGED_MUTATIONS)
def test_damage_is_caught(in_two, name):
    mutation = MERGED_MUTATIONS[name]
    model = onnx.load_model_from_string(in_two[1])
    mutation.damage(model, in_two[0].model)
    report = judge(in_two[0], model)
    assert not report
    failed = failed_checks(report)
    assert mutation.words in failed[mutation.check]
    if mutation.below_the_noise:
        assert not DYNAMIC & set(failed)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["net.layer2.0.conv2.CRU.GWC.weight", "of.nobody"], "of which the reference does not know all"),
        (["net.layer2.0.conv2.CRU.GWC.weight", "net.layer2.0.conv2.CRU.GWC.bias"], "cannot be merged"),
    ],
)
def test_a_merge_that_cannot_be_accounted_for_fails(in_two, parts, words):
    model = onnx.load_model_from_string(in_two[1])
    name = merged.merged_name("paths", parts)
    for tensor in model.graph.initializer:
        tensor.name = name if tensor.name == MERGED["paths"] else tensor.name
    for node in model.graph.node:
        node.input[:] = [name if value == MERGED["paths"] else value for value in node.input]
    assert words in failed_checks(judge(in_two[0], model))["weights"]


def test_half_weights_are_the_merged_ones_rounded_once(in_two):
    reference, _, model = in_two
    half = in_precision(model, ExportOptions(precision="fp16", cru="merged"), StageLog())
    proto = onnx.load_model_from_string(serialize(half))
    report = judge(reference, proto)
    assert report, report.failures
    assert "9 of merged convolutions are what the reference's give" in weights_of(report).reason
    (tensor,) = [t for t in proto.graph.initializer if t.name == MERGED["paths"]]
    weight = numpy_helper.to_array(tensor).copy()
    weight.view("uint16").flat[5] ^= 1
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    assert "not what the reference's weights give" in failed_checks(judge(reference, proto))["weights"]
