"""Machine code of the CUDA kernels beside its committed table, and the reader of listings by itself."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from benchmarks.sass import disassemble, passes_of, read_listing
from benchmarks.sru_sass import committed, facts, faults, measure, name_of, vector_of
from scconv_deploy.system.machine import CUDA_WHEELS, Machine, find_cuda_tool
from scconv_deploy.trt_plugins.build import SOURCES
from tests.trt_plugins.emulated import change_kernels


@pytest.fixture(scope="session")
def nvdisasm() -> str:
    found = find_cuda_tool("nvdisasm", Machine())
    if found is None:
        pytest.skip(f"nvdisasm was not found: {CUDA_WHEELS}")
    return found


# --- the kernels ---


OPERATOR = {"sru_half.cu": ("launch_operator<__half>(op, ", "launch_vector<__half, Operator::kSru>(")}
"""A third of the compiler's time. The other operators and types differ little, and the benchmark tells of them."""


@pytest.mark.nvcc
@pytest.mark.parametrize("architecture", [90, 89])
def test_no_kernel_spills_or_needs_more_instructions_than_the_table_says(nvcc, nvdisasm, architecture, tmp_path):
    """`python -m benchmarks sru_sass` writes the table."""
    shutil.copytree(SOURCES, tmp_path / "sources")
    change_kernels(tmp_path / "sources", OPERATOR)
    rows = [row for row in committed() if row["architecture"] == f"sm_{architecture}" and "<half" in row["kernel"]]
    known = [row for row in rows if "SRUNorm" not in row["kernel"] and "SRUSoft" not in row["kernel"]]
    assert known
    assert faults(measure(nvcc, nvdisasm, str(architecture), "half", tmp_path / "sources"), known) == []


ROW = {
    "architecture": "sm_90", "kernel": "fused_kernel<half, SRU, 8, 8>", "spill_bytes": 0, "local": 0, "LDG": 0,
    "STG": 8, "bulk_copies": 2, "vector_bytes": 16, "per_element": 15.0, "per_element_dearest": 16.0,
}  # fmt: skip
WRONG = {
    "a spill": ({"spill_bytes": 8}, "8 bytes spilled, 0 accesses of local memory"),
    "an array in local memory": ({"local": 2}, "0 bytes spilled, 2 accesses of local memory"),
    "narrow stores": ({"STG": 0}, "no 128-bit store"),
    "no bulk copy": ({"bulk_copies": 0, "LDG": 8}, "no bulk copy"),
    "more than the table": ({"per_element": 15.8}, "per_element 15.8, was 15.0"),
    "more where warps diverge": ({"per_element_dearest": 17.0}, "per_element_dearest 17.0, was 16.0"),
    "another kernel": ({"kernel": "new_kernel<half, SRU, 8, 8>"}, "not in the table"),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_a_worse_kernel_is_named(change, said):
    worse = ROW | change
    assert faults([ROW], [ROW]) == []
    assert faults([worse], [ROW])[0] == f"sm_90, {worse['kernel']}: {said}"


def test_the_aims_hold_whatever_the_table_says_and_narrow_loads_and_lost_kernels_are_named():
    far = ROW | {"per_element": 16.1}
    assert faults([far], [far]) == ["sm_90, fused_kernel<half, SRU, 8, 8>: 16.1 instructions an element, at most 16.0"]
    by_threads = ROW | {"architecture": "sm_89", "bulk_copies": 0, "LDG": 8, "per_element": 16.5}
    assert faults([by_threads], [by_threads]) == []
    narrow = ROW | {"architecture": "sm_89", "bulk_copies": 0}
    assert faults([narrow], [narrow]) == ["sm_89, fused_kernel<half, SRU, 8, 8>: no 128-bit load and no bulk copy"]
    assert faults([], [ROW]) == ["sm_90, fused_kernel<half, SRU, 8, 8>: in the table only"]


def test_names_of_kernels_are_read():
    symbol = "_ZN6scconv12fused_kernelI13__nv_bfloat16LNS_8OperatorE2ELi8ELi1ELb1EEEvNS_12KernelParamsE"
    assert (name_of(symbol), vector_of(symbol)) == ("fused_kernel<bfloat16, SRUSoft, 8, 1, true>", 8)
    assert name_of("_ZN6scconv12merge_kernelIfEEvNS_12KernelParamsE") == "merge_kernel<float>"
    assert name_of("_ZN6scconv12merge_kernelENS_12KernelParamsE") == "merge_kernel"


# --- small kernels, compiled ---

SMALL = r"""
namespace scconv {
template <typename T, int V> __global__ void wide_kernel(const float4* x, float4* y, int n)
{
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += 32)
    {
        float4 v = x[i];
        v.x = v.x * v.x + 1.0f; v.y = v.y * v.y + 1.0f; v.z = v.z * v.z + 1.0f; v.w = v.w * v.w + 1.0f;
        y[i] = v;
    }
}
template <typename T, int V> __global__ void narrow_kernel(const float* x, float* y, int n)
{
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += 32)
        y[i] = x[i] * x[i] + 1.0f;
}
template <typename T, int V> __global__ void local_kernel(const float4* x, float4* y, int n)
{
    float4 kept[16];
    for (int i = 0; i < 16; ++i)
        kept[i] = x[i];
    for (int i = 0; i < n; ++i)
        kept[(i * n) % 16] = x[i * n];
    y[threadIdx.x] = kept[threadIdx.x % 16];
}
template __global__ void wide_kernel<float, 4>(const float4*, float4*, int);
template __global__ void narrow_kernel<float, 4>(const float*, float*, int);
template __global__ void local_kernel<float, 4>(const float4*, float4*, int);
}
"""


@pytest.mark.nvcc
def test_narrow_accesses_and_local_memory_of_small_kernels_are_seen(nvcc, nvdisasm, tmp_path):
    (tmp_path / "small.cu").write_text(SMALL)
    cubin = tmp_path / "small.cubin"
    subprocess.run([nvcc, "-arch=sm_89", "-cubin", str(tmp_path / "small.cu"), "-o", str(cubin)], check=True)
    rows = {name_of(symbol): facts(one, symbol, 4) for symbol, one in disassemble(nvdisasm, cubin).items()}
    wide, narrow, local = (rows[f"{kind}_kernel<float, 4>"] for kind in ("wide", "narrow", "local"))
    assert (wide["LDG"], wide["STG"], wide["local"], wide["bulk_copies"]) == (1, 1, 0, 0)
    # a load, four multiply-adds, a store; the rest for addresses, the counter and the branch
    assert wide["steps"] == [wide["per_element"]]
    assert 6 / 4 < wide["per_element"] <= 20 / 4
    assert (narrow["LDG"], narrow["STG"], narrow["per_element"]) == (0, 0, 0)
    assert local["local"] > 0


# --- listings ---


def listing(*lines: str) -> str:
    """A function as nvdisasm lists it; lines that end in a colon are labels."""
    address, said = 0, [".text.f:"]
    for line in lines:
        said.append(line if line.endswith(":") else f"        /*{address:04x}*/                   {line} ;")
        address += 0 if line.endswith(":") else 16
    return "\n".join(said)


def steps(*lines: str, elements: int = 4) -> list[tuple[int, int, int, int]]:
    """(address, vectors, instructions at least, at most) of each step."""
    found = passes_of(read_listing(listing(*lines))["f"], 128, elements).steps
    return [(one.address, one.vectors(elements), one.fewest, one.most) for one in found]


LOAD, STORE = "LDG.E.128 R4, desc[UR6][R2.64]", "STG.E.128 desc[UR6][R8.64], R4"
BACK, END = "@P0 BRA `(.L_loop)", "EXIT"


def test_a_loop_counts_from_its_head_to_its_way_back():
    assert steps("MOV R1, R2", ".L_loop:", LOAD, "FADD R4, R4, R5", STORE, BACK, END) == [(16, 1, 4, 4)]


def test_a_ragged_tail_within_counts_apart():
    """Whole vectors go past the tail's narrow stores; what an element outside skips is not skipped."""
    found = steps(
        ".L_loop:", LOAD, "BSSY B0, `(.L_met)", "@P1 BRA `(.L_outside)", "FADD R4, R4, R5", "FSET.BF.GE R5, R4, R6",
        ".L_outside:", "BSYNC B0", "STG.E.U16 desc[UR6][R8.64], R4", ".L_met:", "@P2 BRA `(.L_ragged)", STORE,
        "BRA `(.L_next)", ".L_ragged:", "STG.E desc[UR6][R8.64], R4", "STG.E desc[UR6][R8.64+4], R5",
        "STG.E desc[UR6][R8.64+8], R6", ".L_next:", BACK, END,
    )  # fmt: skip
    assert found == [(0, 1, 10, 10)]  # BSYNC leads to .L_met, not to what follows it


def test_where_threads_take_several_ways_the_dearest_is_told_too():
    lookup = ["IMAD R1, R2, R3, R4"] * 20
    found = steps(".L_loop:", LOAD, "@P1 BRA `(.L_same)", *lookup, ".L_same:", STORE, BACK, END)
    assert found == [(0, 1, 4, 24)]


def test_the_slow_path_of_a_division_is_cold():
    slow = ["MOV R18, 0x1760", "CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath)"]
    fast = ["FFMA R1, R2, R3, R4"] * 5
    loop = [".L_loop:", LOAD, "@!P1 BRA `(.L_fast)", *slow, "BRA `(.L_done)", ".L_fast:", *fast, ".L_done:", STORE]
    assert steps(*loop, BACK, END) == [(0, 1, 9, 9)]


def test_a_call_of_a_label_is_a_branch():
    """As ptxas ends loops before sm_90; nothing returns from it."""
    found = steps(".L_loop:", LOAD, STORE, "@P1 CALL.REL.NOINC `(.L_end)", "BRA `(.L_loop)", ".L_end:", END)
    assert found == [(0, 1, 4, 4)]


def test_what_is_left_of_an_unrolled_loop_is_no_step_of_its_own_and_a_loop_behind_a_barrier_is():
    unrolled = [".L_loop:", LOAD, LOAD, STORE, STORE, BACK]
    left = [".L_left:", LOAD, STORE, "@P1 BRA `(.L_left)"]
    assert steps(*unrolled, *left, END) == [(0, 2, 5, 5)]
    assert steps(*unrolled, "BAR.SYNC.DEFER_BLOCKING 0x0", *left, END) == [(0, 2, 5, 5), (96, 1, 3, 3)]


def test_statistics_count_the_vectors_that_they_add_up_and_moments_do_not_count():
    """Sums about a known mean, of vectors that are read twice, and of four moments in 128 bits."""
    read = ["LDS.128 R4, [R2]", "LDS.128 R8, [R3]"]
    for additions, vectors in ((16, 2), (12, 1), (8, 0)):
        found = steps(".L_loop:", *read, *["FADD R0, R0, R4"] * additions, BACK, END)
        assert found == ([(0, vectors, 3 + additions, 3 + additions)] if vectors else [])


def test_code_without_a_loop_is_one_pass_and_a_switch_goes_everywhere():
    assert steps("@P0 EXIT", LOAD, "FADD R4, R4, R5", STORE, END) == [(0, 1, 5, 5)]
    found = steps('BRX R2 -0x60 (*"BRANCH_TARGETS .L_a,.L_b"*)', ".L_a:", "EXIT", ".L_b:", LOAD, STORE, END)
    assert found == [(0, 1, 4, 4)]


def test_a_loop_around_a_loop_over_vectors_is_no_step():
    inner = [".L_loop:", LOAD, STORE, BACK]
    assert steps(".L_outer:", "IADD3 R1, R1, 1, RZ", *inner, "@P1 BRA `(.L_outer)", END) == [(16, 1, 3, 3)]


def test_the_ragged_end_of_a_step_is_no_step_of_its_own():
    """A piece of four vectors, or what is left of them one by one. Sums of what a loop has copied are another step."""
    left = ["@P1 BRA `(.L_left)", *[LOAD, STORE] * 4, "BRA `(.L_next)", ".L_left:", LOAD, STORE, "@P2 BRA `(.L_left)"]
    assert steps(".L_loop:", *left, ".L_next:", BACK, END) == [(0, 4, 11, 11)]
    sums = [".L_sums:", "LDS.128 R4, [R2]", *["FADD R0, R0, R4"] * 8, "@P2 BRA `(.L_sums)"]
    found = steps(".L_loop:", LOAD, "STS.128 [R2], R4", *sums, BACK, END)
    assert found == [(0, 1, 3, 3), (32, 1, 10, 10)]


def test_what_waits_for_a_copy_passes_once():
    wait = [".L_wait:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R41+URZ], R36", "@!P0 BRA `(.L_wait)"]
    assert steps(".L_loop:", *wait, LOAD, STORE, BACK, END) == [(0, 1, 5, 5)]
