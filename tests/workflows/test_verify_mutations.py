"""The same damage judged by a bundle alone: no PyTorch, so no weights to compare and no second opinion.

What only the weights would show passes there, and the report says both what was not compared and that the file is not
the one that was sealed.
"""

from __future__ import annotations

import onnx
import pytest

from scconv_deploy.bundle.reference import write_reference
from scconv_deploy.graph import instrument
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.samples import noise_samples
from tests.mutations import MUTATIONS
from tests.verification.onnx.test_mutations import failed_checks
from tests.verified import verify_bundle
from tests.workflows.test_verify import seal

BY_THE_SEAL_ALONE = {
    "one weight bit flipped, the lowest",
    "one bit of a bias flipped",
}
OTHERWISE = {
    "the same where a BatchNorm is folded in": ("layers", "noise floor"),
}
"""Caught by another check than with PyTorch at hand."""
AT_THE_LIMIT = "one weight changed by 1e-4 of its norm"
"""11 times the noise here, 5 times on ScConv-ResNet-20: about what rounding does."""


@pytest.fixture(scope="module")
def bundle(exported, tmp_path_factory):
    """With one sample, and the undamaged artifact under its seal."""
    reference, content = exported
    folder = tmp_path_factory.mktemp("mutations") / "out"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(content)
    nodes = instrument.sites(onnx.load_model_from_string(content))
    source = TorchReference(reference)
    write_reference(folder, source, map(source.run, noise_samples(reference.signature, 0)[:1]), nodes)
    seal(folder)
    return folder


def judged(bundle, exported, name):
    model = onnx.load_model_from_string(exported[1])
    MUTATIONS[name].damage(model, exported[0].model)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    try:
        return verify_bundle(bundle)
    finally:
        (bundle / "model.onnx").write_bytes(exported[1])


def test_undamaged_it_passes(bundle):
    report = verify_bundle(bundle)
    assert report, report.failures
    assert any("holds no weights" in caveat for caveat in report.caveats)
    assert not any("manifest" in caveat for caveat in report.caveats)


@pytest.mark.parametrize("name", [name for name in MUTATIONS if name not in {*BY_THE_SEAL_ALONE, AT_THE_LIMIT}])
def test_damage_is_caught_without_pytorch(bundle, exported, name):
    report = judged(bundle, exported, name)
    assert not report
    check, words = OTHERWISE.get(name, (MUTATIONS[name].check, MUTATIONS[name].words))
    assert words in failed_checks(report)[check]


@pytest.mark.parametrize("name", sorted(BY_THE_SEAL_ALONE))
def test_what_no_sample_shows_is_left_to_the_seal_and_said(bundle, exported, name):
    report = judged(bundle, exported, name)
    assert report, report.failures
    assert any("files that differ from the manifest: model.onnx" in caveat for caveat in report.caveats)
    assert any("holds no weights" in caveat for caveat in report.caveats)


@pytest.mark.parametrize("name", [AT_THE_LIMIT, "gate inverted"])
def test_the_seal_is_heard_whatever_the_verdict(bundle, exported, name):
    said = [c.reason for link in judged(bundle, exported, name).links for c in link.checks if c.name == "seal"]
    assert said == ["files that differ from the manifest: model.onnx"]
