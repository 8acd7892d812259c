"""Whether a tensor is finite is read from its sum."""

import pytest
import torch

from scconv_deploy.model.replay import all_finite


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_entry_is_enough(odd, dtype):
    tensor = torch.randn(3, 40, 7, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(tensor)
    tensor[2, 39, 6, 6] = odd
    assert not all_finite(tensor)
    tensor[0, 0, 0, 0] = -odd  # infinities of both signs do not cancel
    assert not all_finite(tensor)


def test_a_sum_that_overflows_is_finite_all_the_same():
    assert all_finite(torch.full((2, 8), 3e38))
