"""embed on networks of other libraries, where they are installed: replaced, exported, verified gate by gate."""

from __future__ import annotations

import pytest
import torch

from scconv_deploy import deploy, embed

REASON = "embed is tried on its networks where it is installed; it is no dependency"


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def deployed(result, inputs, folder):
    report = deploy(result.model, inputs, folder).report
    assert report, report.failures
    assert len(report.srus) == len(result.replaced)
    assert sum(sru.teacher_forced.unexplained for sru in report.srus) == 0


@pytest.mark.parametrize(("kind", "left"), [("basic", 4), ("bottleneck", 0)])
def test_transformers_resnet(kind, left, tmp_path):
    transformers = pytest.importorskip("transformers", reason=REASON)
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[64, 64, 128, 128], depths=[1, 1, 1, 1], layer_type=kind, num_labels=5
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config).eval()
    inputs = {"pixel_values": images(2, 3, 64, 64)}
    result = embed(model, example_inputs=inputs, calibrate=True)
    assert len(result.replaced) == 4
    assert len(result.left) == left
    assert result.parameters_after < result.parameters_before
    assert result.multiply_adds_after < result.multiply_adds_before
    deployed(result, inputs, tmp_path / "out")


def test_transformers_rt_detr():
    transformers = pytest.importorskip("transformers", reason=REASON)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[1, 1, 1, 1], layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, use_pretrained_backbone=False, encoder_hidden_dim=32, d_model=32,
        encoder_in_channels=[128, 256, 512], decoder_in_channels=[32, 32, 32], encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, decoder_layers=1,
        num_queries=10, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RTDetrForObjectDetection(config).eval()
    inputs = {"pixel_values": images(1, 3, 64, 64)}
    result = embed(model, example_inputs=inputs, calibrate=True)
    assert [path.split(".encoder.")[1] for path, _ in result.replaced] == [
        f"stages.{stage}.layers.0.layer.1.convolution" for stage in range(4)
    ]
    with torch.no_grad():
        assert result.model(**inputs).pred_boxes.shape == (1, 10, 4)


@pytest.mark.parametrize(
    ("name", "rule", "replaced", "parameters"),
    [
        ("resnet18", "paper", 8, 6_690_472),
        ("resnext50_32x4d", "layer*.conv2", 16, 32_753_576),
    ],
)
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_torchvision_and_timm(library, name, rule, replaced, parameters):
    pytest.importorskip(library, reason=REASON, exc_type=(ImportError, RuntimeError))
    torch.manual_seed(0)
    if library == "torchvision":
        from torchvision.models import get_model

        model = get_model(name, weights=None).eval()
    else:
        import timm

        model = timm.create_model(name, pretrained=False).eval()
    result = embed(model, rule, example_inputs=images(1, 3, 64, 64))
    assert len(result.replaced) == replaced
    assert result.parameters_after == parameters
