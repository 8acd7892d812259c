"""embed: what is replaced, what is left and why, what it costs, on networks small enough to count by hand."""

from __future__ import annotations

import inspect
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scconv_deploy
from scconv_deploy import embed
from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.nn import ScConv
from scconv_deploy.zoo.cifar_resnet import CifarResNet, resnet20
from scconv_deploy.zoo.embed_spec import SCCONV_OPTIONS, EmbedSpec
from scconv_deploy.zoo.layers import conv3x3, scconv3x3
from scconv_deploy.zoo.resnet import ResNet


def conv(channels=16, out=None, stride=1, **options):
    return nn.Conv2d(channels, out or channels, 3, stride, **{"padding": 1, "bias": False, **options})


def named(**modules):
    return nn.Sequential(OrderedDict(modules))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# --- the paper's rule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baseline", "zoo"),
    [
        (lambda: CifarResNet(2, conv3x3), lambda: CifarResNet(2, scconv3x3())),
        (lambda: ResNet((2, 1, 1, 1), conv3x3, 10), lambda: ResNet((2, 1, 1, 1), scconv3x3(), 10)),
    ],
    ids=["basic blocks", "bottlenecks with strides"],
)
def test_the_papers_rule_gives_the_zoos_network(baseline, zoo):
    theirs = zoo().eval()
    x = noise(2, 3, 32, 32)
    ours = embed(baseline().eval(), "paper", example_inputs=x)
    assert ours.parameters_after == sum(p.numel() for p in theirs.parameters())
    assert list(ours.model.state_dict()) == list(theirs.state_dict())
    ours.model.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours.model(x), theirs(x))


def test_resnet20_and_resnet50_have_the_zoos_parameters():
    result = embed(resnet20())
    assert (result.parameters_before, result.parameters_after) == (269_722, 154_810)
    result = embed(ResNet((3, 4, 6, 3), conv3x3))
    assert (result.parameters_before, result.parameters_after) == (25_557_032, 16_530_280)
    assert len(result.replaced) == 16
    assert result.replaced[3] == ("layer2.0.conv2", "3x3 128 -> 128, stride 2x2: average pooling, ScConv 128")
    assert result.left == ()  # its stem is 7x7
    assert result.multiply_adds_before is None


class Wrapped(nn.Module):
    """Blocks as others write them: convolutions in modules of their own, the shortcut first, an attention last."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 16)
        self.second_stem = conv(16)
        self.bottleneck = named(
            shortcut=nn.Conv2d(16, 64, 1),
            layer=named(
                a=named(conv=nn.Conv2d(16, 32, 1)),
                b=named(conv=conv(32), norm=nn.BatchNorm2d(32)),
                c=named(conv=nn.Conv2d(32, 64, 1)),
            ),
        )
        self.basic = named(
            shortcut=nn.Conv2d(64, 32, 1),
            a=conv(64, 32),
            b=conv(32),
            attention=nn.ModuleList([nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)]),
        )
        self.grouped = nn.ModuleList([nn.Conv2d(32, 32, 1), conv(32, groups=2), nn.Conv2d(32, 32, 1)])
        self.other_grouped = named(a=nn.Conv2d(32, 32, 1), b=conv(32, groups=2), c=nn.Conv2d(32, 32, 1))
        self.narrowing = named(a=nn.Conv2d(32, 64, 1), b=conv(64, 32), c=nn.Conv2d(32, 32, 1))
        self.single = named(a=conv(32), b=nn.Conv2d(32, 32, 1))


def test_blocks_are_told_by_their_structure():
    result = embed(Wrapped())
    assert result.replaced == (
        ("bottleneck.layer.b.conv", "3x3 32 -> 32: ScConv 32"),
        ("basic.b", "3x3 32 -> 32: ScConv 32"),
    )
    reasons = dict(result.left)
    assert reasons["stem"] == "the stem, the network's first convolution"
    assert reasons["second_stem"].startswith("in no bottleneck")
    assert reasons["basic.a"].startswith("the first 3x3 of a basic block")
    assert reasons["other_grouped.b"].startswith("2 groups")
    assert reasons["narrowing.b"].startswith("64 channels in, 32 out")
    assert reasons["single.a"].startswith("in no bottleneck")
    assert list(reasons) == [
        "stem", "second_stem", "basic.a", "grouped.1", "other_grouped.b", "narrowing.b", "single.a",
    ]  # fmt: skip


def test_nothing_to_replace_is_an_error_that_names_a_pattern():
    with pytest.raises(ModelError, match=r"2 were left; b: in no bottleneck.*--embed 'b'"):
        embed(named(a=conv(3, 16), b=conv(16, padding=1), c=nn.Conv2d(16, 16, 1), d=nn.Conv2d(16, 16, 5)))
    with pytest.raises(ModelError, match=r"Linear: it has no 3x3 convolution. Leave it out"):
        embed(nn.Linear(3, 3))
    with pytest.raises(ModelError, match=r"2 were left; 0.CRU.GWC: part of a CRU. Leave it out"):
        embed(nn.Sequential(ScConv(16), ScConv(16)))


# --- patterns ----------------------------------------------------------------------------------------------------


def test_a_pattern_names_convolutions():
    net = named(a=conv(), b=named(x=conv(), y=conv()), c=nn.Conv2d(16, 16, 1))
    result = embed(net, "b.*, c")
    assert [path for path, _ in result.replaced] == ["b.x", "b.y"]
    assert result.left == (("a", "the pattern does not name it"), ("c", "its kernel is 1x1, ScConv replaces 3x3"))
    assert [path for path, _ in embed(net, "*").replaced] == ["a", "b.x", "b.y"]
    assert [path for path, _ in embed(net, "b.[x]").replaced] == ["b.x"]


def test_a_pattern_takes_what_the_papers_rule_leaves():
    net = named(grouped=conv(32, groups=4), wide=conv(32, 64, stride=2), last=conv(64, 32, bias=True))
    result = embed(net, "*")
    assert result.replaced == (
        ("grouped", "3x3 32 -> 32, 4 groups: ScConv 32"),
        ("wide", "3x3 32 -> 64, stride 2x2: average pooling, 1x1 32 -> 64, ScConv 64"),
        ("last", "3x3 64 -> 32, with a bias: 1x1 64 -> 32, ScConv 32"),
    )


def test_a_pattern_that_names_nothing_is_an_error_with_near_matches():
    with pytest.raises(UsageError, match=r"'layer1.0.conv' .* nearest are layer1.0.conv2, layer1.0.conv1"):
        embed(ResNetLike(), "layer1.0.conv")
    with pytest.raises(UsageError, match="has no 3x3 convolution"):
        embed(nn.Linear(3, 3), "*")


class ResNetLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(named(conv1=conv(), conv2=conv()))


# --- what any rule leaves ----------------------------------------------------------------------------------------


class Subclass(nn.Conv2d):
    pass


def with_hook():
    module = conv()
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: conv(groups=16), "depthwise"),
        (lambda: conv(dilation=2, padding=2), "dilation 2x2"),
        (lambda: conv(padding=0), "padding (0, 0)"),
        (lambda: conv(padding=(1, 0)), "padding (1, 0)"),
        (lambda: conv(padding="valid"), "padding valid"),
        (lambda: conv(padding_mode="reflect"), "padding mode 'reflect'"),
        (lambda: Subclass(16, 16, 3, 1, 1), "Subclass, which may compute more"),
        (lambda: nn.ConvTranspose2d(16, 16, 3, 1, 1), "ConvTranspose2d"),
        (lambda: nn.utils.parametrizations.weight_norm(conv()), "ParametrizedConv2d"),
        (with_hook, "forward hooks"),
        (lambda: conv(17), "17 channels"),
        (lambda: conv(8), "8 channels"),
        (lambda: conv(52), "13 squeezed upper channels"),
        (lambda: scconv3x3()(16), "part of a CRU"),
    ],
)
def test_left_with_its_reason(make, reason):
    result = embed(named(good=conv(), other=make()), "*")
    assert [path for path, _ in result.replaced] == ["good"]
    left = dict(result.left)
    assert any(path.startswith("other") and reason in why for path, why in left.items()), left
    assert not any(isinstance(m, ScConv) for n, m in result.model.other.named_modules() if n)


def test_padding_same_is_padding_1():
    assert len(embed(named(a=conv(padding="same")), "a").replaced) == 1


def test_a_shared_weight_is_left():
    net = named(a=conv(), b=conv(), c=conv())
    net.b.weight = net.a.weight
    result = embed(net, "*")
    assert [path for path, _ in result.replaced] == ["c"]
    assert result.left == (("a", "it shares its weight with b"), ("b", "it shares its weight with a"))


class Odd(nn.Module):
    """Does with its convolutions what a replacement does not survive."""

    def __init__(self):
        super().__init__()
        self.good = conv()
        self.unused = conv()
        self.functional = conv()
        self.looked_at = conv()
        self.tiny = conv()
        self.listed = conv()
        self._list = [lambda x, call=self.listed: call(x)]  # deepcopy keeps a function as it is

    def forward(self, x):
        x = self.good(x)
        x = x + F.conv2d(x, self.functional.weight, padding=1)
        x = self.looked_at(x.to(self.looked_at.weight.dtype))
        x = self._list[0](x)
        return self.tiny(x.mean((2, 3), keepdim=True))


def test_what_the_model_does_not_run_without_is_left():
    result = embed(Odd().eval(), "*", example_inputs=noise(1, 16, 8, 8))
    assert [path for path, _ in result.replaced] == ["good"]
    left = dict(result.left)
    assert list(left) == ["unused", "functional", "looked_at", "tiny", "listed"]
    for path in ("unused", "functional"):
        assert left[path].startswith("the model does not call it")
    assert "AttributeError: 'ScConv' object has no attribute 'weight'" in left["looked_at"]
    assert "does not run with ScConv there: ConfigurationError" in left["tiny"]
    # the copy's own convolution is never called, only the one that the function holds
    assert left["listed"].startswith("the model does not call it")
    result.model(noise(1, 16, 8, 8))


def test_inputs_that_do_not_fit_are_told():
    with pytest.raises(ModelError, match="Sequential refuses its inputs: RuntimeError"):
        embed(named(a=conv()), "a", example_inputs=noise(1, 3, 8, 8))


def test_models_that_are_no_modules_yet_are_refused():
    with pytest.raises(ModelError, match=r"b\.weight has no shape yet"):
        embed(named(a=conv(), b=nn.LazyConv2d(16, 3)), "*")
    with pytest.raises(UsageError, match="TorchScript"):
        embed(torch.jit.script(named(a=conv())), "a")


# --- what stands there now ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (7, 10), (9, 5)])
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
def test_a_replacement_gives_the_shape_of_the_convolution(size, stride):
    net = named(a=conv(16, stride=stride), b=conv(16, 32, stride))
    result = embed(net, "*", example_inputs=noise(2, 16, *size))
    x = noise(2, 16, *size)
    for path in ("a", "b"):
        assert result.model.get_submodule(path)(x).shape == net.get_submodule(path)(x).shape


def test_a_stride_is_pooling_and_a_channel_change_a_1x1():
    module = embed(named(a=conv(16, 32, 2)), "a").model.a
    x = noise(2, 16, 8, 8)
    pooled = F.conv2d(F.avg_pool2d(x, 2), module[1].weight)
    torch.testing.assert_close(module(x), module[2](pooled))
    assert module[2].SRU.variant.name == "groupbn-hard"


def test_options_reach_scconv():
    result = embed(named(a=conv()), "a", alpha=0.75, variant="groupnorm-soft", fusion="pairwise")
    assert (result.model.a.CRU.up_channels, result.model.a.CRU.fusion) == (12, "pairwise")
    assert result.model.a.SRU.variant.name == "groupnorm-soft"
    with pytest.raises(TypeError, match="alpa"):
        embed(named(a=conv()), "a", alpa=0.75)


def test_a_shared_convolution_is_replaced_everywhere_by_one():
    once = conv()
    net = nn.ModuleDict({"a": once, "b": named(again=once), "c": conv()})
    result = embed(net, "b.*")
    assert result.replaced == (("a", "3x3 16 -> 16: ScConv 16 (also at b.again)"),)
    assert result.model["a"] is result.model["b"].again
    assert result.parameters_after == 512 - 16 + 16 + 16 * 16 * 9


def test_a_model_that_is_a_convolution():
    result = embed(conv(), "model", example_inputs=noise(1, 16, 8, 8))
    assert isinstance(result.model, ScConv)


def test_the_model_is_not_changed_and_shares_nothing():
    net = named(a=conv(), norm=nn.BatchNorm2d(16), b=conv())
    net.b.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = embed(net, "a", example_inputs=noise(2, 16, 8, 8), calibrate=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert type(net.a) is nn.Conv2d
    theirs = {t.data_ptr() for t in net.state_dict().values()}
    assert not theirs & {t.data_ptr() for t in result.model.state_dict().values()}
    assert torch.equal(result.model.b.weight, net.b.weight)
    modes = (net.training, net.norm.training, result.model.a.training, result.model.norm.training)
    assert modes == (True, True, True, True)
    assert (net.b.training, result.model.b.training) == (False, False)
    assert not embed(net.eval(), "a").model.a.SRU.training


def test_same_seed_same_values():
    def weights(seed):
        net = named(a=conv())
        torch.manual_seed(seed)
        return embed(net, "a", example_inputs=noise(1, 16, 8, 8)).model.a.CRU.GWC.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_device_and_dtype_are_the_convolutions():
    net = named(a=conv(), b=conv()).double()
    assert embed(net, "a").model.a.CRU.GWC.weight.dtype == torch.float64
    assert embed(net.to("meta"), "a").model.a.CRU.GWC.weight.is_meta


# --- costs, by hand ----------------------------------------------------------------------------------------------


def test_parameters_and_multiply_adds_before_and_after():
    # 16 channels, 8x8: the 3x3 has 16*16*9 weights and 16 biases, each weight multiplies at 64 places
    # ScConv, alpha 1/2 and r 2: squeeze1 8*4, squeeze2 8*4, GWC 4/2*16*9 and 16 biases, PWC1 4*16, PWC2 4*12,
    # gamma and beta 16 each
    weights = 32 + 32 + 288 + 64 + 48
    result = embed(named(a=conv(bias=True)), "a", example_inputs=noise(3, 16, 8, 8))
    assert (result.parameters_before, result.parameters_after) == (2304 + 16, weights + 16 + 32)
    assert (result.multiply_adds_before, result.multiply_adds_after) == (2304 * 64, weights * 64)
    assert result.summary == (
        "rule a: 1 convolutions replaced, 0 left",
        "parameters 2,320 -> 512 (-77.9%)",
        "multiply-adds a sample 147,456 -> 29,696 (-79.9%)",
        "ScConv has its initial values: fine-tune the embedded network before it is of use",
    )


def test_pooling_comes_before_the_1x1():
    # 32 channels at 4x4: 1x1 16*32, squeeze 16*8 twice, GWC 8/2*32*9, PWC1 8*32, PWC2 8*24
    result = embed(named(a=conv(16, 32, 2)), "a", example_inputs=noise(1, 16, 8, 8))
    assert result.multiply_adds_before == 16 * 32 * 9 * 16
    assert result.multiply_adds_after == (512 + 128 + 128 + 1152 + 256 + 192) * 16


# --- calibration -------------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    """A norm that never trains, as detectors have it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(16))
        self.register_buffer("running_var", torch.ones(16))

    def forward(self, x):
        shape = (1, -1, 1, 1)
        return (x - self.running_mean.view(shape)) / (self.running_var.view(shape) + 1e-5).sqrt()


def test_calibration_takes_the_norms_behind_scconv():
    net = named(
        first=conv(), early=nn.BatchNorm2d(16), a=conv(), norm=nn.BatchNorm2d(16), gain=nn.Conv2d(16, 16, 1),
        frozen=Frozen(),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net.gain.weight.mul_(1000)
    x = noise(4, 16, 8, 8)
    result = embed(net, "a", example_inputs=x, calibrate=True)
    new = result.model
    assert result.calibrated == ("norm", "frozen")
    assert torch.equal(new.early.running_var, torch.ones(16))
    with torch.no_grad():
        y = new.a(new.early(new.first(x)))
        torch.testing.assert_close(new.norm.running_mean, y.mean((0, 2, 3)))
        assert (y.var((0, 2, 3)) < 1 / 64).all()  # ScConv divides by about 2C
        assert torch.equal(new.norm.running_var, torch.full((16,), 1 / 64))
        z = new(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(16), atol=1e-3, rtol=0)
    assert not new.training
    kept = embed(net, "a", example_inputs=x)
    assert kept.calibrated == ()
    assert torch.equal(kept.model.norm.running_var, torch.ones(16))


def test_calibration_makes_gates_matter():
    net = resnet20().eval()
    x = noise(4, 3, 32, 32)

    def moved(calibrate):
        model = embed(net, example_inputs=x, calibrate=calibrate).model
        with torch.no_grad():
            before = model(x)
            for module in model.modules():
                if isinstance(module, ScConv):
                    module.SRU.gn.gamma.neg_()  # gamma / sum(gamma) stays; gamma times it changes its sign
            return (model(x) - before).norm() / before.norm()

    assert moved(True) > 0.01
    assert moved(True) > 3 * moved(False)


def test_calibration_needs_inputs_with_a_variance():
    with pytest.raises(UsageError, match="calibrate needs example inputs"):
        embed(named(a=conv()), "a", calibrate=True)
    net = named(a=conv(), pool=nn.AdaptiveAvgPool2d(1), norm=nn.BatchNorm2d(16)).eval()
    with pytest.raises(ModelError, match="norm gets one value a channel"):
        embed(net, "a", example_inputs=noise(1, 16, 8, 8), calibrate=True)


# --- how it is written -------------------------------------------------------------------------------------------


def test_embed_is_a_rule_or_json():
    assert EmbedSpec.parse("layer[34].*.conv2") == EmbedSpec("layer[34].*.conv2")
    parsed = EmbedSpec.parse('{"rule": "a.*", "calibrate": true, "alpha": 0.75, "variant": "groupnorm-soft"}')
    assert parsed == EmbedSpec("a.*", True, {"alpha": 0.75, "variant": "groupnorm-soft"})
    assert EmbedSpec.parse(str(parsed)) == parsed
    assert EmbedSpec.parse("{}") == EmbedSpec("paper")
    assert str(EmbedSpec("paper")) == "paper"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (" , ", "empty"),
        ("{rule: paper}", "is not JSON"),
        ('{"rull": "paper"}', "no argument 'rull'. Did you mean rule"),
        ('{"alpha": "a half"}', "alpha is 'a half', expected int or float"),
        ('{"group_size": true}', "group_size is True, expected int"),
        ('{"calibrate": 1}', "calibrate is 1, expected bool"),
    ],
)
def test_what_embed_is_not(text, words):
    with pytest.raises(UsageError, match=words):
        EmbedSpec.parse(text)


def test_every_argument_of_scconv_can_be_given():
    assert list(SCCONV_OPTIONS) == [
        name
        for name in inspect.signature(ScConv).parameters
        if name not in ("channels", "out_channels", "dims")  # of the convolution that is replaced, which is 2-D
    ]


# --- what it did is not lost -------------------------------------------------------------------------------------


def test_the_record_of_an_embedding_reaches_the_stages_of_an_export(tmp_path):
    """export, deploy and verify take the result of embed as well as a module."""
    embedded = embed(named(conv1=conv(3, 16), conv2=conv()).eval(), "conv2")
    result = scconv_deploy.export(embedded, noise(2, 3, 8, 8), tmp_path / "model.onnx")
    assert result.sites == {"conv2.SRU": "groupbn-hard"}
    (record,) = [stage for stage in result.stages if stage.name == "embed"]
    assert record.applied[:2] == embedded.summary[:2]
    assert record.applied[-1].startswith("conv2: ")
    assert record.skipped == embedded.left
    plain = scconv_deploy.export(embedded.model, noise(2, 3, 8, 8), tmp_path / "plain.onnx")
    assert "embed" not in [stage.name for stage in plain.stages]
