"""The main job end to end: a network trained for real, exported, verified, bundled, and compared in accuracy."""

import hashlib
import json
import re
import shutil
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import scconv_deploy
from scconv_deploy.bundle.contents import MODEL
from scconv_deploy.bundle.manifest import differing_files, read_manifest
from scconv_deploy.errors import ModelError
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.verification.options import Checks
from scconv_deploy.workflows.deploy import ExportOptions, deploy_spec
from scconv_deploy.workflows.inspect import inspect_model, inspect_onnx
from scconv_deploy.workflows.subject import Bundle, OnnxFile
from scconv_deploy.workflows.verify import verify_subject
from scconv_deploy.zoo import cifar_resnet
from scconv_deploy.zoo.layers import scconv3x3
from tests.digits import train

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def digits():
    """(trained network, test images, test labels)."""
    return train()


@pytest.fixture(scope="module")
def deployed(digits, drawn_pictures, tmp_path_factory):
    """(result, the folder), verified on real digits."""
    net, images, _ = digits
    folder = tmp_path_factory.mktemp("digits")
    np.savez(folder / "digits.npz", image=images[:64].numpy())
    result = scconv_deploy.deploy(
        net,
        images[:16],
        folder / "out",
        dynamic=(DynamicAxis(1, 16, 397),),
        checks=Checks(data=str(folder / "digits.npz")),
    )
    return result, folder / "out"


def test_a_trained_network_passes_on_real_data(deployed):
    result, _ = deployed
    assert result, result.report.failures
    assert sum(sru.teacher_forced.unexplained for sru in result.report.srus) == 0
    assert any(sample.startswith("digits.npz") for sample in result.report.samples)
    assert [sru.variant.split()[0] for sru in result.report.srus] == ["groupbn-hard", "groupnorm-soft"]


def test_accuracy_is_pytorchs(digits, deployed):
    net, images, labels = digits
    session = onnxruntime.InferenceSession(deployed[0].artifact, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images.numpy()})
    with torch.no_grad():
        expected = net(images).argmax(1)
    accuracy = (logits.argmax(1) == labels.numpy()).mean()
    assert accuracy > 0.9
    np.testing.assert_array_equal(logits.argmax(1), expected.numpy())


def test_the_bundle_is_sealed(deployed):
    result, folder = deployed
    names = ["manifest.json", "model.onnx", "reference", "report.html", "report.json", "run.py"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert result.notes == ()
    manifest = read_manifest(folder)
    assert differing_files(folder, manifest) == ()
    assert manifest["verdict"] == "passed"
    assert result.digest == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    report = json.loads((folder / "report.json").read_text())
    assert report["verdict"] == "passed"
    page = (folder / "report.html").read_text()
    assert [title in page for title in ("How close the gates", "Error per layer", "Worst inputs")] == [True] * 3
    assert "scconv1.SRU" in re.findall("<svg.*?</svg>", page, re.S)[0]
    assert report["artifact_sha256"] == manifest["files"]["model.onnx"]["sha256"]
    assert [stage["name"] for stage in report["stages"]] == ["recognize", "export", "simplify", "rewrite", "verify"]


def test_verify_judges_the_bundle_again_and_sees_a_changed_file(digits, deployed, tmp_path):
    net, images, _ = digits
    _, folder = deployed
    assert scconv_deploy.verify(folder, net, images[:4], dynamic=(DynamicAxis(1, 4, 397),))
    model = onnx.load(folder / MODEL)
    bias = next(t for t in model.graph.initializer if t.name == "fc.bias")
    value = onnx.numpy_helper.to_array(bias) + np.float32(0.01)
    bias.CopyFrom(onnx.numpy_helper.from_array(value, "fc.bias"))
    tampered = tmp_path / "tampered"
    tampered.mkdir()
    shutil.copytree(folder, tampered, dirs_exist_ok=True)
    onnx.save(model, tampered / MODEL)
    report = scconv_deploy.verify(tampered, net, images[:4])
    assert not report  # judged all the same
    assert report.provenance["files that differ from the manifest"] == "model.onnx"


def test_a_rejected_artifact_is_named_so(digits, tmp_path, monkeypatch):
    net, images, _ = digits
    checks = Checks(tolerances={"replay_multiple": 1e-9})  # which nothing meets
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no pictures: said, and no reason to lose the verdict
    result = scconv_deploy.deploy(net, images[:2], tmp_path / "out", checks=checks)
    assert not result
    assert result.report.overrides == {"replay_multiple": 1e-9}
    assert result.report.as_json()["tolerances"]["replay_multiple"]["value"] == 4
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["manifest.json", "model.onnx.rejected", "reference", "report.json", "run.py"]
    assert result.notes == (
        "report.html was not written: The HTML report needs matplotlib, which is not installed. "
        "pip install jinja2 matplotlib",
    )
    assert read_manifest(tmp_path / "out")["verdict"] == "failed"
    assert Bundle(tmp_path / "out").model_file()[0].name == "model.onnx.rejected"


@pytest.fixture
def small_zoo():
    """The zoo's ScConv-ResNet with one block a stage for three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar_resnet, "scconv_resnet20", lambda: cifar_resnet.build(1, scconv3x3(), 10, "pad"))
        yield


def test_zoo_model_with_a_dynamic_batch_and_photographs(small_zoo, tmp_path):
    spec = ModelSpec("scconv_resnet20", dynamic=(DynamicAxis(1, 2, 4),))
    result = deploy_spec(
        spec, tmp_path / "out", ExportOptions(), checks=Checks(data="photos"), command="scconv-deploy deploy ..."
    )
    assert result, result.report.failures
    assert len(result.report.srus) == 3
    assert len(result.report.samples) == 5  # the example, both ends of the batch, one between, photographs
    for output in result.report.outputs:
        assert output.replay_ratio <= 8
    assert verify_subject(Bundle(result.folder), spec)
    # the same architecture from another seed is another model
    other = verify_subject(OnnxFile(result.artifact), ModelSpec("scconv_resnet20", seed=1))
    assert not other
    assert other.links[1].status == "failed"
    inspected = inspect_onnx(Bundle(result.folder))
    assert list(inspected.sites.values()) == ["groupbn-hard"] * 3
    assert inspected.operators["scconv::SRU"] == 3
    assert [(i.name, i.dtype, i.shape) for i in inspected.inputs] == [("image", "float", ("batch", 3, 32, 32))]
    assert inspected.functions == {"scconv::SRU": 64}


def test_inspect_a_model_tells_what_training_did():
    untrained = inspect_model(ModelSpec("scconv_resnet20"))
    assert (untrained.parameters, len(untrained.srus), untrained.left_alone) == (154_810, 9, {})
    # 6 of 9 blocks at 32x32, 16x16 and 8x8: 3x3 convolutions of 16, 32 and 64 channels cost 2.36 M each
    assert 20e6 < untrained.multiply_adds < 30e6
    for sru in untrained.srus:
        assert sru.training.startswith("untrained: beta 0, gamma random")
        assert 0.2 < sru.open_share < 0.8


def test_training_passes_the_hard_gate_by_and_reaches_the_soft_one(digits):
    net, _, _ = digits
    assert not net.scconv1.SRU.gn.beta.any()
    assert net.scconv2.SRU.gn.bias.abs().max() > 1e-4


def test_a_shape_that_the_model_refuses_gives_the_corrected_input():
    with pytest.raises(ModelError) as error:
        inspect_model(ModelSpec("scconv_resnet20", inputs=(scconv_deploy.InputSpec((1, 4, 32, 32)),)))
    assert "scconv_resnet20 --input 1x3x32x32" in str(error.value)
