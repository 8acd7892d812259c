"""SRUs of volumes, signals and feature vectors: recognised by what they do, computed as ``[N, C, H, W]``."""

import pytest
import torch
from torch import nn

from scconv_deploy.gate.cut import open_by_cut
from scconv_deploy.gate.planes import as_planes, from_planes
from scconv_deploy.gate.recognize import recognize
from scconv_deploy.gate.swap import SwappedSRU, swap
from scconv_deploy.nn import SRU
from tests import wild, wild_ranks
from tests.tolerances import SAME_ARITHMETIC

VOLUME, SIGNAL = (4, 6, 5), (50,)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "planes"),
    [
        ((2, 6), (2, 6, 1, 1)),
        ((2, 6, 5), (2, 6, 1, 5)),
        ((2, 6, 3, 5), (2, 6, 3, 5)),
        ((2, 6, 4, 3, 5), (2, 6, 12, 5)),
        ((2, 6, 2, 4, 3, 5), (2, 6, 24, 5)),
    ],
)
def test_planes_hold_each_sample_in_its_order(shape, planes):
    x = noise(*shape)
    assert as_planes(x).shape == planes
    torch.testing.assert_close(as_planes(x).flatten(1), x.flatten(1), rtol=0, atol=0)
    torch.testing.assert_close(from_planes(as_planes(x), x), x, rtol=0, atol=0)
    last = x.transpose(1, -1).contiguous().transpose(1, -1)  # the channels behind, as a channels-last tensor has them
    torch.testing.assert_close(from_planes(as_planes(last), last), x, rtol=0, atol=0)


RECOGNISED = {
    "3-D": (wild_ranks.SRU3d(16, 4), (16, *VOLUME), "groupbn-hard", 4, "none"),
    "3-D, groups straddle channels": (wild_ranks.SRU3d(24, 16), (24, 4, 6, 8), "groupbn-hard", 16, "none"),
    "3-D, GroupNorm": (wild_ranks.SRU3d(16, 4, torch_gn=True), (16, *VOLUME), "groupnorm-hard-inclusive", 4, "none"),
    "3-D, normalized": (wild_ranks.NormalizedSRU(16, 3), (16, *VOLUME), "groupbn-hard-normalized", 4, "none"),
    "3-D, soft": (wild_ranks.SoftSRU(16), (16, *VOLUME), "groupnorm-soft", 4, "none"),
    "3-D, one slice": (wild_ranks.SRU3d(16, 4), (16, 1, 6, 5), "groupbn-hard", 4, "none"),
    "3-D, Conv3d before": (wild_ranks.ProjectingSRU(6, 16, 3), (6, *VOLUME), "groupbn-hard", 4, "before"),
    "3-D, Conv3d after": (wild_ranks.ProjectingSRU(16, 6, 3, after=True), (16, *VOLUME), "groupbn-hard", 4, "after"),
    "1-D": (wild_ranks.SRU1d(16, 4), (16, *SIGNAL), "groupbn-hard", 4, "none"),
    "1-D, a group for each channel": (wild_ranks.SRU1d(16, 16), (16, *SIGNAL), "groupbn-hard", 16, "none"),
    "1-D, groups straddle channels": (wild_ranks.SRU1d(24, 16), (24, 40), "groupbn-hard", 16, "none"),
    "1-D, normalized": (wild_ranks.NormalizedSRU(16, 1), (16, *SIGNAL), "groupbn-hard-normalized", 4, "none"),
    "1-D, soft": (wild_ranks.SoftSRU(16), (16, *SIGNAL), "groupnorm-soft", 4, "none"),
    "1-D, Conv1d before": (wild_ranks.ProjectingSRU(6, 16, 1), (6, *SIGNAL), "groupbn-hard", 4, "before"),
    "1-D, Conv1d after": (wild_ranks.ProjectingSRU(16, 6, 1, after=True), (16, *SIGNAL), "groupbn-hard", 4, "after"),
    "vectors": (wild_ranks.SoftSRU(32), (32,), "groupnorm-soft", 4, "none"),
    "four axes": (wild_ranks.NormalizedSRU(16, 4), (16, 2, 3, 2, 4), "groupbn-hard-normalized", 4, "none"),
    "3-D, two channels": (wild_ranks.SRU3d(2, 2), (2, *VOLUME), "groupbn-hard", 2, "none"),
    "1-D, few channels": (wild_ranks.SRU1d(8, 4), (8, *SIGNAL), "groupbn-hard", 4, "none"),
    "vectors of few channels": (wild_ranks.SoftSRU(8, 2), (8,), "groupnorm-soft", 2, "none"),
    "six axes": (wild_ranks.NormalizedSRU(8, 6), (8, 2, 1, 3, 2, 1, 2), "groupbn-hard-normalized", 4, "none"),
    "ours, 3-D": (SRU(16, 4, dims=3), (16, *VOLUME), "groupbn-hard", 4, "none"),
    "ours, 1-D, soft": (SRU(16, variant="groupnorm-soft", dims=1), (16, *SIGNAL), "groupnorm-soft", 4, "none"),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_variant_is_decided_by_behaviour_at_every_rank(name):
    module, size, variant, groups, place = RECOGNISED[name]
    model = nn.Sequential(wild.randomize(module))
    recognition = recognize(model, (noise(2, *size),), {})
    assert recognition.refused == ()
    (found,) = recognition.srus
    assert (found.gate.variant.name, found.gate.variant.num_groups, found.conv_place) == (variant, groups, place)
    x = noise(3, *size, seed=5) * 3 + 1
    swapped = swap(model, recognition)
    torch.testing.assert_close(swapped(x), model(x), **SAME_ARITHMETIC)

    seen = []
    (site,) = (m for m in swapped.modules() if isinstance(m, SwappedSRU))
    site.on_gate = lambda path, planes: seen.append(planes)
    swapped(x)
    (planes,) = seen
    assert planes.dim() == 4
    differs = open_by_cut(planes, found.gate.form) != found.gate.mask(planes)
    assert found.gate.count_flips(differs, planes).unexplained == 0


def test_formula_and_cut_take_any_rank():
    """The specification on ``[N, C, D, H, W]`` is that on its planes, to the bit."""
    x, sru = noise(2, 16, *VOLUME), wild.randomize(SRU(16, 4, dims=3))
    (found,) = recognize(nn.Sequential(sru), (x,), {}).srus
    gate = found.gate
    for of in (gate.mask, lambda t: open_by_cut(t, gate.form)):
        assert torch.equal(as_planes(of(x)), of(as_planes(x)))
    differs = torch.zeros(x.shape, dtype=torch.bool)
    differs[1, 3, 2] = True  # a slice of one channel: far from the threshold, so a fault
    by_rank = gate.count_flips(differs, x)
    assert by_rank == gate.count_flips(as_planes(differs), as_planes(x))
    assert (by_rank.flips, by_rank.channels) == (30, 1)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (wild_ranks.SlicewiseSRU3d(16, 4), "it is not an SRU"),
        (wild_ranks.DepthCrossedSRU3d(16, 4), "it is not an SRU"),
    ],
)
def test_look_alikes_of_volumes_are_left_alone(module, words):
    recognition = recognize(nn.Sequential(wild.randomize(module)), (noise(1, 16, *VOLUME),), {})
    assert recognition.srus == ()
    assert words in recognition.refused[0].reason


def test_a_vector_without_a_batch_is_none():
    model = nn.Sequential(wild.randomize(wild_ranks.SoftSRU(16)))
    model[0].forward = lambda x: x  # takes what GroupNorm does not
    recognition = recognize(model, (noise(16),), {})
    assert recognition.refused[0].reason == "its input [16] is not [N, C, *]"
