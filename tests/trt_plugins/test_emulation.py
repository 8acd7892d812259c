"""The emulation itself: what a kernel does wrong (emulation/probe.cpp) is found, and nothing is where it does right."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.trt_plugins.emulated import EMULATION, HERE, RACES, compile_once, link

ORDERS = (0, 1, 2)
FOR_EVER = r"deadlock: thread \d+ of block \d waits for ever at"
PROBE = [*EMULATION, HERE / "probe.cpp"]
FOUND = {
    "uninitialised": "bulk_expect: the barrier was not initialised",
    "initialised twice": "bulk_init: the barrier is initialised twice",
    "announced twice": "bulk_expect: the barrier is used twice",
    "used twice": "bulk_load: the barrier is used twice",
    "overwritten": "bulk_wait: the barrier was overwritten",
    "unannounced": f"{FOR_EVER} bulk_wait, for bytes that nobody loads or announces",
    "too few bytes": f"{FOR_EVER} bulk_wait, for bytes that nobody loads or announces",
    "too many bytes": "bulk_load: a barrier expects 496 bytes, and 512 came",
    "misaligned": "bulk_load: an address is no multiple of 16 bytes",
    "ragged": "bulk_load: 508 bytes are no multiple of 16",
    "copied outside": r"bulk_load: outside the shared memory of block \d",
    "no wait": r"block \d ends(: .* 512 bytes, 512 came, and nobody waited| while a bulk copy into it is under way)",
    "deadlock": f"{FOR_EVER} __syncthreads",
    "cluster deadlock": f"{FOR_EVER} cluster_barrier",
    "warp deadlock": f"{FOR_EVER} a shuffle",
    "stored too early": r"store_remote: the cluster has not met, so that block \d may not have begun",
    "no such block": "store_remote: block 2 of a cluster of 2",
}
"""What ends the run in every order."""


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """mistake, order, blocks of a cluster -> exit code, standard output and error."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("probe")
    program = link(compile_once(folder, PROBE, "-O1"), folder / "probe")
    return lambda *arguments: run(program, *arguments)


@pytest.fixture(scope="module")
def racing_probe(races, tmp_path_factory):
    folder = tmp_path_factory.mktemp("racing_probe")
    program = link(compile_once(folder, PROBE, "-O1", "-g1", *RACES), folder / "probe", *RACES)
    return lambda *arguments: races.run(program, *arguments, names=False)


@pytest.fixture(scope="module")
def poisoned_probe(memory_sanitizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("poisoned_probe")
    objects = compile_once(folder, PROBE, "-O0", *memory_sanitizers)
    program = link(objects, folder / "probe", *memory_sanitizers)
    return lambda *arguments: run(program, *arguments)


def run(program, *arguments):
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cluster", [1, 2, 7, 8])
def test_barriers_shuffles_copies_and_other_blocks_memory(probe, poisoned_probe, cluster, order):
    for program in (probe, poisoned_probe):
        done = program("none", order, cluster)
        assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mistake", FOUND)
def test_a_mistake_ends_the_run_with_one_line(probe, mistake, order):
    done = probe(mistake, order, 2)
    assert done.returncode == -6
    assert re.fullmatch(f"emulation: {FOUND[mistake]}\n", done.stderr), done.stderr


@pytest.mark.parametrize("mistake", ["no barrier", "unwritten"])
def test_what_is_read_before_it_is_written_is_nan(probe, mistake):
    for order in ORDERS:
        assert probe(mistake, order, 2).stdout == "wrong\n"


@pytest.mark.parametrize("mistake", ["ended", "no cluster barrier"])
def test_a_store_into_a_block_that_has_ended(probe, mistake):
    done = probe(mistake, 1, 2)
    assert re.fullmatch(r"emulation: store_remote: block \d of the cluster has ended\n", done.stderr)


def test_a_block_writes_into_anothers_part(probe):
    assert [probe("two blocks", order, 2).stdout for order in ORDERS] == ["right\n", "wrong\n", "wrong\n"]


def test_memory_beyond_what_was_asked_for_is_poisoned(poisoned_probe):
    for order in ORDERS:
        done = poisoned_probe("outside", order, 2)
        assert done.returncode != 0
        assert "AddressSanitizer: use-after-poison" in done.stderr


@pytest.mark.parametrize("order", ORDERS)
def test_no_race_where_barriers_put_everything_in_order(racing_probe, order):
    for cluster in (1, 2, 4):
        done = racing_probe("none", order, cluster)
        assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "mistake", ["no barrier", "no wait", "one wait", "no cluster barrier", "ended", "warp", "two blocks"]
)
def test_a_race_is_found_in_whichever_order_it_ran(racing_probe, mistake, order):
    """Among them what gives the right values in some orders: a wait for another copy, a store to a block that may have
    ended, a shuffle taken for a barrier, a block that writes into another's part."""
    done = racing_probe(mistake, order, 2)
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


LAUNCHES = {  # compute capability, compiled for, blocks, blocks of a cluster, shared bytes -> status, architectures
    (90, 90, 6, 2, 0): "0: 90 90",
    (90, 90, 8, 8, 48 << 10): "0: 90 90",
    (90, 90, 16, 16, 0): "912: 90 90",
    (90, 90, 6, 4, 0): "912: 90 90",
    (90, 90, 6, 0, 0): "912: 90 90",
    (90, 90, 0, 1, 0): "9: 90 90",
    (90, 90, 1, 1, (48 << 10) + 1): "1: 90 90",
    (89, 89, 2, 2, 0): "912: 89 89",
    (89, 89, 2, 1, 0): "0: 89 89",
    (89, 80, 2, 1, 0): "0: 80 80",  # machine code for an older GPU of the same generation
    (90, 89, 2, 1, 0): "0: 89 90",  # made from PTX
    (90, 0, 1, 1, 0): "209: 0 0",  # cudaErrorNoKernelImageForDevice
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_launches_that_a_device_refuses(probe, launch):
    assert probe("launch", *launch).stdout == LAUNCHES[launch] + "\n"


def test_the_devices_attributes(probe):
    """Multiprocessors, compute capability, shared memory of a block and of a multiprocessor."""
    assert probe("device", 86, 99 << 10).stdout == f"132 8 6 {99 << 10} {100 << 10}\n"


@pytest.mark.nvcc
def test_numbers_are_nvidias(nvcc, tmp_path):
    text = (HERE / "cuda_runtime_api.h").read_text()
    values = re.findall(r"^    (cuda\w+) = (\d+),$", text, re.MULTILINE)
    assert ("cudaErrorNoKernelImageForDevice", "209") in values
    lines = [f"static_assert(static_cast<int>({name}) == {value});" for name, value in values]
    (tmp_path / "values.cpp").write_text("\n".join(["#include <cuda_runtime_api.h>", *lines]))
    done = subprocess.run(
        [nvcc, "-std=c++17", "-c", str(tmp_path / "values.cpp"), "-o", str(tmp_path / "values.o")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
