"""Run compilers: side by side, ended with their children by an interrupt, their errors in one line with a remedy."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from scconv_deploy.errors import BuildError, MissingRuntimeError
from scconv_deploy.system.machine import CUDA_WHEELS
from scconv_deploy.system.signals import held

_SHOWN_LINES = 40


def run_compilers(commands: Sequence[Sequence[str]], folder: str, what: str) -> None:
    """Run compilers side by side, with their temporary files in the folder; an interrupt ends them and their children.

    Raises:
        MissingRuntimeError: one cannot be run.
        BuildError: one failed to build ``what``; its lines are in the details.
    """
    running: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            with held():  # a signal between the start and its result would leave a compiler that nobody knows
                running.append(subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
                    env=os.environ | {"TMPDIR": folder}, start_new_session=True,
                ))  # fmt: skip
        for process in running:
            output, _ = process.communicate()
            if process.returncode:
                raise _failure(str(process.args[0]), output, process.returncode, what)  # type: ignore[index]
    except OSError as error:
        raise MissingRuntimeError(f"{error.filename} cannot be run: {error.strerror}.", "Install it again.") from error
    finally:
        for process in running:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _failure(compiler: str, output: str, status: int, what: str) -> BuildError:
    lines = [line for line in output.splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower() or "fatal" in line.lower()), "")
    return BuildError(
        f"{Path(compiler).name} could not build {what}: {first or f'exit status {status}'}.",
        _remedy(compiler, output, status),
        "\n".join(lines[:_SHOWN_LINES]),
    )


def _remedy(compiler: str, output: str, status: int) -> str:
    if "Unsupported .version" in output:  # pip does not hold CUDA's wheels together
        return f"The CUDA wheels are of several versions: {CUDA_WHEELS}"
    if "No space left" in output:
        return f"Free some space in {tempfile.gettempdir()}."
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL) or "Killed" in output:
        return "It was killed, probably for want of memory: name fewer architectures at a time."
    if "nvcc" in Path(compiler).name:
        return "Check that nvcc supports the host compiler."
    return f"It needs a C++17 compiler: see what {compiler} says, or name another one in CXX."
