"""Progress in logs: at most a line each ten seconds, what goes on is said again, and nothing where none is wanted."""

from __future__ import annotations

import json
import re
import sys
import time

import pytest

from scconv_deploy.system import progress_lines as log_lines
from scconv_deploy.system.progress_lines import LogLines
from scconv_deploy.verification.samples import with_progress
from scconv_deploy.zoo import catalogue
from tests.command_line import run


@pytest.fixture
def lines(monkeypatch):
    """(lines, clock, what was written)."""
    monkeypatch.setattr(log_lines, "EVERY_S", 10.0)
    clock, written = [1000.0], []
    return LogLines(written.append, lambda: clock[0]), clock, written


def test_at_most_one_line_in_ten_seconds_and_it_is_the_latest(lines):
    progress, clock, written = lines
    for second in range(200):
        clock[0] = 1000.0 + second / 2
        progress(f"verifying ({second})")
        progress.look()
    assert written == [f"[{t // 60}:{t % 60:02d}] verifying ({2 * t})\n" for t in range(10, 100, 10)]


def test_what_goes_on_is_said_again_once_a_minute(lines):
    progress, clock, written = lines
    progress("exporting")
    for second in range(140):
        clock[0] = 1000.0 + second
        progress.look()
    assert written == ["[0:10] exporting\n", "[1:10] exporting\n", "[2:10] exporting\n"]


def test_nothing_is_said_of_nothing(lines):
    progress, clock, written = lines
    clock[0] += 1000
    progress.look()
    assert written == []


def test_nobody_reads_stderr_and_the_work_goes_on(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(log_lines, "EVERY_S", 0.0)
    monkeypatch.setattr(sys, "stderr", Gone())
    progress = LogLines()
    progress("working")
    progress.look()
    assert progress._told == "working"


def test_percent_and_time_left(monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr("scconv_deploy.verification.samples.time.monotonic", lambda: clock[0])
    for _ in with_progress([["a"], ["b"] * 9], said.append):
        clock[0] += 6
    assert said[0] == "verifying on a (1 of 10)"
    assert said[3] == "verifying on b (4 of 10, 30%, 0:42 left)"


@pytest.mark.parametrize(("options", "lines"), [([], True), (["--quiet"], False), (["--json"], False)])
def test_the_command_line_writes_them_to_stderr(options, lines, monkeypatch):
    def slow(progress):
        progress("counting")
        time.sleep(0.6)
        return count(progress=progress)

    count = catalogue.list_models
    monkeypatch.setattr(catalogue, "list_models", slow)
    monkeypatch.setattr(catalogue, "MODELS", dict(list(catalogue.MODELS.items())[:1]))  # one is quick to count
    monkeypatch.setattr(log_lines, "EVERY_S", 0.05)
    done = run("models", *options)
    assert done.exit_code == 0, done.output
    said = done.stderr.splitlines()
    assert bool(said) == lines
    assert all(re.fullmatch(r"\[\d+:\d\d\] counting.*", line) for line in said)
    assert "counting" not in done.stdout
    if options == ["--json"]:
        assert json.loads(done.stdout)["kind"] == "models"


def test_the_thread_ends_with_its_block():
    with LogLines(lambda line: None) as progress:
        thread = progress._thread
        assert thread.is_alive()
    deadline = time.monotonic() + 5
    while thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not thread.is_alive()
