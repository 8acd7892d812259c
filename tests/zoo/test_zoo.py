"""The zoo: what the paper says of its networks, as far as it says it."""

import pytest
import torch

from scconv_deploy import zoo
from scconv_deploy.nn import ScConv
from scconv_deploy.spec import ModelSpec, load
from scconv_deploy.zoo.layers import scconv3x3

# the paper's table 1 and 5 give 0.52 M for ResNet-56 and 16.78 M for ResNet-50 (100 and 1000 classes)
PARAMETERS = {
    "scconv_resnet20": 154_810,
    "scconv_resnet56": 508_282,
    "scconv_resnet50": 16_530_280,
    "resnet20": 269_722,
    "resnet56": 853_018,
    "resnet50": 25_557_032,
}


CLASSIFIERS = [name for name in zoo.MODELS if "retinanet" not in name]  # the detectors: test_retinanet.py


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_parameters_and_output(name):
    model = load(ModelSpec(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    (x,) = ModelSpec(name).resolved().inputs
    with torch.no_grad():
        y = model(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    assert y.shape == (1, 1000 if "50" in name else 10)
    assert 0.01 < y.std() < 10


@pytest.mark.parametrize(("name", "count"), [("scconv_resnet20", 9), ("scconv_resnet56", 27), ("scconv_resnet50", 16)])
def test_every_block_has_its_scconv(name, count):
    model = load(ModelSpec(name))
    assert sum(isinstance(m, ScConv) for m in model.modules()) == count


def test_same_seed_same_weights():
    first, second = load(ModelSpec("scconv_resnet20")), load(ModelSpec("scconv_resnet20"))
    other = load(ModelSpec("scconv_resnet20", seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_gates_matter_before_training():
    """Were the residual branches to vanish, verification of an untrained network would prove nothing."""
    model = load(ModelSpec("scconv_resnet20"))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x)
        for m in model.modules():
            if isinstance(m, ScConv):
                m.SRU.gn.gamma.neg_()  # gamma / sum(gamma) stays; gamma times it changes its sign
        assert (model(x) - y).norm() / y.norm() > 0.01


def test_a_stride_is_average_pooling_before_scconv():
    module = scconv3x3()(16, 2)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), module[1](torch.nn.functional.avg_pool2d(x, 2)))
    assert isinstance(scconv3x3()(16, 1), ScConv)


def test_scconv_options_reach_the_modules():
    model = zoo.MODELS["scconv_resnet20"].build(num_classes=3, variant="groupnorm-soft", alpha=0.75)
    assert model.fc.out_features == 3
    assert model.layer1[0].conv2.SRU.variant.name == "groupnorm-soft"
    assert model.layer1[0].conv2.CRU.up_channels == 12
