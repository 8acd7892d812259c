"""RetinaNet, small: its boxes in ONNX Runtime are PyTorch's one to one, on noise and on photographs."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import scconv_deploy
from scconv_deploy import zoo
from scconv_deploy.errors import ConfigurationError
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.load import load
from scconv_deploy.model.signature import Signature
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.nn import ScConv
from scconv_deploy.verification.detections import align_rows
from scconv_deploy.verification.preprocessing import Preprocessing
from scconv_deploy.verification.samples import load_samples, noise_samples
from scconv_deploy.zoo.detection import DetectionOptions, detect
from scconv_deploy.zoo.layers import scconv3x3
from scconv_deploy.zoo.retinanet import Head, build

BATCH = DynamicAxis(1, 2, 4)


class ShortHead(Head):
    """One 3x3 and a last one: the heads stand five times in a graph."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.convs = self.convs[:1]


def small_retinanet(raw=False):
    """One bottleneck a stage, 16 channels, 3 classes, short heads; seeded, in eval mode."""
    torch.manual_seed(0)
    options = DetectionOptions(score_threshold=0.03, candidates_per_level=200, max_detections=20)
    blocks = (1, 1, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scconv_deploy.zoo.retinanet.Head", ShortHead)
        return build(scconv3x3(), 3, raw, blocks=blocks, width=16, channels=16, options=options).eval()


def noise(batch, seed=0):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def small():
    return small_retinanet()


@pytest.fixture(scope="module")
def deployed(small, tmp_path_factory):
    pytest.importorskip("sklearn.datasets", reason="the photographs come with scikit-learn")
    folder = tmp_path_factory.mktemp("retinanet") / "out"
    return scconv_deploy.deploy(small, noise(2), folder, dynamic=(BATCH,), checks=scconv_deploy.Checks(data="photos"))


def run_onnx(path, image):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": image.numpy()}), strict=True))


def test_it_is_verified_gate_by_gate_and_box_by_box(deployed):
    report = deployed.report
    assert report, report.failures
    assert [output.name for output in report.outputs] == ["boxes", "scores", "labels", "count"]
    assert len(report.srus) == 4
    assert sum(sru.teacher_forced.unexplained for sru in report.srus) == 0
    assert report.samples[-1].startswith("photos")


def test_boxes_match_one_to_one(small, deployed):
    signature = Signature((noise(2),), {}, ("image",), (BATCH,))
    counts = []
    photos = load_samples("photos", signature, Preprocessing(zoo.IMAGENET_MEAN, zoo.IMAGENET_STD))
    for sample in (*noise_samples(signature, 5), *photos):
        image = sample.tensors["image"]
        with torch.no_grad():
            expected = {name: value.numpy() for name, value in small(image).items()}
        found = align_rows(run_onnx(deployed.artifact, image), expected)
        counts += expected["count"].tolist()
        np.testing.assert_array_equal(found["count"], expected["count"])
        np.testing.assert_array_equal(found["labels"], expected["labels"])
        np.testing.assert_allclose(found["scores"], expected["scores"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["boxes"], expected["boxes"], rtol=0, atol=1e-3)
    assert min(counts) >= 10  # there is something to compare,
    assert min(counts) < 20  # padding among it


def test_the_graph_holds_standard_operators_and_fixed_outputs(deployed):
    model = onnx.load(deployed.artifact)
    operators = {node.op_type for node in model.graph.node if node.domain == ""}
    assert {"NonMaxSuppression", "TopK", "ScatterND"} <= operators
    assert {node.domain for node in model.graph.node} == {"", "scconv"}
    shapes = {
        output.name: [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim]
        for output in model.graph.output
    }
    expected = {"boxes": ["batch", 20, 4], "scores": ["batch", 20], "labels": ["batch", 20], "count": ["batch"]}
    assert shapes == expected


def test_another_overlap_threshold_fails_parity(small, deployed, tmp_path):
    model = onnx.load(deployed.artifact)
    node = next(node for node in model.graph.node if node.op_type == "NonMaxSuppression")
    threshold = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[3])
    assert onnx.numpy_helper.to_array(threshold).tolist() == [0.5]
    threshold.CopyFrom(onnx.numpy_helper.from_array(np.float32([0.45]), threshold.name))
    onnx.save(model, tmp_path / "model.onnx")
    report = scconv_deploy.verify(tmp_path / "model.onnx", small, noise(2))
    assert not report
    assert any("boxes" in failure for failure in report.failures)


def test_raw_outputs_are_what_the_boxes_come_from(small):
    raw = small_retinanet(raw=True)
    image = noise(2, seed=3)
    with torch.no_grad():
        outputs, found = raw(image), small(image)
    anchors = raw.anchors(64, 64)
    per_level = [len(level) for level in anchors]
    assert per_level == [9 * cells for cells in (64, 16, 4, 1, 1)]
    assert outputs["logits"].shape == (2, sum(per_level), 3)
    assert outputs["deltas"].shape == (2, sum(per_level), 4)
    split = [outputs[name].split(per_level, dim=1) for name in ("logits", "deltas")]
    expected = detect(*split, anchors, (64, 64), small.options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    last = raw.classes(raw.pyramid(*raw.backbone.features(image))[-1])
    torch.testing.assert_close(outputs["logits"][:, -9:], last)


def test_anchors_grow_with_the_map(small):
    anchors = small.anchors(64, 96)
    assert [len(level) for level in anchors] == [9 * n for n in (8 * 12, 4 * 6, 2 * 3, 1 * 2, 1)]
    torch.testing.assert_close(anchors[0][3], torch.tensor([-16.0, -16, 16, 16]))
    torch.testing.assert_close(anchors[0][12], torch.tensor([-8.0, -16, 24, 16]))
    torch.testing.assert_close(anchors[3][9 + 3], torch.tensor([-64.0, -128, 192, 128]))


def test_an_untrained_network_scores_around_its_prior():
    with torch.no_grad():
        outputs = small_retinanet(raw=True)(noise(4, seed=1))
    assert outputs["logits"].mean().item() == pytest.approx(-4.6, abs=0.5)
    assert 0.5 < outputs["logits"].std() < 2
    assert 0.1 < outputs["deltas"].std() < 0.5


def test_the_untrained_baseline_does_not_saturate_on_smooth_images():
    """Scores of exactly 1 are ties, and rounding would decide which boxes come out."""
    coarse = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    image = torch.nn.functional.interpolate(coarse, size=(128, 192), mode="bilinear")
    with torch.no_grad():
        found = load(ModelSpec("retinanet_r50"))(image)
    assert found["count"].tolist() == [100]
    assert found["scores"].max() < 0.99
    size = found["boxes"][..., 2:] - found["boxes"][..., :2]
    assert (size > 0).all()


def test_train_mode_gives_what_a_loss_takes():
    model = small_retinanet().train()
    outputs = model(noise(2))
    (outputs["logits"].sum() + outputs["deltas"].square().sum()).backward()
    assert set(outputs) == {"logits", "deltas"}
    for name, parameter in model.named_parameters():
        if ".SRU.gn." not in name:  # a hard mask passes it no gradient
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_an_image_that_does_not_halve_five_times_is_refused(small):
    with pytest.raises(ConfigurationError, match="an image of 64x48, expected multiples of 32"):
        small(torch.zeros(1, 3, 64, 48))


# torchvision's has 34,014,999; ours P6 from C5 (+4,128,768), 20 classes for 91 (-1,472,895), BatchNorms that train
@pytest.mark.parametrize(
    ("name", "parameters", "scconvs"), [("scconv_retinanet_r50", 27_697_240, 16), ("retinanet_r50", 36_723_992, 0)]
)
def test_the_zoo_entries(name, parameters, scconvs):
    model = load(ModelSpec(name, kwargs={"raw": True, "score_threshold": 0.3}))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(module, ScConv) for module in model.backbone.modules()) == scconvs
    assert sum(isinstance(module, ScConv) for module in model.modules()) == scconvs
    assert model.raw
    assert model.options == DetectionOptions(score_threshold=0.3)
    assert sum(len(level) for level in model.anchors(480, 640)) == 9 * 6400
