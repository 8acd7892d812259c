"""The zoo: what the paper says of its networks, as far as it says it."""

import pytest
import torch

import scconv_deploy
from scconv_deploy import zoo
from scconv_deploy.model.load import load
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.nn import ScConv
from scconv_deploy.zoo import cifar_resnet, densenet, resnet, resnext, wide_resnet
from scconv_deploy.zoo.layers import initialize, scconv3x3

PARAMETERS_AND_SCCONVS = {
    "scconv_resnet20": (154_810, 9),
    "scconv_resnet56": (516_884, 27),
    "scconv_cifar_resnet50": (14_678_500, 16),
    "scconv_resnext29": (23_177_892, 9),
    "scconv_wrn28_10": (21_108_900, 12),
    "scconv_densenet121": (5_491_364, 58),
    "scconv_resnet50": (16_530_280, 16),
    "scconv_resnet50_alpha34": (17_375_144, 16),
    "scconv_resnet101": (27_527_784, 33),
    "resnet20": (269_722, 0),
    "resnet56": (861_620, 0),
    "cifar_resnet50": (23_705_252, 0),
    "resnext29": (27_290_532, 0),
    "wrn28_10": (36_546_980, 0),
    "densenet121": (7_048_548, 0),
    "resnet50": (25_557_032, 0),
    "resnet101": (44_549_160, 0),
    "scconv_retinanet_r50": (27_697_240, 16),
    "retinanet_r50": (36_723_992, 0),
}

SMALL = {
    "resnet": (lambda: resnet.build((1, 1, 1, 1), scconv3x3(), 10, width=16), (1, 3, 32, 32), 4),
    "cifar_resnet": (lambda: cifar_resnet.build(1, scconv3x3(), 10, "conv"), (1, 3, 16, 16), 3),
    "cifar_bottleneck": (
        lambda: cifar_resnet.build_bottleneck((1, 1, 1, 1), scconv3x3(), 10, width=16), (1, 3, 16, 16), 4,
    ),
    "resnext": (lambda: resnext.build(scconv3x3(group_size=4), 10, 1, 64), (1, 3, 16, 16), 3),
    "wide_resnet": (
        lambda: wide_resnet.build(wide_resnet.normalized_scconv3x3(), 10, 1, 1), (1, 3, 16, 16), 3,
    ),
    "densenet": (lambda: densenet.build(densenet.narrowing_scconv(), 10, (1, 1), 8), (1, 3, 16, 16), 2),
}  # fmt: skip
"""Family -> a network of few blocks and channels, its input, its ScConvs."""


def small(family):
    factory, shape, scconvs = SMALL[family]
    torch.manual_seed(0)
    return factory().eval(), torch.randn(shape, generator=torch.Generator().manual_seed(0)), scconvs


def test_parameters_and_every_block_has_its_scconv(listing):
    found = {entry.name: (entry.counts.parameters, entry.counts.scconvs) for entry in listing.entries}
    assert found == PARAMETERS_AND_SCCONVS


@pytest.mark.parametrize(
    ("name", "classes"), [("scconv_resnet20", 10), ("resnet20", 10), ("scconv_cifar_resnet50", 100)]
)
def test_output(name, classes):
    model = load(ModelSpec(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS_AND_SCCONVS[name][0]  # as on the meta device
    (x,) = ModelSpec(name).resolved().inputs
    with torch.no_grad():
        y = model(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    assert y.shape == (1, classes)
    assert 0.01 < y.std() < 10


@pytest.mark.parametrize("family", ["resnext", "wide_resnet", "densenet"])
def test_every_family_deploys(family, tmp_path):
    """cifar_resnet is deployed by tests/workflows/test_deploy.py, resnet by test_retinanet.py, as its backbone."""
    model, x, scconvs = small(family)
    result = scconv_deploy.deploy(model, x, tmp_path / "bundle")
    assert result, result.report.failures
    assert len(result.report.srus) == scconvs
    assert not result.report.left_alone
    for sru in result.report.srus:
        assert sru.teacher_forced.gates > 0
        assert sru.teacher_forced.flips == 0


@pytest.mark.parametrize("family", SMALL)
def test_gates_matter_before_training(family):
    """Were the residual branches to vanish, verification of an untrained network would prove nothing."""
    model, x, _ = small(family)
    with torch.no_grad():
        y = model(x)
        for m in model.modules():
            if isinstance(m, ScConv):
                m.SRU.gn.gamma.neg_()  # gamma / sum(gamma) stays; gamma times it changes its sign
        assert (model(x) - y).norm() / y.norm() > 0.01


def test_same_seed_same_weights():
    first, second = load(ModelSpec("scconv_resnet20")), load(ModelSpec("scconv_resnet20"))
    other = load(ModelSpec("scconv_resnet20", seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_the_number_of_threads_makes_no_other_network():
    """What was exported on one machine is verified on another."""
    threads = torch.get_num_threads()
    states = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), torch.nn.BatchNorm2d(64))
            states.append(initialize(net, (2, 3, 56, 56)).state_dict())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    first, *others = states
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_a_stride_is_average_pooling_before_scconv():
    module = scconv3x3()(16, 2)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), module[1](torch.nn.functional.avg_pool2d(x, 2)))
    assert isinstance(scconv3x3()(16, 1), ScConv)


def test_the_two_shortcuts_of_a_basic_block():
    """Option A strides and pads with zeros, option B is a strided 1x1 with its BatchNorm; the branch is made zero."""
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    blocks = [cifar_resnet.BasicBlock(4, 8, 2, scconv3x3(num_groups=2), kind).eval() for kind in ("pad", "conv")]
    for block in blocks:
        torch.nn.init.zeros_(block.bn2.weight)
    padded, projected = (block(x) for block in blocks)
    expected = torch.zeros(1, 8, 3, 3)
    expected[:, 2:6] = x[:, :, ::2, ::2].relu()
    assert torch.equal(padded, expected)
    weight = blocks[1].downsample[0].weight[:, :, 0, 0]
    scale = (1 + blocks[1].downsample[1].eps) ** -0.5
    expected = torch.einsum("oc,nchw->nohw", weight, x[:, :, ::2, ::2]) * scale
    torch.testing.assert_close(projected, expected.relu())


def test_a_pre_activation_block_adds_its_normalized_scconv():
    block = wide_resnet.PreActivationBlock(16, 16, 1, wide_resnet.normalized_scconv3x3()).eval()
    x = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    scconv, norm = block.conv2
    norm.running_var.fill_(1e-4)
    branch = scconv(block.bn2(block.conv1(block.bn1(x).relu())).relu())
    torch.testing.assert_close(block(x), x + branch / (1e-4 + norm.eps) ** 0.5)


def test_a_dense_layer_keeps_its_input_and_adds_what_scconv_makes():
    layer = densenet.DenseLayer(6, 8, densenet.narrowing_scconv()).eval()
    x = torch.randn(1, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    assert torch.equal(y[:, :6], x)
    torch.testing.assert_close(y[:, 6:], layer.conv2(layer.bn2(layer.conv1(layer.bn1(x).relu())).relu()))
    assert layer.conv2.CRU.PWC2 is None  # the squeezed lower half is the growth already


def test_scconv_options_reach_the_modules():
    model = zoo.MODELS["scconv_resnet20"].build(num_classes=3, variant="groupnorm-soft", alpha=0.75)
    assert model.fc.out_features == 3
    assert model.layer1[0].conv2.SRU.variant.name == "groupnorm-soft"
    assert model.layer1[0].conv2.CRU.up_channels == 12


def first_cru(model):
    """The CRU of the first ScConv."""
    return next(module for module in model.modules() if isinstance(module, ScConv)).CRU


def test_defaults_of_an_entry_and_how_they_give_way():
    build = {name: model.build for name, model in zoo.MODELS.items()}
    with torch.device("meta"):
        assert first_cru(build["scconv_resnet50_alpha34"]()).up_channels == 48
        assert first_cru(build["scconv_resnet50_alpha34"](alpha=0.25)).up_channels == 16
        assert first_cru(build["scconv_resnext29"]()).GWC.groups == 4
        assert first_cru(build["scconv_resnext29"](group_size=8)).GWC.groups == 8
        assert first_cru(build["scconv_wrn28_10"](group_size=4)).GWC.groups == 4
        assert first_cru(build["scconv_densenet121"](squeeze_ratio=4)).PWC2.out_channels == 16


def test_a_network_without_values_is_not_calibrated():
    with torch.device("meta"):
        model = zoo.MODELS["scconv_resnet20"].build()
    assert model.bn1.running_mean.is_meta
    assert model.training
