"""Which kernel runs, and how it is launched."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.trt_plugins.reference import CHANNELS_LAST, H200, L4, LINEAR, ON_CHIP, SPLIT

RESNET50 = [(256, 56), (512, 28), (1024, 14), (2048, 7), (64, 56), (128, 28), (256, 14), (512, 7)]
SLICE = 52 << 10
"""Bytes of shared memory: four blocks a multiprocessor of an H200."""


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("layout", [LINEAR, CHANNELS_LAST])
@pytest.mark.parametrize(("channels", "size"), RESNET50)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_papers_shapes_stay_on_chip_where_there_are_clusters(reference, channels, size, dtype, layout, batch):
    plan = reference.plan((batch, channels, size, size), 16, dtype, layout=layout)
    assert plan.algorithm == ON_CHIP
    assert 1 <= plan.cluster <= 8
    assert plan.blocks % plan.cluster == 0
    assert (plan.cluster - 1) * plan.pieces_per_block < plan.pieces <= plan.cluster * plan.pieces_per_block
    assert plan.shared_bytes <= H200[1]
    if layout == LINEAR:
        data = 2 * plan.pieces_per_block * 128 * 16
        assert data < plan.shared_bytes < data + (9 << 10)
        assert plan.blocks == batch * 8 * plan.cluster
        enough = plan.shared_bytes <= SLICE and plan.blocks >= 2 * H200[0]
        assert enough or plan.cluster == min(8, plan.pieces) or plan.pieces_per_block == -(-plan.pieces // 8)


def test_what_does_not_fit_is_split(reference):
    shape = (64, 256, 56, 56)
    assert reference.plan(shape, 16, torch.float16, limits=L4).algorithm == SPLIT  # 200,704 bytes a pair
    assert reference.plan((64, 256, 120, 120), 16, torch.float32).algorithm == SPLIT  # 230,400 a block of eight
    exactly = reference.plan(shape, 32, torch.float16, limits=(58, 1 << 20, False)).shared_bytes
    assert reference.plan(shape, 32, torch.float16, limits=(58, exactly, False)).algorithm == ON_CHIP
    assert reference.plan(shape, 32, torch.float16, limits=(58, exactly - 1, False)).algorithm == SPLIT


def test_without_clusters_a_single_sample_is_split_where_few_multiprocessors_would_work(reference):
    ampere = (108, 163 << 10, False)
    assert reference.plan((1, 256, 56, 40), 16, torch.float16, limits=ampere).algorithm == SPLIT
    assert reference.plan((1, 256, 56, 40), 16, torch.float16, ON_CHIP, limits=ampere).algorithm == ON_CHIP
    assert reference.plan((1, 512, 7, 7), 16, torch.float16, limits=ampere).algorithm == ON_CHIP


@pytest.mark.parametrize(("channels", "groups"), [(24, 16), (12, 3), (16, 1)])
def test_groups_without_a_partner_are_split_and_channels_last_needs_none(reference, channels, groups):
    for wanted in (ON_CHIP, SPLIT):
        assert reference.plan((2, channels, 4, 4), groups, algorithm=wanted).algorithm == SPLIT
    if channels % groups == 0:
        assert reference.plan((2, channels, 4, 4), groups, layout=CHANNELS_LAST).algorithm == ON_CHIP


@pytest.mark.parametrize(
    ("channels", "size", "dtype", "layout", "vector", "run"),
    [
        (64, 56, torch.float16, LINEAR, 8, 8),
        (64, 14, torch.float16, LINEAR, 8, 1),  # 196 elements a channel: vectors cross from one to the next
        (64, 7, torch.float16, LINEAR, 4, 1),  # 196 a group, 4 * 49
        (128, 7, torch.float16, LINEAR, 8, 1),
        (64, 7, torch.float32, LINEAR, 4, 1),
        (16, 7, torch.float32, LINEAR, 1, 1),  # 49 a group
        (64, 1, torch.float16, LINEAR, 1, 1),  # no vector lies in two channels at most
        (256, 14, torch.float16, CHANNELS_LAST, 8, 8),
        (64, 14, torch.float16, CHANNELS_LAST, 8, 1),  # groups of 4 channels
        (64, 14, torch.float32, CHANNELS_LAST, 4, 4),
        (48, 14, torch.float16, CHANNELS_LAST, 8, 1),
        (16 * 9, 14, torch.float16, CHANNELS_LAST, 8, 1),
        (16 * 3, 5, torch.float32, CHANNELS_LAST, 4, 1),
    ],
)
def test_vectors_are_as_wide_as_the_sizes_allow(reference, channels, size, dtype, layout, vector, run):
    plan = reference.plan((2, channels, size, size), 16, dtype, layout=layout)
    assert (plan.vector, plan.run) == (vector, run)


@pytest.mark.parametrize("layout", [LINEAR, CHANNELS_LAST])
def test_what_orders_the_sums_hangs_on_neither_batch_nor_algorithm_nor_device(reference, layout):
    for (channels, size), dtype in itertools.product(RESNET50, (torch.float16, torch.float32)):
        plans = [
            reference.plan((batch, channels, size, size), 16, dtype, algorithm, layout, limits)
            for batch in (1, 64)
            for algorithm in (ON_CHIP, SPLIT)
            for limits in (H200, L4)
        ]
        assert len({(plan.vector, plan.run, plan.pieces) for plan in plans}) == 1
        assert len({plan.algorithm for plan in plans}) == 2


def test_warps_have_as_many_pieces_each(reference):
    for channels, size in RESNET50:
        for dtype in (torch.float16, torch.float32):
            plan = reference.plan((64, channels, size, size), 16, dtype)
            warps = plan.threads // 32
            rounds = -(-plan.pieces_per_block // warps)
            assert plan.threads % 32 == 0
            assert warps * rounds - plan.pieces_per_block < rounds
    assert reference.plan((1, 16, 1, 2), 4).threads == 32


@pytest.mark.parametrize("layout", [LINEAR, CHANNELS_LAST])
def test_workspace_suffices_for_every_algorithm_and_for_smaller_sizes(reference, layout):
    for dtype in (torch.float32, torch.float16):
        largest = reference.workspace_bytes((8, 64, 112, 112), 16, dtype, layout)
        for batch, size in ((8, 112), (8, 111), (3, 56), (8, 16), (1, 7), (1, 1)):
            shape = (batch, 64, size, size)
            plan = reference.plan(shape, 16, dtype, SPLIT, layout)
            own = reference.workspace_bytes(shape, 16, dtype, layout)
            assert batch * 16 * (plan.pieces + 1) * 16 <= own <= largest
        assert largest < 0.07 * 8 * 64 * 112 * 112 * dtype.itemsize


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


def test_channels_last_wants_groups_of_whole_channels(reference):
    assert "does not divide" in reference.refusal((1, 24, 4, 4), 16, layout=CHANNELS_LAST)
    assert "more than 256 vectors" in reference.refusal((1, 4096, 4, 4), 1, layout=CHANNELS_LAST)
    assert reference.refusal((1, 2048, 4, 4), 1, layout=CHANNELS_LAST) is None


@pytest.mark.parametrize("pixels", [1, 4, 49, 4096])
def test_channels_last_needs_no_permission_for_its_sums(reference, pixels):
    """Whatever the pixels, which may be unknown when the layout is chosen."""
    half, single = torch.float16, torch.float32
    for channels, dtype, taken in ((512, half, True), (976, half, False), (976, single, True), (3728, single, False)):
        shape = (1, channels, 2, pixels)
        found = reference.refusal(shape, channels, layout=CHANNELS_LAST, dtype=dtype)
        assert found == (None if taken else "channels-last: too many groups")
        if taken:
            plan = reference.plan(shape, channels, dtype, SPLIT, CHANNELS_LAST)
            assert plan.shared_bytes <= 48 << 10


def test_others_are_not(reference):
    assert reference.refusal((0, 256, 56, 56), 16) is None  # nothing is to be done
    assert reference.refusal((1 << 20, 1 << 10, 32, 32), 4) is None
    assert reference.refusal((64, 256, 56, 56), 16) is None
