"""Cores and memory, within a container's limits."""

from __future__ import annotations

import os

import pytest

from scconv_deploy.system.memory import available_bytes, usable_cores


def system(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:  9 kB\nMemAvailable:     2048 kB\n"


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [(None, "0", 2 << 20), ("max\n", "5", 2 << 20), ("1048576\n", "1000000\n", 48576), ("100\n", "200\n", 0)],
)
def test_memory_is_what_the_system_and_the_container_leave(tmp_path, limit, used, expected):
    system(tmp_path, proc__meminfo=MEMINFO)
    if limit is not None:
        system(tmp_path, sys__fs__cgroup__memoryDOTmax=limit, sys__fs__cgroup__memoryDOTcurrent=used)
    assert available_bytes(tmp_path) == expected


def test_memory_may_be_unknown(tmp_path):
    assert available_bytes(tmp_path) is None
    assert available_bytes() is None or available_bytes() > 1 << 20


@pytest.mark.parametrize(("quota", "most"), [("max 100000", 99), ("50000 100000", 1), ("100000 100000", 1)])
def test_cores_are_those_of_the_quota(tmp_path, quota, most):
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_cores(system(tmp_path, sys__fs__cgroup__cpuDOTmax=quota)) == min(here, most)
    assert usable_cores(tmp_path / "none") == here
