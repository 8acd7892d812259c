"""Shapes that hypotheses are tried on."""

from __future__ import annotations

import math

import pytest

from scconv_deploy.gate.hypotheses import crowd, other_shape


@pytest.mark.parametrize(
    ("own", "num_groups", "other"),
    [
        ((1, 64, 56, 56), 16, (2, 64, 8, 8)),
        ((1, 64, 8, 8), 16, (2, 64, 12, 6)),
        ((1, 256, 14, 14), 16, (2, 256, 4, 4)),  # 2x256x8x8 has more gates than are needed
        ((1, 512, 4, 4), 16, (2, 512, 12, 6)),  # all others have more
        ((1, 24, 20, 20), 18, (2, 24, 12, 6)),  # 24x8x8 has no 18 equal groups
        ((1, 8, 5, 5), 7, None),
        ((1, 64), 16, None),
        ((1, 256, 40), 16, (2, 256, 72)),
    ],
)
def test_a_module_is_tried_on_another_height_and_width(own, num_groups, other):
    assert other_shape(own, num_groups) == other


def test_a_batch_is_enlarged_until_there_are_enough_gates():
    assert crowd((1, 8, 4, 4)) == (128, 8, 4, 4)
    assert crowd((2, 8, 1, 1)) == (2048, 8, 1, 1)
    assert crowd((2, 512, 8, 8)) == (2, 512, 8, 8)
    assert math.prod(crowd((1, 24, 7, 7))) >= 2**14
