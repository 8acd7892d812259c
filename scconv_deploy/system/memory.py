"""Cores and memory that this process may use, containers' limits included. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("sys/fs/cgroup")


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: those it is bound to, and no more than a container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _text(root / _CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        bound = min(bound, max(1, int(quota) // int(period)))
    return bound


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that is free for new processes, within a container's limit; None where the system does not say."""
    found = []
    for line in _text(root / "proc" / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            found.append(int(value.split()[0]) * 1024)
    limit, used = (_text(root / _CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
