"""The kernels against PyTorch: emulated on the CPU everywhere, and on a GPU where there is one. The tests are the same.

Nothing here has a second implementation to agree with by accident: the reference is gate/variant.py in fp32 on the CPU.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from scconv_deploy.errors import ConfigurationError
from scconv_deploy.gate.flips import compare_outputs
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.trt_plugins.library import ALGORITHMS, LAYOUTS, SruLibrary, SruSettings, sru_params
from tests.trt_plugins.emulated import HERE as EMULATION
from tests.trt_plugins.emulated import ONE_OPERATOR, EmulatedLibrary, compile_kernels, link
from tests.trt_plugins.reference import H200, L4

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")]
BACKENDS = ["emulated", pytest.param("gpu", marks=ON_A_GPU)]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative L2: data are rounded once to their type, half a unit of which is 2^-24, 2^-11 and 2^-8."""
SMALL = [(2, 16, 14, 14), (2, 64, 7, 7), (2, 24, 5, 7), (1, 16, 1, 1)]
LARGE = [(2, 64, 56, 56), (3, 128, 14, 14), (2, 512, 7, 7), (1, 256, 56, 56)]
PATHS = ("on_chip", "split")
LINEAR, CHANNELS_LAST = LAYOUTS
DEVICES = {
    "clusters": H200,
    "few multiprocessors": (2, H200[1], True),
    "little shared memory": (132, 20 << 10, True),
    "no clusters": L4,
}


@dataclass(frozen=True)
class Backend:
    """Where the kernels run, and how they are called: tensors of the device in and out."""

    library: SruLibrary
    device: str

    def __call__(self, x, gamma, beta, variant, algorithm="auto") -> Tensor:
        inputs = [p.to(self.device) for p in Gate(variant, gamma, beta).operator_inputs().values()]
        return self.library.sru(x.to(self.device), inputs, SruSettings.of(variant, algorithm))


@pytest.fixture
def backend(request) -> Backend:
    if request.param == "gpu":
        return Backend(request.getfixturevalue("gpu_library"), "cuda")
    return Backend(request.getfixturevalue("emulated"), "cpu")


def on_both(test: Callable) -> Callable:
    return pytest.mark.parametrize("backend", BACKENDS, indirect=True)(test)


def draw(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gamma, beta = (torch.randn(shape[1], generator=generator) for _ in range(2))
    return torch.randn(shape, generator=generator), gamma, beta


def judge(y, x, gamma, beta, variant):
    wide, gate = x.float().cpu(), Gate(variant, gamma, beta)
    count, distance = compare_outputs(y.cpu(), gate.apply(wide), wide, gate)
    assert y.dtype == x.dtype
    assert distance < TOLERANCE[x.dtype]
    assert count.unexplained == 0
    return count


def laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x in a layout; where its sizes make both layouts one, the strides still say which."""
    if layout is LINEAR:
        return x.contiguous()
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("backend", "shape"),
    [("emulated", shape) for shape in SMALL]
    + [pytest.param("gpu", shape, marks=ON_A_GPU) for shape in (*SMALL, *LARGE)],
    indirect=["backend"],
)
def test_every_operator_type_shape_layout_and_algorithm(backend, name, dtype, shape, algorithm, layout):
    variant = replace(VARIANTS[name], num_groups=4 if shape[2] == 1 else 8)
    x, gamma, beta = draw(shape)
    x = laid_out(x.to(dtype), layout)
    y = backend(x, gamma, beta, variant, algorithm)
    assert y.stride() == x.stride()
    # a value of a narrow type recurs: all of a channel's elements of one value flip together
    assert judge(y, x, gamma, beta, variant).flips <= (2 if dtype == torch.float32 else 16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["groupbn-hard", "groupbn-hard-normalized"])
@on_both
def test_the_references_bytes(backend, reference, name, dtype, algorithm, layout):
    """Every rounding is the same on both sides (but the sigmoid's), so that what is proved on the CPU holds there."""
    for shape in ((1, 16, 14, 14), (2, 32, 28, 28), (2, 24, 5, 7)):
        variant = replace(VARIANTS[name], num_groups=4)
        x, gamma, beta = draw(shape)
        x = laid_out(x.to(dtype) + 3, layout)
        expected, _ = reference.sru(x, Gate(variant, gamma, beta).operator_inputs(), variant, LAYOUTS.index(layout))
        assert torch.equal(backend(x, gamma, beta, variant, algorithm).cpu(), expected)


@pytest.mark.parametrize("pixels", range(1, 20))
@pytest.mark.parametrize("dtype", TOLERANCE)
@on_both
def test_every_tail_in_every_layout(backend, pixels, dtype):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    for channels, layout, algorithm in itertools.product((8, 12, 24, 64), LAYOUTS, PATHS):
        x, gamma, beta = draw((2, channels, 1, pixels), seed=pixels)
        x = laid_out(x.to(dtype), layout)
        judge(backend(x, gamma, beta, variant, algorithm), x, gamma, beta, variant)


@pytest.mark.parametrize(("channels", "groups"), [(24, 16), (12, 3), (10, 5), (16, 1), (2, 1), (2, 2)])
@on_both
def test_groups_that_straddle_channels_or_have_no_partner(backend, channels, groups):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=groups)
    x, gamma, beta = draw((3, channels, 14, 14))
    for layout in LAYOUTS if channels % groups == 0 else LAYOUTS[:1]:
        each = laid_out(x, layout)
        judge(backend(each, gamma, beta, variant), each, gamma, beta, variant)


@on_both
def test_parameters_lie_anywhere(backend):
    """Constants of an engine are packed: 16 bytes are read at once only where all are aligned."""
    variant = replace(VARIANTS["groupnorm-soft"], num_groups=4)
    x, gamma, beta = draw((1, 64, 5, 5))
    for layout in LAYOUTS:
        inputs = []
        for value in Gate(variant, gamma, beta).operator_inputs().values():
            room = torch.full((65,), torch.nan, device=backend.device)
            room[1:] = value
            inputs.append(room[1:])
        each = laid_out(x, layout).to(backend.device)
        judge(backend.library.sru(each, inputs, SruSettings.of(variant)), x, gamma, beta, variant)


@pytest.mark.parametrize("layout", LAYOUTS)
@on_both
def test_many_pieces_of_one_group(backend, layout):
    """More pieces than a warp has lanes: of 150,528 elements of one group."""
    variant = replace(VARIANTS["groupnorm-soft"], num_groups=2)
    x, gamma, beta = draw((1, 96, 56, 56))
    x = laid_out(x + 5, layout)
    judge(backend(x, gamma, beta, variant, "split"), x, gamma, beta, variant)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("algorithm", PATHS)
@on_both
def test_what_is_not_finite_stays_in_its_group(backend, algorithm, value):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x, gamma, beta = draw((2, 16, 8, 8))
    x[0, 0, 0, 0] = value
    expected = Gate(variant, gamma, beta).apply(x)
    assert expected.isnan().any()
    for layout in LAYOUTS:
        y = backend(laid_out(x, layout), gamma, beta, variant, algorithm).cpu()
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)


@on_both
def test_an_empty_batch_and_what_is_refused(backend):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    _, gamma, beta = draw((1, 16, 3, 3))
    for dtype in TOLERANCE:
        y = backend(torch.zeros(0, 16, 3, 3, dtype=dtype), gamma, beta, variant)
        assert (y.shape, y.dtype) == ((0, 16, 3, 3), dtype)
    with pytest.raises(ConfigurationError, match="not a multiple"):
        backend(torch.zeros(1, 16, 3, 3), gamma, beta, replace(variant, num_groups=5))


@on_both
def test_the_algorithm_that_runs_is_the_one_that_was_planned(backend, reference):
    limits = L4
    if backend.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        shared = properties.shared_memory_per_block_optin
        limits = (properties.multi_processor_count, shared, properties.major >= 9)
    else:
        set_device(backend.library, limits)
    seen = set()
    for shape in ((64, 256, 56, 56), (1, 256, 56, 56), (2, 512, 7, 7), (2, 24, 4, 4)):
        x = torch.empty(1, dtype=torch.float16, device=backend.device).expand(shape)
        inputs = [torch.zeros(shape[1], device=backend.device)] * 2
        params = sru_params(x, inputs, SruSettings("SRU", 16, 1, 0.0, 1e-10))
        planned = reference.plan(shape, 16, torch.float16, limits=limits).algorithm
        assert backend.library.chosen_algorithm(params) == ALGORITHMS[planned]
        seen.add(planned)
    assert len(seen) == 2


# --- what only the emulation can show ---


def set_device(emulated, limits, order=0):
    multiprocessors, shared_bytes, clusters = limits
    emulated.device(multiprocessors, shared_bytes, order, capability=90 if clusters else 89)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_path_gives_the_same_bytes(emulated, reference, dtype, layout):
    """One order of sums: whatever the algorithm, the device (and so the number of blocks in a cluster) and the order in
    which threads run. A value that was read before another thread wrote it would differ too."""
    paths = set()
    for name, shape in itertools.product(VARIANTS, [(1, 64, 30, 30), (2, 24, 5, 7), (1, 64, 7, 7)]):
        variant = replace(VARIANTS[name], num_groups=4)
        x, gamma, beta = draw(shape)
        x = laid_out(x.to(dtype) + 1, layout)
        inputs = Gate(variant, gamma, beta).operator_inputs()
        expected, _ = reference.sru(x, inputs, variant, LAYOUTS.index(layout))
        for (limits, order), algorithm in itertools.product(zip(DEVICES.values(), (0, 1, 2, 1), strict=True), PATHS):
            set_device(emulated, limits, order)
            plan = reference.plan(
                shape, 4, dtype, ALGORITHMS.index(algorithm), layout=LAYOUTS.index(layout), limits=limits
            )
            paths.add((plan.algorithm, plan.cluster))
            y = emulated.sru(x, list(inputs.values()), SruSettings.of(variant, algorithm))
            assert torch.equal(y, expected), (name, shape, limits, algorithm)
    assert len(paths) >= 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_sample_has_the_same_bytes_wherever_it_stands(emulated, dtype, layout):
    """39 elements a group: in the batch they begin at any place within a vector."""
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    for shape in ((5, 12, 1, 13), (5, 16, 12, 12)):
        x, gamma, beta = draw(shape)
        x = laid_out(x.to(dtype), layout)
        inputs = list(Gate(variant, gamma, beta).operator_inputs().values())
        for algorithm in PATHS:
            settings = SruSettings.of(variant, algorithm)
            together = emulated.sru(x, inputs, settings)
            for n in range(len(x)):
                assert torch.equal(
                    emulated.sru(laid_out(x[n : n + 1].clone(), layout), inputs, settings)[0], together[n]
                )


def test_shared_memory_is_permitted_once_and_wholly(emulated, tmp_path):
    """The attribute belongs to the kernel: were it what one call needs, a call beside it with a smaller pair would
    take from a larger one between its attribute and its launch."""
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    emulated = EmulatedLibrary(tmp_path, emulated.path)
    emulated.device(1, 160 << 10, capability=89)
    for size in (4, 48, 64, 48):  # 0.5, 74, 131 and 74 KB
        x, gamma, beta = draw((1, 16, size, size))
        inputs = list(Gate(variant, gamma, beta).operator_inputs().values())
        assert emulated.chosen(x, inputs, SruSettings.of(variant)) == ALGORITHMS.index("on_chip")
        judge(emulated.sru(x, inputs, SruSettings.of(variant)), x, gamma, beta, variant)
    assert emulated.permits() == (1, 160 << 10, 160 << 10)


def test_code_that_the_device_lacks_is_told_and_older_code_runs_without_clusters(emulated):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x, gamma, beta = draw((1, 16, 30, 30))
    inputs = list(Gate(variant, gamma, beta).operator_inputs().values())
    settings = SruSettings.of(variant)
    expected = emulated.sru(x, inputs, settings)
    emulated.device(compiled_for=75)
    assert torch.equal(emulated.sru(x, inputs, settings), expected)
    emulated.device(compiled_for=0)
    params = sru_params(x, inputs, settings)
    params.y = torch.empty_like(x).data_ptr()
    assert emulated.enqueue(params) == 209  # cudaErrorNoKernelImageForDevice
    assert emulated.choose(params) == 209


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_device_too_small_for_a_cluster_takes_two_passes(emulated, layout):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x, gamma, beta = draw((1, 64, 30, 30))
    x = laid_out(x, layout)
    inputs = list(Gate(variant, gamma, beta).operator_inputs().values())
    settings = SruSettings.of(variant)
    expected = emulated.sru(x, inputs, settings)
    emulated.device(widest_cluster=2)
    assert emulated.chosen(x, inputs, settings) == ALGORITHMS.index("on_chip")
    for _ in range(2):
        assert torch.equal(emulated.sru(x, inputs, settings), expected)


def test_null_and_misaligned_pointers_and_too_small_a_workspace_are_refused(emulated):
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x, gamma, beta = draw((1, 16, 8, 8))
    inputs = list(Gate(variant, gamma, beta).operator_inputs().values())
    params = sru_params(x, inputs, SruSettings.of(variant, "split"))
    y = torch.full_like(x, 7.0)
    assert emulated.enqueue(params) == 1  # cudaErrorInvalidValue: no y
    params.y = y.data_ptr()
    assert emulated.enqueue(params) == 1  # no workspace
    room = torch.empty(emulated.workspace_bytes(params), dtype=torch.uint8)
    params.workspace, params.workspace_bytes = room.data_ptr(), room.numel() - 1
    assert emulated.enqueue(params) == 1
    params.workspace_bytes = room.numel()
    params.y = y.data_ptr() + 4
    assert emulated.enqueue(params) == 1
    params.y, params.workspace = y.data_ptr(), room.data_ptr() + 4
    assert emulated.enqueue(params) == 1
    params.workspace = room.data_ptr()
    assert (y == 7).all()
    params.y = y.data_ptr()
    assert emulated.enqueue(params) == 0
    judge(y, x, gamma, beta, variant)


def test_the_sanitizers_find_nothing(memory_sanitizers, tmp_path):
    """Kernels and reference under the address and the undefined-behaviour sanitizer (what stands for compute-sanitizer
    where no GPU is): memory outside x, y, workspace and shared memory, misaligned vectors, overflow."""
    flags, sweep = ("-O0", *memory_sanitizers), EMULATION / "sweep.cpp"
    objects = compile_kernels(tmp_path / "objects", *flags, sources=[sweep], changes=ONE_OPERATOR)
    program = link(objects, tmp_path / "sweep", *memory_sanitizers)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "64 of 64\n"), done.stderr
