"""Admission of tasks: cores and memory bound how many run."""

from __future__ import annotations

import pytest

from scconv_deploy.workers.tasks import Admission, Outcome, Task, bound_threads
from tests.workers.tasks import square

GB = 1 << 30


def task(name, memory_gb=0):
    return Task(name, square, memory_bytes=memory_gb * GB)


def started(admission, *tasks):
    names = []
    for one in tasks:
        if admission.admits(one):
            admission.start(one)
            names.append(one.name)
    return names


@pytest.mark.parametrize(
    ("jobs", "memory", "expected"),
    [(2, None, ["a", "b"]), (9, 6 * GB, ["a", "b"]), (9, 2 * GB, ["a"]), (9, 100 * GB, ["a", "b", "c"])],
)
def test_no_more_run_than_cores_and_memory_hold(jobs, memory, expected):
    assert started(Admission(jobs, memory), task("a", 3), task("b", 3), task("c", 3)) == expected


def test_a_task_that_says_nothing_counts_as_the_largest_that_ended():
    admission = Admission(9, 8 * GB, usual_bytes=4 * GB)
    assert started(admission, task("a"), task("b"), task("c")) == ["a", "b"]
    admission.end(Outcome("a", peak_bytes=1 * GB))
    assert started(admission, task("c"), task("d"), task("e"), task("f"), task("g")) == ["c", "d", "e", "f"]
    assert dict(admission.running) == {"b": 4 * GB} | dict.fromkeys("cdef", GB)


def test_one_runs_however_large_it_is():
    admission = Admission(2, GB)
    assert started(admission, task("large", 50), task("b", 1)) == ["large"]
    admission.end(Outcome("large", peak_bytes=50 * GB))
    assert started(admission, task("b", 1)) == ["b"]


def test_threads_are_bounded(monkeypatch):
    import torch

    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "5")
    bound_threads(1)
    assert torch.get_num_threads() == 1
    import os

    assert os.environ["OMP_NUM_THREADS"] == "1"
    torch.set_num_threads(threads)
