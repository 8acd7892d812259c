"""Instructions for int8 products, from /proc/cpuinfo of several machines."""

import pytest

from scconv_deploy.system.cpu import int8_instructions

MACHINES = {
    "flags\t\t: fpu sse2 avx avx2 fma": ("AVX2", True),
    "flags\t\t: fpu avx2 avx512f avx512_vnni": ("AVX2, AVX512-VNNI", False),
    "flags\t\t: fpu avx2 avx_vnni": ("AVX2, AVX-VNNI", False),
    "Features\t: fp asimd asimddp": ("NEON dotprod", False),
    "Features\t: fp asimd asimddp i8mm": ("NEON dotprod, NEON i8mm", False),
    "flags\t\t: fpu sse2": ("none for int8", False),
    "processor\t: 0": ("instructions not known", False),
}


@pytest.mark.parametrize("line", MACHINES)
def test_what_a_machine_has_and_whether_its_sums_saturate(tmp_path, line):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"model name : one\n{line}\n\n{line}\n")
    found = int8_instructions(tmp_path)
    assert (str(found), found.saturating) == MACHINES[line]


def test_a_system_without_the_file(tmp_path):
    assert not int8_instructions(tmp_path).known
