"""Merged weights of a CRU against PyTorch's convolutions in float64, and their names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scconv_deploy.graph import merged

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def drawn(*shape: int, seed: int) -> np.ndarray:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()


def convolved(x: Tensor, weight: np.ndarray, groups: int = 1) -> Tensor:
    conv = CONVOLUTIONS[x.ndim - 2]
    return conv(x, torch.from_numpy(weight).to(x.dtype), padding=weight.shape[-1] // 2, groups=groups)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "groups", "up", "low"), [(3, 2, 8, 8), (5, 4, 8, 4), (1, 1, 4, 8), (3, 8, 8, 16)])
def test_paths_are_both_paths(dims, kernel, groups, up, low):
    out, side = 16, [7] * dims
    gwc, pwc1 = drawn(out, up // groups, *[kernel] * dims, seed=1), drawn(out, up, *[1] * dims, seed=2)
    pwc2 = drawn(out - low, low, *[1] * dims, seed=3) if low < out else None
    u, lower = (torch.from_numpy(drawn(2, c, *side, seed=c + s)).double() for s, c in enumerate((up, low)))
    y1 = convolved(u, gwc, groups) + convolved(u, pwc1)
    y2 = lower if pwc2 is None else torch.cat([convolved(lower, pwc2), lower], 1)
    weight = merged.paths(gwc, pwc1, pwc2)
    made = convolved(torch.cat([u, lower], 1), weight, merged.groups_of(weight, up + low))
    assert weight.dtype == np.float32
    assert merged.groups_of(weight, up + low) == (2 if up == low else 1)
    assert relative(made[:, :out], y1) < 2.0**-24  # one sum of weights is rounded, once
    assert torch.equal(made[:, out:], y2) or relative(made[:, out:], y2) < 1e-15


@pytest.mark.parametrize(("shapes", "groups"), [(((4, 8), (4, 8)), 2), (((6, 12), (2, 4)), 1), (((4, 8), (2, 8)), 1)])
def test_squeezes_are_side_by_side(shapes, groups):
    weights = [drawn(*shape, 1, 1, seed=index) for index, shape in enumerate(shapes)]
    parts = [torch.from_numpy(drawn(2, w.shape[1], 5, 5, seed=9)).double() for w in weights]
    weight = merged.squeeze(*weights)
    x = torch.cat(parts, 1)
    assert merged.groups_of(weight, x.shape[1]) == groups
    expected = torch.cat([convolved(part, w) for part, w in zip(parts, weights, strict=True)], 1)
    assert relative(convolved(x, weight, groups), expected) < 1e-15


def test_the_centre_is_a_sum_in_float64_rounded_once():
    gwc = np.full((2, 1, 3, 3), 2.0**-24, np.float32)
    weight = merged.paths(gwc, np.ones((2, 1, 1, 1), np.float32), np.ones((1, 1, 1, 1), np.float32))
    assert weight[0, 0, 1, 1] == np.float32(1 + 2.0**-24)
    assert weight[0, 0, 0, 0] == np.float32(2.0**-24)


def test_the_bias_of_the_lower_path_is_zero():
    assert merged.bias(np.float32([1, 2])).tolist() == [1, 2, 0, 0]


def test_names_say_what_was_merged():
    name = merged.merged_name("paths", ["a.GWC.weight", "a.PWC1.weight"])
    assert name == "cru-paths(a.GWC.weight,a.PWC1.weight)"
    assert merged.parts_of(name) == merged.parts_of(f"{name}#2") == ("paths", ("a.GWC.weight", "a.PWC1.weight"))
    assert [merged.parts_of(other) for other in ("a.GWC.weight", "cru-other(a)", "cru-paths()", "paths(a)")] == [
        None
    ] * 4
