"""Processes of this machine: their outcomes, their bounds, and how they end."""

from __future__ import annotations

import os
import signal
import time

import pytest

from scconv_deploy.system.memory import usable_cores
from scconv_deploy.workers.local import LocalWorkers
from scconv_deploy.workers.tasks import Task
from tests.workers import tasks


def outcomes(workers, *wanted):
    told = []
    found = {o.name: o for o in workers.run(wanted, lambda name, text: told.append((name, text)))}
    return found, told


def test_values_failures_and_words_come_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, told = outcomes(
        LocalWorkers(2),
        Task("three", tasks.square, (3,)),
        Task("fails", tasks.fails),
        Task("bug", tasks.has_a_bug),
        Task("where", tasks.of_this_process),
    )
    assert (found["three"].value, found["three"].failure) == (9, None)
    assert ("three", "squaring 3") in told
    assert found["fails"].failure.exit_code == 4
    assert (found["fails"].failure.message, found["fails"].failure.remedy) == ("The model is odd.", "Even it.")
    assert found["bug"].failure.exit_code == 1
    assert "ZeroDivisionError: by zero" in found["bug"].failure.details
    process, threads, folder = found["where"].value
    assert process != os.getpid()
    assert threads == str(max(1, usable_cores() // 2))
    assert os.path.samefile(folder, tmp_path)
    assert found["where"].peak_bytes > 1 << 20


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGSEGV, 1, "ended by SIGSEGV"),
        (signal.SIGKILL, 3, "killed, as the system does when memory ends"),
        (0, 1, "ended with exit code 3"),
    ],
)
def test_a_process_that_is_lost_stops_nothing_else(number, code, words):
    found, _ = outcomes(LocalWorkers(1), Task("lost", tasks.ends, (number,)), Task("three", tasks.square, (3,)))
    failure = found["lost"].failure
    assert failure.exit_code == code
    assert words in failure.message
    assert "the last words" in failure.details
    assert found["three"].value == 9


def test_ending_early_lets_processes_clean_up(tmp_path):
    held = []
    running = LocalWorkers(2).run(
        [Task(str(n), tasks.waits, (str(tmp_path),)) for n in range(2)] + [Task("no", tasks.square, (1,))],
        lambda name, text: held.append(name) if text == "holding" else interrupt(held),
    )
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(running)
    assert sorted(held) == ["0", "1"]
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - started < 50


def interrupt(held):
    if len(held) == 2:
        raise KeyboardInterrupt
