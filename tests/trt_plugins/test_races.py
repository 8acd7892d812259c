"""The kernels under ThreadSanitizer on the CPU: nothing is read or written that no barrier puts in order.

A barrier that is taken away is found by every size that needs it, in whichever order the threads ran.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trt_plugins.emulated import HERE, ONE_OPERATOR, RACES, compile_files, compile_kernels, copy_kernels, link

FLAGS = ("-O1", "-g1", *RACES)  # without optimisation, g++ does not look at structs that are handed over by value
FLOAT = "kernel/sru_float.cu"
PLANTED = {
    "thresholds are read before the block has met": (
        "linear.cuh",
        "__syncthreads();\n\n    Data*",
        "Data*",
        " scconv::fused_kernel<float",
    ),
    "a tile's sums are written over those of the tile before": (
        "channels_last.cuh",
        "__syncthreads(); // the last tile's sums have been read",
        "",
        " scconv::tile_fused_kernel<float",
    ),
    "statistics are merged before the cluster has met": (
        "moments.cuh",
        "if (p.cluster > 1)\n        cluster_barrier();\n    else\n        __syncthreads();",
        "__syncthreads();",
        "fused_kernel<float",
    ),
    "a piece is read before it has come": (
        "linear.cuh",
        "bulk_wait(slice.barriers + (piece - slice.first));",
        "bulk_wait(slice.barriers + (slice.end - 1 - slice.first));",
        " scconv::fused_kernel<float",
    ),
}
"""File, text, what replaces it, and the kernel that races."""


@pytest.fixture(scope="module")
def objects(races, tmp_path_factory) -> dict[str, str]:
    """By their names."""
    folder, sweep = tmp_path_factory.mktemp("raced") / "objects", HERE / "race_sweep.cpp"
    return {Path(path).name: path for path in compile_kernels(folder, *FLAGS, sources=[sweep], changes=ONE_OPERATOR)}


def test_no_race(races, objects, tmp_path):
    done = races.run(link(list(objects.values()), tmp_path / "sweep", *RACES))
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout  # every call of a size gives the same bytes


@pytest.mark.parametrize("planted", PLANTED)
def test_a_barrier_taken_away_is_found(races, objects, tmp_path, planted):
    file, old, new, where = PLANTED[planted]
    copy_kernels(tmp_path / "changed", ONE_OPERATOR | {file: (old, new)})
    changed = compile_files(tmp_path / "changed", [tmp_path / "changed" / FLOAT], *FLAGS)
    others = [each for name, each in objects.items() if name != Path(changed[0]).name]
    # first, so that what all types share is taken from it
    done = races.run(link([*changed, *others], tmp_path / "sweep", *RACES), 0)
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert where in done.stderr, done.stderr
    assert done.returncode != 0
