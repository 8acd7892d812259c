"""What only a GPU shows: streams, graphs, threads, torch.compile.

The kernels' numbers are in test_kernels.py and the plugin's in test_harness.py, both on a GPU too.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.trt_plugins.library import FusedSRU, SruSettings
from tests.trt_plugins.test_kernels import ON_A_GPU, PATHS, draw, judge

pytestmark = ON_A_GPU


@pytest.fixture
def library(gpu_library):
    return gpu_library


@pytest.mark.parametrize("algorithm", PATHS)
def test_equal_inputs_give_equal_bytes_on_any_stream_and_in_a_graph(library, algorithm):
    variant = replace(VARIANTS["groupnorm-soft"], num_groups=8)
    x, gamma, beta = draw((4, 64, 28, 28))
    x = x.half().cuda()
    inputs = [p.cuda() for p in Gate(variant, gamma, beta).operator_inputs().values()]
    settings = SruSettings.of(variant, algorithm)
    first = library.sru(x, inputs, settings)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = library.sru(x, inputs, settings)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        third = library.sru(x, inputs, settings)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_the_operator_and_the_module_run_it(library):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x, gamma, beta = draw((2, 16, 20, 20))
    fused = FusedSRU(Gate(variant, gamma, beta)).cuda()
    y = fused(x.cuda())
    judge(y, x, gamma, beta, variant)
    pytest.importorskip("triton", reason="torch.compile needs triton on a GPU")
    assert torch.equal(torch.compile(fused, fullgraph=True)(x.cuda()), y)


def test_calls_of_several_threads_do_not_disturb_each_other(library):
    """Pairs of other sizes on the same kernels at the same time: each needs another amount of shared memory."""
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    cases = []
    for size in (4, 12, 20, 28, 36, 44, 52, 60):
        x, gamma, beta = draw((2, 16, size, size), seed=size)
        cases.append((x.cuda(), [p.cuda() for p in Gate(variant, gamma, beta).operator_inputs().values()]))
    settings = SruSettings.of(variant, "on_chip")
    expected = [library.sru(x, inputs, settings) for x, inputs in cases]

    def work(i: int) -> bool:
        x, inputs = cases[i % len(cases)]
        with torch.cuda.stream(torch.cuda.Stream()):
            y = library.sru(x, inputs, settings)
            torch.cuda.current_stream().synchronize()
            return torch.equal(y, expected[i % len(cases)])

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(400)))
