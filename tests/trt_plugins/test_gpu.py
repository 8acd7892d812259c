"""The kernels on a GPU: gates and values against PyTorch, memory around them, streams and graphs.

Nothing here has a second implementation to agree with by accident: the reference is gate/variant.py in fp32 on the CPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scconv_deploy.gate import VARIANTS, compare_outputs, gate_parameters
from scconv_deploy.gate.cut import operator_inputs
from scconv_deploy.gate.variant import sru as variant_sru
from scconv_deploy.trt_plugins.build import BuildRequest, build
from scconv_deploy.trt_plugins.library import ALGORITHMS, FusedSRU, load, sru_params

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative L2: data are rounded once to their type, half a unit of which is 2^-24, 2^-11 and 2^-8."""
SHAPES = [(2, 64, 56, 56), (3, 128, 14, 14), (2, 512, 7, 7), (1, 16, 1, 1), (2, 24, 5, 7), (1, 256, 56, 56)]


@pytest.fixture(scope="module")
def library(nvcc):
    return load(build(BuildRequest(kernels_only=True)).path)


def draw(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gamma, beta = (torch.randn(shape[1], generator=generator) for _ in range(2))
    return torch.randn(shape, generator=generator), gamma, beta


def call(library, x, gamma, beta, variant, algorithm="auto", parameter_type=torch.float32):
    inputs = [p.to(parameter_type).cuda() for p in operator_inputs(gamma, beta, variant).values()]
    rest = (variant.operator, variant.num_groups, variant.ddof, variant.eps_var, variant.eps_std, algorithm)
    return library.sru(x, inputs, *rest)


def judge(y, x, gamma, beta, variant):
    wide = x.float().cpu()
    expected = variant_sru(wide, gamma, beta, variant)
    parameters = gate_parameters(gamma, beta, variant)
    count, distance = compare_outputs(y.float().cpu(), expected, wide, gamma, beta, parameters, variant)
    assert distance < TOLERANCE[x.dtype]
    assert count.unexplained == 0
    return count


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_operator_type_shape_and_algorithm(library, name, dtype, shape, algorithm):
    variant = replace(VARIANTS[name], num_groups=4 if shape[2] == 1 else 8)
    if shape[1] // variant.num_groups * shape[2] * shape[3] < 2:
        pytest.fail("the case has no statistics")
    x, gamma, beta = draw(shape)
    x = x.to(dtype).cuda()
    y = call(library, x, gamma, beta, variant, algorithm)
    torch.cuda.synchronize()
    assert judge(y, x, gamma, beta, variant).flips <= 2


@pytest.mark.parametrize("pixels", range(1, 20))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_tail_at_any_alignment(library, pixels, dtype):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    for channels, offset in ((8, 0), (12, 1), (24, 3), (64, 8)):
        data, gamma, beta = draw((2, channels, 1, pixels), seed=pixels)
        room = torch.full((data.numel() + 64 + offset,), 7.0, dtype=dtype, device="cuda")
        x = room[offset : offset + data.numel()].view(data.shape)  # starts at any element of a vector
        x.copy_(data)
        for algorithm in ("on_chip", "split", "general"):
            y = call(library, x, gamma, beta, variant, algorithm)
            judge(y, x, gamma, beta, variant)
            assert (room[offset + data.numel() :] == 7).all()  # the harness watches what is around y


def test_groups_that_straddle_channels(library):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=16)
    x, gamma, beta = draw((3, 24, 14, 14))
    judge(call(library, x.cuda(), gamma, beta, variant), x, gamma, beta, variant)


def test_parameters_of_the_datas_type(library):
    """Cuts in fp16 are other cuts: they are held against a PyTorch that compares with the same rounded ones."""
    from scconv_deploy.trt_plugins.library import sru

    variant = replace(VARIANTS["groupnorm-soft"], num_groups=4)
    x, gamma, beta = draw((2, 32, 12, 12))
    x = x.half()
    inputs = [p.half() for p in operator_inputs(gamma, beta, variant).values()]
    rest = (variant.operator, variant.num_groups, variant.ddof, variant.eps_var, variant.eps_std)
    expected = sru(x, inputs, *rest)
    y = sru(x.cuda(), [p.cuda() for p in inputs], *rest)
    differs = (y.cpu().float() - expected.float()).abs() > 1e-2 * expected.float().abs() + 1e-3
    assert differs.float().mean() < 1e-3


def test_nan_stays_in_its_group(library):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x, gamma, beta = draw((2, 16, 8, 8))
    x[0, 0, 0, 0] = torch.nan
    for algorithm in ("on_chip", "split", "general"):
        y = call(library, x.cuda(), gamma, beta, variant, algorithm).cpu()
        expected = variant_sru(x, gamma, beta, variant)
        assert torch.equal(y.isnan(), expected.isnan())
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", ["on_chip", "split", "general"])
def test_equal_inputs_give_equal_bytes_on_any_stream_and_in_a_graph(library, algorithm):
    variant = replace(VARIANTS["groupnorm-soft"], num_groups=8)
    x, gamma, beta = draw((4, 64, 28, 28))
    x = x.half().cuda()
    inputs = [p.cuda() for p in operator_inputs(gamma, beta, variant).values()]
    rest = (variant.operator, variant.num_groups, variant.ddof, variant.eps_var, variant.eps_std, algorithm)
    first = library.sru(x, inputs, *rest)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = library.sru(x, inputs, *rest)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        third = library.sru(x, inputs, *rest)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_the_operator_and_the_module_run_it(library):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x, gamma, beta = draw((2, 16, 20, 20))
    fused = FusedSRU(gamma, beta, variant).cuda()
    y = fused(x.cuda())
    judge(y, x, gamma, beta, variant)
    assert torch.equal(torch.compile(fused, fullgraph=True)(x.cuda()), y)


def test_the_algorithm_that_runs_is_the_one_that_was_planned(library, reference):
    properties = torch.cuda.get_device_properties(0)
    limits = (properties.multi_processor_count, properties.shared_memory_per_block_optin)
    for shape in ((64, 256, 56, 56), (1, 256, 56, 56), (2, 512, 7, 7), (2, 24, 4, 4)):
        x = torch.zeros(shape, dtype=torch.float16, device="cuda")
        inputs = [torch.zeros(shape[1], device="cuda")] * 2
        params = sru_params(x, inputs, "SRU", 16, 1, 0.0, 1e-10)
        planned = reference.plan(shape, 16, torch.float16, limits=limits).algorithm
        params.y = x.data_ptr()
        assert library.chosen_algorithm(params) == ALGORITHMS[planned]


@pytest.mark.nvcc
@pytest.mark.parametrize("how", ["plain", "graph"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_plugin_computes_in_a_hosts_hands(harness, tmp_path, name, how):
    plugin = build(BuildRequest(tensorrt_include=harness.include)).path
    variant = replace(VARIANTS[name], num_groups=8)
    x, gamma, beta = draw((2, 64, 14, 14))
    for dtype, type_name in ((torch.float32, "float"), (torch.float16, "half"), (torch.bfloat16, "bfloat16")):
        for tactic in (0, 1, 2):
            folder = tmp_path / f"{type_name}{tactic}"
            folder.mkdir()
            data = x.to(dtype)
            (folder / "x.bin").write_bytes(data.view(torch.uint8).numpy().tobytes())
            for file, value in zip(("cut", "sign", "first", "second"), operator_inputs(gamma, beta, variant).values(),
                                   strict=False):  # fmt: skip
                (folder / f"{file}.bin").write_bytes(value.numpy().tobytes())
            done = harness.run("run", plugin, variant.operator, type_name, "float", *x.shape, variant.num_groups,
                               variant.ddof, variant.eps_var, variant.eps_std, tactic, how, folder)  # fmt: skip
            assert [line for line in done.stdout.splitlines() if not line.startswith("passed")] == []
            assert done.returncode == 0
            y = torch.frombuffer(bytearray((folder / "y.bin").read_bytes()), dtype=dtype).reshape(x.shape)
            judge(y, data, gamma, beta, variant)
