"""It catches faults: a small ScConv-ResNet damaged on purpose. On ResNet-20: ``python -m benchmarks mutations``."""

from __future__ import annotations

import onnx
import pytest
import torch

from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records.stage import StageLog
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from scconv_deploy.verification.samples import noise_samples
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests.mutations import IN_THE_ROUNDING, MUTATIONS, SITE, two_heads

DYNAMIC = {"teacher-forced gates", "free-running gates", "replay", "layers", "finite", "contract", "second opinion"}


def judge(reference, model):
    samples = noise_samples(reference.signature, 0)[:1]
    return verify_onnx(reference, Artifact(model, "model.onnx", model.SerializeToString()), samples, StageLog())


def failed_checks(report):
    return {c.name: c.reason for link in report.links for c in link.checks if c.status == "failed"}


def test_undamaged_it_passes(exported):
    report = judge(exported[0], onnx.load_model_from_string(exported[1]))
    assert report, report.failures
    assert report.first_departure == ""
    assert len(report.srus) == 3
    weights = next(c for c in report.links[1].checks if c.name == "weights")
    assert "2 but for a factor of each channel" not in weights.reason  # three convolutions and the stem are folded
    assert "4 but for a factor of each channel" in weights.reason


@pytest.fixture(scope="module", params=[3, 1], ids=["volumes", "signals"])
def of_other_rank(request):
    """(reference, bytes of its model.onnx) of a network of volumes or signals."""
    dims, side = request.param, {3: 8, 1: 96}[request.param]
    x = torch.randn(2, 3, *[side] * dims, generator=torch.Generator().manual_seed(0))
    reference, log = reference_from_module(two_heads(1, side, dims=dims), x)
    return reference, serialize(export_to_ir(reference, ExportOptions(), log))


AT_OTHER_RANKS = ("gate inverted", "> for >=", "tau off by 1e-3", "halves not crossed", "a layer dropped")


def test_volumes_and_signals_pass_undamaged_and_fail_damaged(of_other_rank):
    """What differs with the rank: the planes, the gates on them, what follows them. The rest is as for images."""
    reference, content = of_other_rank
    report = judge(reference, onnx.load_model_from_string(content))
    assert report, report.failures
    assert [sru.site for sru in report.srus] == ["net.layer1.0.conv2.SRU", SITE]
    for name in AT_OTHER_RANKS:
        model = onnx.load_model_from_string(content)
        MUTATIONS[name].damage(model, reference.model)
        failed = failed_checks(judge(reference, model))
        assert MUTATIONS[name].words in failed[MUTATIONS[name].check], name


DEPARTURES = {
    "one weight changed by 1e-4 of its norm": "(net.layer2.0.conv2.CRU.GWC)",
    "the same where a BatchNorm is folded in": "(net.bn1)",
    "halves not crossed": "(net.layer1.0.conv2.SRU)",  # the body is every SRU's
    "one SRU in fp16": f"({SITE})",
    "outputs swapped": "first (second)",
    "tau off by 1e-3": f"gates of {SITE}",
    "biased for unbiased deviation": SITE,
}
"""First departures, each with its module."""


@pytest.mark.parametrize("name", MUTATIONS)
def test_damage_is_caught(exported, name):
    mutation = MUTATIONS[name]
    model = onnx.load_model_from_string(exported[1])
    mutation.damage(model, exported[0].model)
    report = judge(exported[0], model)
    assert not report
    failed = failed_checks(report)
    assert mutation.words in failed[mutation.check]
    if mutation.below_the_noise:  # no run shows it, only the static link does
        assert not DYNAMIC & set(failed)
    assert DEPARTURES.get(name, "") in report.first_departure


def test_the_departures_are_of_known_damage():
    assert set(DEPARTURES) <= set(MUTATIONS)


def test_what_is_within_the_rounding_of_folding_passes(exported):
    _, damage = IN_THE_ROUNDING
    model = onnx.load_model_from_string(exported[1])
    damage(model)
    assert judge(exported[0], model)
