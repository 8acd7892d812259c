"""The modules: against the original code, and refusing what they cannot be."""

import pytest
import torch

from scconv_deploy.errors import ConfigurationError
from scconv_deploy.nn import CRU, SRU, GroupBatchnorm2d, ScConv
from tests import wild, wild_ranks
from tests.tolerances import SAME_ARITHMETIC


def example(channels=32, size=8, seed=0):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(seed))


def test_original_state_dicts_load_unchanged_and_compute_the_same():
    theirs = wild.randomize(wild.OriginalScConv(32))
    ours = ScConv(32).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(example()), theirs(example()), **SAME_ARITHMETIC)


def test_straddling_groups_load_and_compute_the_same():
    theirs = wild.randomize(wild.OriginalScConv(24))
    ours = ScConv(24).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(example(24)), theirs(example(24)), **SAME_ARITHMETIC)


def test_soft_variant_matches_the_public_head():
    theirs = wild.randomize(wild.SoftSRU(32))
    ours = SRU(32, variant="groupnorm-soft").eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(example()), theirs(example()), **SAME_ARITHMETIC)


def test_normalized_variant_loads_weight_and_bias():
    theirs = wild.randomize(wild.NormalizedSRU(32))
    ours = SRU(32, variant="groupbn-hard-normalized").eval()
    state = {key.replace("norm.", "gn."): value for key, value in theirs.state_dict().items()}
    assert set(state) == {"gn.weight", "gn.bias"}
    ours.load_state_dict(state)
    torch.testing.assert_close(ours(example()), theirs(example()), **SAME_ARITHMETIC)


def test_torch_gn_normalises_by_groupnorm():
    module = SRU(32, torch_gn=True).eval()
    assert set(module.state_dict()) == {"gn.weight", "gn.bias"}
    x = example()
    gate = torch.sigmoid(torch.nn.functional.group_norm(x, 16, eps=1e-5) / 32) >= 0.5
    torch.testing.assert_close(module(x), wild.cross(gate * x, ~gate * x), rtol=0, atol=0)


def test_groupbatchnorm_uses_the_unbiased_deviation():
    module = GroupBatchnorm2d(4, 2)
    with torch.no_grad():
        module.gamma.fill_(1.0)
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 4.0]).reshape(1, 4, 1, 2)
    expected = torch.cat([(torch.arange(4.0) - 1.5) / 1.2909944, (torch.tensor([0.0, 0, 0, 4]) - 1) / 2.0])
    torch.testing.assert_close(module(x).flatten(), expected)


def test_gamma_sum_is_one_operation():
    graph = torch.export.export(SRU(32).eval(), (example(),)).graph
    assert sum(node.op == "call_function" for node in graph.nodes) < 40  # the original: over 32 for the sum alone
    assert [str(n.target) for n in graph.nodes].count("aten.sum.default") == 1


def test_pairwise_fusion_is_equation_8():
    module = CRU(8, fusion="pairwise").eval()
    x = example(8)
    up, low = module.squeeze1(x[:, :4]), module.squeeze2(x[:, 4:])
    y1 = module.GWC(up) + module.PWC1(up)
    y2 = torch.cat([module.PWC2(low), low], 1)
    s1, s2 = y1.mean((2, 3), keepdim=True), y2.mean((2, 3), keepdim=True)
    beta1 = s1.exp() / (s1.exp() + s2.exp())
    torch.testing.assert_close(module(x), beta1 * y1 + (1 - beta1) * y2)
    concat = CRU(8)
    concat.load_state_dict(module.state_dict())
    assert not torch.allclose(concat(x), module(x))


def test_hard_gate_gives_gamma_no_gradient():
    module = SRU(32)
    x = example().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    assert module.gn.gamma.grad is None or not module.gn.gamma.grad.any()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SRU(31, 1), ["31 channels"]),
        (lambda: SRU(8), ["8 channels", "num_groups 16"]),
        (lambda: SRU(24, 16, torch_gn=True), ["24 channels", "num_groups 16", "GroupNorm"]),
        (lambda: SRU(32, variant="nonsense"), ["nonsense", "groupbn-hard"]),
        (lambda: GroupBatchnorm2d(8, 16), ["8 channels", "num_groups 16"]),
        (lambda: CRU(32, alpha=0.0), ["alpha is 0.0"]),
        (lambda: CRU(32, alpha=1.0), ["alpha is 1.0"]),
        (lambda: CRU(32, group_kernel_size=2), ["group_kernel_size is 2"]),
        (lambda: CRU(32, squeeze_ratio=0), ["squeeze_ratio 0"]),
        (lambda: CRU(32, squeeze_ratio=64), ["32 channels", "squeeze_ratio 64"]),
        (lambda: CRU(32, group_size=3), ["32 output channels", "group_size 3"]),
        (lambda: CRU(2, alpha=0.01), ["0 upper"]),
        (lambda: CRU(32, fusion="nonsense"), ["nonsense"]),
    ],
)
def test_impossible_sizes_are_refused_at_construction(build, words):
    with pytest.raises(ConfigurationError) as error:
        build()
    for word in words:
        assert word in str(error.value)


def test_sizes_known_only_from_the_input_are_refused_there():
    with pytest.raises(ConfigurationError, match=r"216 is not a multiple of num_groups 16"):
        SRU(24)(example(24, 3))
    with pytest.raises(ConfigurationError, match="one element"):
        SRU(16)(example(16, 1))


def narrow(cru, x):
    """The paper's equations with C1 and C2, written out; ``x`` is the SRU's output."""
    up, low = x.split([cru.up_channels, cru.low_channels], 1)
    up = torch.einsum("oc,nchw->nohw", cru.squeeze1.weight[:, :, 0, 0], up)
    low = torch.einsum("oc,nchw->nohw", cru.squeeze2.weight[:, :, 0, 0], low)
    y1 = torch.nn.functional.conv2d(up, cru.GWC.weight, cru.GWC.bias, padding=1, groups=cru.GWC.groups)
    y1 = y1 + torch.einsum("oc,nchw->nohw", cru.PWC1.weight[:, :, 0, 0], up)
    made = [] if cru.PWC2 is None else [torch.einsum("oc,nchw->nohw", cru.PWC2.weight[:, :, 0, 0], low)]
    both = torch.cat([y1, *made, low], 1)
    both = both * both.mean((2, 3), keepdim=True).softmax(1)
    return both[:, : y1.shape[1]] + both[:, y1.shape[1] :]


@pytest.mark.parametrize(("out", "made_by_pwc2"), [(8, 0), (12, 4), (40, 32)])
def test_a_cru_that_changes_channels(out, made_by_pwc2):
    """C1 = 32 leaves 8 squeezed channels in each path; the parameters are those of the paper's cost formula."""
    torch.manual_seed(0)
    cru = CRU(32, out_channels=out).eval()
    y = cru(example())
    assert y.shape == (2, out, 8, 8)
    torch.testing.assert_close(y, narrow(cru, example()))
    squeezes, grouped, pointwise = 2 * 16 * 8, 9 * 8 * out // 2 + out, 8 * out + 8 * made_by_pwc2
    assert sum(p.numel() for p in cru.parameters()) == squeezes + grouped + pointwise
    assert (cru.PWC2 is None) == (made_by_pwc2 == 0)


def test_scconv_hands_its_output_channels_on():
    torch.manual_seed(0)
    module = ScConv(32, out_channels=12).eval()
    torch.testing.assert_close(module(example()), narrow(module.CRU, module.SRU(example())))


def test_fewer_output_channels_than_the_lower_path_keeps_are_refused():
    with pytest.raises(ConfigurationError, match="8 squeezed channels, more than the 6 output channels"):
        CRU(32, out_channels=6)
    with pytest.raises(ConfigurationError, match="the 9 output channels must both be multiples of group_size 2"):
        CRU(32, out_channels=9)


@pytest.mark.parametrize(
    ("theirs", "dims", "size"),
    [(wild_ranks.ScConv3d(32, 4), 3, (4, 5, 6)), (wild_ranks.ScConv1d(32, 4), 1, (40,))],
)
def test_state_dicts_of_volumes_and_signals_load_unchanged_and_compute_the_same(theirs, dims, size):
    theirs = wild.randomize(theirs)
    ours = ScConv(32, 4, dims=dims).eval()
    named = {key.replace(".weight", ".gamma").replace(".bias", ".beta") if ".gn." in key else key: value.shape
             for key, value in theirs.state_dict().items()}  # fmt: skip
    assert {key: value.shape for key, value in ours.state_dict().items()} == named
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 32, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), **SAME_ARITHMETIC)


@pytest.mark.parametrize("dims", [1, 3])
def test_pairwise_fusion_of_volumes_and_signals(dims):
    module, x = CRU(8, dims=dims, fusion="pairwise").eval(), torch.randn(2, 8, *[4] * dims)
    up, low = (conv(part) for conv, part in zip((module.squeeze1, module.squeeze2), x.split(4, 1), strict=True))
    y1, y2 = module.GWC(up) + module.PWC1(up), torch.cat([module.PWC2(low), low], 1)
    s1, s2 = (y.mean(list(range(2, dims + 2)), keepdim=True).exp() for y in (y1, y2))
    torch.testing.assert_close(module(x), (s1 * y1 + s2 * y2) / (s1 + s2))


def test_another_number_of_axes_is_refused():
    with pytest.raises(ConfigurationError, match=r"SRU: dims is 4, expected 1, 2 or 3\. Use 1 for signals"):
        SRU(32, dims=4)
    with pytest.raises(ConfigurationError, match="CRU: dims is 0"):
        CRU(32, dims=0)
    with pytest.raises(ConfigurationError, match=r"SRU: the input \[2, 32, 8, 8\] has 4 axes, expected 5") as caught:
        ScConv(32, dims=3)(example())
    assert caught.value.remedy == "Build it with dims=2."
    with pytest.raises(ConfigurationError, match=r"GroupBatchnorm2d: the input .* has 3 axes, expected 4"):
        GroupBatchnorm2d(32)(example()[0])
