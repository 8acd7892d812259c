"""Where a result comes from, and how much of the machine others used meanwhile: no host name and no path."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

THREADS = 2
"""Of torch and of ONNX Runtime (``intra_op_num_threads``), in every benchmark."""

Result = TypeVar("Result")
_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxsim", "numpy")


def metadata() -> dict[str, Any]:
    """What a row needs to be reproduced."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux alone has it
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks {' '.join(sys.argv[1:])}",
        "commit": _commit(),
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "threads": THREADS,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    """None where a package is missing: a GPU's machine may have PyTorch and little else."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit, with ``-dirty`` when what is measured differs from it."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    if shutil.which("git") is None:  # a GPU's machine may have a copy of the files alone
        return "unknown"
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "scconv_deploy", "tests/wild.py"], capture_output=True)
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "") if head.returncode == 0 else "unknown"


def other_cores(work: Callable[[], Result]) -> tuple[Result, float | None]:
    """Do the work; its result, and how many cores other processes kept busy meanwhile (None where it is not known)."""
    before, own, start = _busy_s(), sum(os.times()[:4]), time.perf_counter()
    result = work()
    elapsed, own, after = time.perf_counter() - start, sum(os.times()[:4]) - own, _busy_s()
    return result, None if before is None or after is None else max(0.0, (after - before - own) / elapsed)


def _busy_s() -> float | None:
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]
    except OSError:
        return None
    ticks = [int(field) for field in fields]
    return (sum(ticks[:8]) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for a disk
