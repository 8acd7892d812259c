"""Which kernel runs, and how it is launched."""

from __future__ import annotations

import pytest
import torch

from tests.trt_plugins.reference import GENERAL, H200, ON_CHIP, SPLIT

RESNET50 = [(256, 56), (512, 28), (1024, 14), (2048, 7), (64, 56), (128, 28), (256, 14), (512, 7)]


@pytest.mark.parametrize(("channels", "size"), RESNET50)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_papers_shapes_stay_on_chip_in_16_bits(reference, channels, size, dtype):
    plan = reference.plan((64, channels, size, size), 16, dtype)
    pair_bytes = 2 * channels // 16 * size * size * 2
    assert plan.algorithm == ON_CHIP
    assert plan.blocks == 64 * 8
    assert pair_bytes <= plan.shared_bytes - 1024 <= pair_bytes + 2 * 16
    assert plan.shared_bytes <= H200[1]


def test_what_does_not_fit_is_split(reference):
    shape = (64, 256, 56, 56)
    assert reference.plan(shape, 16, torch.float32).algorithm == SPLIT  # 401,408 bytes a pair
    assert reference.plan(shape, 16, torch.float16, limits=(40, 99 << 10)).algorithm == SPLIT
    exactly = 2 * 256 // 32 * 56 * 56 * 2 + 1024
    assert reference.plan(shape, 32, torch.float16, limits=(40, exactly)).algorithm == ON_CHIP
    assert reference.plan(shape, 32, torch.float16, limits=(40, exactly - 1)).algorithm == SPLIT


def test_a_single_sample_is_split_where_few_multiprocessors_would_work(reference):
    assert reference.plan((1, 256, 56, 56), 16, torch.float16).algorithm == SPLIT
    assert reference.plan((1, 256, 56, 56), 16, torch.float16, algorithm=ON_CHIP).algorithm == ON_CHIP
    assert reference.plan((1, 512, 7, 7), 16, torch.float16).algorithm == ON_CHIP


@pytest.mark.parametrize(("channels", "groups"), [(24, 16), (12, 3), (16, 1)])
def test_groups_without_a_partner_take_the_general_path(reference, channels, groups):
    for wanted in (ON_CHIP, SPLIT, GENERAL):
        assert reference.plan((2, channels, 4, 4), groups, algorithm=wanted).algorithm == GENERAL


@pytest.mark.parametrize(
    ("size", "dtype", "alignment", "vector", "rows"),
    [
        (56, torch.float16, 16, 8, 1),
        (14, torch.float16, 16, 4, 1),  # 196 = 4 * 49: a vector of 8 bytes lies within a row
        (7, torch.float16, 16, 8, 0),
        (7, torch.float32, 16, 4, 0),
        (56, torch.float16, 8, 4, 1),
        (56, torch.float16, 2, 1, 1),
        (56, torch.float32, 4, 1, 1),
    ],
)
def test_vectors_are_as_wide_as_size_and_pointers_allow(reference, size, dtype, alignment, vector, rows):
    plan = reference.plan((2, 64, size, size), 16, dtype, alignment=alignment)
    assert (plan.vector, plan.rows) == (vector, rows)


def test_few_elements_get_few_threads(reference):
    assert reference.plan((1, 16, 1, 2), 4).threads == 32
    assert reference.plan((64, 256, 56, 56), 16, torch.float16).threads == 1024
    for channels, size in RESNET50:
        assert reference.plan((8, channels, size, size), 16).threads % 32 == 0


def test_workspace_suffices_for_every_algorithm_and_for_smaller_sizes(reference):
    largest = reference.workspace_bytes((8, 64, 112, 112), 16)
    for batch, size in ((8, 112), (8, 111), (3, 56), (1, 7), (1, 1)):
        shape = (batch, 64, size, size)
        for dtype in (torch.float32, torch.float16):
            for alignment in (16, 2 if dtype == torch.float16 else 4):
                plan = reference.plan(shape, 16, dtype, SPLIT, alignment)
                assert batch * 16 * (plan.pieces + 1) * 16 <= reference.workspace_bytes(shape, 16) <= largest
    assert largest < 0.01 * 8 * 64 * 112 * 112 * 4


@pytest.mark.parametrize(
    ("shape", "groups", "ddof", "reason"),
    [
        ((1, 5, 4, 4), 5, 1, "number is odd"),
        ((1, 4, 4, 4), 5, 1, "between 1 and"),
        ((1, 4, 4, 4), 0, 1, "between 1 and"),
        ((1, 6, 1, 1), 4, 1, "not a multiple"),
        ((1, 4, 1, 1), 4, 1, "one element"),
        ((-1, 4, 4, 4), 4, 1, "not positive"),
        ((1, 4, 0, 4), 4, 1, "not positive"),
        ((1 << 21, 1 << 10, 32, 32), 4, 1, "more than 2^40"),
        ((1, 4, 4, 4), 4, 2, "neither 0 nor 1"),
        ((1, 1 << 20, 64, 64), 4, 1, "more than 2^30"),
    ],
)
def test_sizes_that_have_no_answer_are_refused(reference, shape, groups, ddof, reason):
    assert reason in reference.refusal(shape, groups, ddof)


def test_others_are_not(reference):
    assert reference.refusal((0, 256, 56, 56), 16) is None  # nothing is to be done
    assert reference.refusal((1 << 20, 1 << 10, 32, 32), 4) is None
    assert reference.refusal((64, 256, 56, 56), 16) is None
