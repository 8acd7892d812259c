"""``torch.ops.scconv.sru`` on the CPU with the library: its kernels run, in every layout and compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scconv_deploy.gate.flips import compare_outputs
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.recognize import recognize
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.trt_plugins import library
from scconv_deploy.trt_plugins.cpu.library import TYPES
from scconv_deploy.trt_plugins.library import FusedSRU, fuse, load_cpu, sru
from tests.conftest import tiny_net
from tests.trt_plugins.cpu.test_library import SHAPES, draw, run, variant_of


@pytest.fixture
def kernels(cpu_path, monkeypatch):
    """The operator with the library loaded for one test."""
    monkeypatch.setattr(library, "_loaded_cpu", [])
    return load_cpu(cpu_path)


def call(x, gate: Gate):
    v = gate.variant
    inputs = list(gate.operator_inputs().values())
    return sru(x, inputs, v.operator, v.num_groups, v.ddof, v.eps_var, v.eps_std)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("sizes", ["whole groups", "groups that straddle"])
def test_it_runs_the_librarys_kernels_in_either_layout(kernels, sizes, name, dtype):
    shape, groups = SHAPES[sizes]
    x, gamma, beta = draw(shape)
    x, gate = x.to(dtype), Gate(variant_of(name, shape, groups), gamma, beta)
    expected = run(kernels, x, gate)
    assert torch.equal(call(x, gate), expected)
    last = call(x.contiguous(memory_format=torch.channels_last), gate)
    assert torch.equal(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(call(x.transpose(2, 3).contiguous().transpose(2, 3), gate), expected)


def test_without_a_library_pytorch_computes_it(monkeypatch):
    monkeypatch.setattr(library, "_loaded_cpu", [])
    x, gamma, beta = draw((2, 16, 9, 7))
    gate = Gate(replace(VARIANTS["groupnorm-soft"], num_groups=4), gamma, beta)
    count, distance = compare_outputs(call(x, gate), gate.apply(x), x, gate)
    assert (count.unexplained, distance < 1e-6) == (0, True)


def test_the_library_of_the_cache_is_taken(cpu_library, monkeypatch):
    calls = []
    monkeypatch.setattr(library, "_loaded_cpu", [])
    monkeypatch.setattr(library, "cached_library", lambda: calls.append(1) or cpu_library)
    x, gamma, beta = draw((2, 16, 9, 7))
    gate = Gate(replace(VARIANTS["groupbn-hard"], num_groups=4), gamma, beta)
    assert torch.equal(call(x, gate), run(cpu_library, x, gate))
    assert calls


def test_it_compiles_whole(kernels):
    x, gamma, beta = draw((2, 16, 9, 7))
    fused = FusedSRU(Gate(replace(VARIANTS["groupbn-hard"], num_groups=4), gamma, beta))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), fused(x))
    torch.library.opcheck(sru, (x, [fused.cut, fused.sign], "SRU", 4, 1, 0.0, 1e-10), test_utils=("test_schema",))


def test_a_network_with_its_srus_fused(kernels):
    model = tiny_net()
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    fused = fuse(model, recognize(model, (image,), {}))
    assert sum(isinstance(module, FusedSRU) for module in fused.modules()) == 3
    with torch.inference_mode():
        for name, value in model(image).items():
            torch.testing.assert_close(fused(image)[name], value, rtol=1e-4, atol=1e-4)
