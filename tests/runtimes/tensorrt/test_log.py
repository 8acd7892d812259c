"""Progress as one fraction, and the library's log in one place."""

from types import SimpleNamespace

import pytest

from scconv_deploy.runtimes.tensorrt import log as logs


def test_nested_phases_become_one_fraction_that_never_falls():
    told = []
    progress = logs.Progress(lambda fraction, phase: told.append((round(fraction, 3), phase)))
    progress.start("build", 4)
    progress.step("build", 0)
    progress.start("optimize", 2)
    assert progress.step("optimize", 0)
    assert progress.fraction == pytest.approx((1 + 1 / 2) / 4)
    progress.finish("optimize")
    progress.start("again", 10)
    assert progress.fraction == pytest.approx(1.5 / 4)  # not back to 1/4
    progress.finish("again")
    progress.finish("build")
    assert progress.fraction == 1.0
    assert told[0] == (0.0, "build")
    assert told[-1] == (0.375, "again")


def test_a_cancelled_build_is_told_to_stop():
    progress = logs.Progress(lambda fraction, phase: None)
    progress.start("build", 2)
    assert progress.step("build", 0)
    progress.cancel()
    assert not progress.step("build", 1)
    assert not progress.step("a phase that nobody started", 0)


def test_a_remark_is_said_at_once_and_with_every_phase_after():
    told = []
    progress = logs.Progress(lambda fraction, phase: told.append((fraction, phase)))
    progress.start("build", 2)
    progress.say("slow")
    progress.step("build", 0)
    assert told == [(0.0, "build"), (0.0, "slow"), (0.5, "build (slow)")]


class FakeLogger:
    """What every version's ILogger is: a class to derive from."""

    def __init__(self):
        pass


def test_there_is_one_logger_and_each_recording_is_its_own():
    log = logs.LibraryLog(SimpleNamespace(ILogger=FakeLogger))
    with log.recording() as outer:
        log.logger.log(SimpleNamespace(name="WARNING"), "first")
        with log.recording() as inner:
            log.logger.log(SimpleNamespace(name="ERROR"), "second\n line")
        log.logger.log(SimpleNamespace(name="WARNING"), "first")
    assert inner == [("ERROR", "second\n line")]
    assert logs.errors(inner) == ["second line"]
    assert logs.warnings(outer) == ("first (2 times)",)


def test_what_the_parser_says_once_a_process_is_no_warning_of_an_engine():
    text = "ImporterContext.hpp:501: A node named {} already exists, the output tensors of this new instance will not"
    messages = [("WARNING", text.format(name)) for name in ("a", "b", "c")] + [
        ("INFO", "none"),
        ("WARNING", "one\nline"),
    ]
    assert logs.warnings(messages) == ("one line",)
