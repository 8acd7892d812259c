"""Functions that the workers of tests run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from scconv_deploy.errors import ModelError


def square(value, progress):
    progress(f"squaring {value}")
    return value * value


def of_this_process(progress):
    """(process, threads by the environment, current folder)"""
    return os.getpid(), os.environ["OMP_NUM_THREADS"], os.getcwd()


def fails(progress):
    raise ModelError("The model is odd.", "Even it.")


def has_a_bug(progress):
    raise ZeroDivisionError("by zero")


def ends(number, progress):
    sys.stderr.write("the last words\n")
    sys.stderr.flush()
    if number:
        os.kill(os.getpid(), number)
    os._exit(3)


def waits(folder, progress):
    """Hold a temporary file until the process is told to end."""
    file = Path(folder) / f"{os.getpid()}.held"
    try:
        file.touch()
        progress("holding")
        time.sleep(60)
    finally:
        file.unlink()


def first_kills_its_machine(folder, index, progress):
    """On the first attempt of number 0, end the worker as a lost machine would."""
    marks = Path(folder)
    (marks / f"{index}.{len(list(marks.glob(f'{index}.*')))}").touch()
    if index == 0 and len(list(marks.glob("0.*"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return index
