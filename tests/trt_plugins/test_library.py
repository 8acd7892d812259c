"""The PyTorch operator: on the CPU against the variants, its fake against its shapes, and what it refuses."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from scconv_deploy.errors import ConfigurationError, IntegrityError, MissingRuntimeError
from scconv_deploy.gate.flips import compare_outputs, relative_l2
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.recognize import recognize
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.trt_plugins import library
from scconv_deploy.trt_plugins.build import SOURCES
from scconv_deploy.trt_plugins.library import FusedSRU, SruLibrary, SruParams, SruSettings, sru, sru_params
from tests.conftest import tiny_net
from tests.exporters.tensorrt.engines import elf_library

SHAPE = (2, 16, 9, 7)
HARD = replace(VARIANTS["groupbn-hard"], num_groups=4)


def draw(shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gamma, beta = (torch.randn(shape[1], generator=generator) for _ in range(2))
    return torch.randn(shape, generator=generator), gamma, beta


def arguments(gamma, beta, variant):
    inputs = list(Gate(variant, gamma, beta).operator_inputs().values())
    return inputs, variant.operator, variant.num_groups, variant.ddof, variant.eps_var, variant.eps_std


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", [SHAPE, (1, 24, 4, 4)])
def test_on_the_cpu_it_is_the_variant(name, shape):
    variant = replace(VARIANTS[name], num_groups=4 if shape[1] == 16 else 8)
    x, gamma, beta = draw(shape)
    y = sru(x, *arguments(gamma, beta, variant))
    gate = Gate(variant, gamma, beta)
    count, distance = compare_outputs(y, gate.apply(x), x, gate)
    assert count.unexplained == 0
    assert distance < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("name", VARIANTS)
def test_statistics_and_gates_are_fp32_whatever_the_data_are(name, dtype, tolerance):
    variant = replace(VARIANTS[name], num_groups=4)
    x, gamma, beta = draw()
    x = x.to(dtype)
    y = sru(x, *arguments(gamma, beta, variant))
    expected = Gate(variant, gamma, beta).apply(x.float())
    assert y.dtype == dtype
    # a flipped gate would be an error of the order of 1 in one of 2,016 elements
    assert float((y.float() - expected).norm() / expected.norm()) < tolerance


def test_it_is_an_operator_with_a_fake_that_compiles():
    x, gamma, beta = draw()
    torch.library.opcheck(sru, (x, *arguments(gamma, beta, HARD)), test_utils=("test_schema", "test_faketensor"))
    fused = FusedSRU(Gate(HARD, gamma, beta))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), fused(x))
    assert torch.equal(fused(x), Gate(HARD, gamma, beta).apply(x))


def test_a_modules_parameters_stay_fp32():
    _, gamma, beta = draw()
    fused = FusedSRU(Gate(HARD, gamma, beta))
    cut = fused.cut.clone()
    assert torch.equal(fused.half().cut, cut)
    assert fused.double().cut.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(16, 9, 7)}, "expected \\[N, C, H, W\\]"),
        ({"x": torch.zeros(SHAPE, dtype=torch.float64)}, "float32, float16 or bfloat16"),
        ({"operator": "SRUHard"}, "unknown"),
        ({"operator": "SRUNorm"}, "expected 4 times"),
        ({"parameters": [torch.zeros(16), torch.zeros(15)]}, "expected 2 times \\(16,\\)"),
        ({"parameters": [torch.zeros(16), torch.zeros(16).half()]}, r"are torch\.float16, torch\.float32, expected"),
        ({"x": torch.zeros(SHAPE).half(), "parameters": [torch.zeros(16).half()] * 2}, "another cut.*float32 gamma"),
        ({"num_groups": 5}, "not a multiple"),
        ({"num_groups": 17}, "fewer than"),
    ],
)
def test_what_it_refuses(change, reason):
    call = {"x": torch.zeros(SHAPE), "parameters": [torch.zeros(16), torch.ones(16)], "operator": "SRU",
            "num_groups": 4, "ddof": 1, "eps_var": 0.0, "eps_std": 1e-10} | change  # fmt: skip
    with pytest.raises(ConfigurationError, match=reason):
        sru(*call.values())


def test_an_empty_batch_gives_an_empty_batch():
    for dtype in (torch.float32, torch.bfloat16):
        y = sru(torch.zeros(0, 16, 9, 7, dtype=dtype), [torch.zeros(16)] * 2, "SRU", 4, 1, 0.0, 1e-10)
        assert (y.shape, y.dtype) == ((0, 16, 9, 7), dtype)


LAST = torch.channels_last


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [SHAPE, (1, 24, 4, 4)])  # 16 groups of 24 channels straddle them
def test_channels_last_goes_in_and_comes_out(name, dtype, shape):
    x, gamma, beta = draw(shape)
    x, each = x.to(dtype), arguments(gamma, beta, replace(VARIANTS[name], num_groups=16))
    last = x.contiguous(memory_format=LAST)
    y = sru(last, *each)
    assert y.stride() == last.stride()
    assert torch.equal(y, sru(x, *each))
    assert sru(x, *each).is_contiguous()
    torch.library.opcheck(sru, (last, *each), test_utils=("test_schema", "test_faketensor"))


def test_a_layout_of_neither_kind_comes_out_contiguous():
    x, gamma, beta = draw()
    each = arguments(gamma, beta, HARD)
    for other in (x.transpose(2, 3), x[:, :, ::2], x.contiguous(memory_format=LAST)[:, :, 1:]):
        y = sru(other, *each)
        assert y.is_contiguous()
        assert torch.equal(y, sru(other.contiguous(), *each))
        torch.library.opcheck(sru, (other, *each), test_utils=("test_faketensor",))


def test_a_single_pixel_and_a_single_channel_are_contiguous():
    """Both layouts are the same memory there."""
    for shape in ((2, 16, 1, 1), (2, 1, 4, 4)):
        assert library.memory_format(torch.zeros(shape).contiguous(memory_format=LAST)) is torch.contiguous_format


def test_the_module_keeps_channels_last_and_compiles():
    x, gamma, beta = draw()
    fused, last = FusedSRU(Gate(HARD, gamma, beta)), x.contiguous(memory_format=LAST)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert compiled(last).stride() == fused(last).stride() == last.stride()
    assert torch.equal(compiled(last), fused(x))


@pytest.mark.parametrize("layout", library.LAYOUTS)
def test_the_kernels_get_x_itself_or_a_copy_that_is_aligned(layout):
    room = torch.arange(2016.0 + 4)
    for start in (0, 1, 2, 4):
        x = room[start : start + 2016].view(2, 9, 7, 16).permute(0, 3, 1, 2)
        x = x if layout is LAST else room[start : start + 2016].view(SHAPE)
        found = library.kernel_input(x, layout)
        assert torch.equal(found, x)
        assert found.stride() == x.stride()
        assert (found.data_ptr() == x.data_ptr()) is (start % 4 == 0)
        assert found.data_ptr() % 16 == 0
    other = library.LAYOUTS[1 - library.LAYOUTS.index(layout)]
    assert library.kernel_input(x, other).is_contiguous(memory_format=other)


def test_settings_are_those_of_the_variant():
    variant = replace(VARIANTS["groupnorm-soft"], num_groups=8)
    assert SruSettings.of(variant, "split") == SruSettings("SRUSoft", 8, 0, variant.eps_var, 0.0, "split")
    params = [torch.zeros(16)] * 2
    with pytest.raises(ConfigurationError, match="algorithm 'fast' is unknown"):
        sru_params(torch.zeros(SHAPE), params, SruSettings("SRU", 4, 1, 0.0, 1e-10, "fast"))


def test_odd_channels_are_refused():
    with pytest.raises(ConfigurationError, match="halves"):
        sru(torch.zeros(1, 15, 4, 4), [torch.zeros(15)] * 2, "SRU", 15, 1, 0.0, 1e-10)


def test_the_struct_carries_what_it_is_given():
    x, gamma, beta = draw()
    inputs, *rest = arguments(gamma, beta, replace(VARIANTS["groupnorm-soft"], num_groups=8))
    params = sru_params(x.half(), inputs, SruSettings(*rest, algorithm="split"))
    header = (SOURCES / "kernel" / "sru.h").read_text()
    struct = header[header.index("typedef struct") : header.index("} ScconvSruParams")]
    declared = re.findall(r"^    (const \w+\*|void\*|\w+) (\w+);", struct, re.MULTILINE)
    c_types = {**dict.fromkeys(("const void*", "const float*", "void*"), ctypes.c_void_p), "float": ctypes.c_float,
               "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64}  # fmt: skip
    assert [(name, c_types[kind]) for kind, name in declared] == list(SruParams._fields_)
    assert ctypes.sizeof(SruParams) == 120  # a static_assert in sru.cpp
    assert (params.batch, params.channels, params.pixels, params.num_groups) == (2, 16, 63, 8)
    assert (params.op, params.type, params.layout, params.algorithm) == (2, 1, 0, 2)
    last = x.half().contiguous(memory_format=LAST)
    params = sru_params(last, inputs, SruSettings(*rest))
    assert (params.x, params.layout, params.algorithm, params.pixels) == (last.data_ptr(), 1, 0, 63)
    assert (params.ddof, params.eps_std) == (0, 0.0)
    assert params.eps_var == pytest.approx(1e-5)
    assert params.second == inputs[3].data_ptr()


def test_without_a_library_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingRuntimeError, match="plugin build"):
        library.load()
    other = tmp_path / "other.so"
    other.write_bytes(b"no library")
    with pytest.raises(IntegrityError, match="no 64-bit Linux shared library"):
        SruLibrary(other)
    with pytest.raises(IntegrityError, match=r"gone\.so is no library of the fused SRU"):
        SruLibrary(tmp_path / "gone.so")
    other.write_bytes(elf_library())
    with pytest.raises(IntegrityError, match=r"other\.so is no library of the fused SRU"):
        SruLibrary(other)


def test_a_truncated_library_is_refused_before_the_loader_maps_it(tmp_path):
    """dlopen of it ends the process with SIGBUS, so this is asked of another one."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    (tmp_path / "big.cpp").write_text("char data[1 << 20] = {1};\n")
    whole, cut = tmp_path / "big.so", tmp_path / "cut.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "big.cpp"), "-o", str(whole)], check=True)
    cut.write_bytes(whole.read_bytes()[: 1 << 19])
    load = "from pathlib import Path; from scconv_deploy.trt_plugins import library; library.load(Path({!r}))"
    done = subprocess.run([sys.executable, "-c", load.format(str(cut))], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"IntegrityError: {cut} is damaged" in done.stderr
    with pytest.raises(IntegrityError, match="no library of the fused SRU"):
        SruLibrary(whole)  # it can be loaded, and is another library


def test_a_models_srus_are_fused_where_they_are_recognised():
    model = tiny_net()
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    fused = library.fuse(model, recognize(model, (image,), {}))
    assert sum(isinstance(module, FusedSRU) for module in fused.modules()) == 3
    assert not any(isinstance(module, FusedSRU) for module in model.modules())
    with torch.inference_mode():
        y, expected = fused(image), model(image)
    for name, value in expected.items():
        assert relative_l2(y[name], value) < 1e-6
