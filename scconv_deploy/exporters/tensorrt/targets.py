"""Targets of an engine: the values of ``--target``, and the versions in each JetPack.

On a Jetson, the JetPack decides, not the board: an Orin has TensorRT 10.3 under JetPack 6, and 10.16 under JetPack 7.
Sources: NVIDIA's JetPack archive (developer.nvidia.com/embedded/jetpack/downloads: JetPack 7.0 is Jetson Linux 38.2,
7.1 is 38.4), Torch-TensorRT's page on Jetson (JetPack 6.1: CUDA 12.6, TensorRT 10.3), the support matrix of TensorRT
Edge-LLM 0.10 (JetPack 7.0 and 7.1: CUDA 13.0; 7.2, the first for Orin: CUDA 13.2), and NVIDIA's table of compute
capabilities (developer.nvidia.com/cuda-gpus: Orin 8.7, Thor 11.0). Those of TensorRT 10.13 in JetPack 7.0 and 10.16 in
7.2 stand in docs/hosts/jetson.md. TensorRT 11.4.1 is for JetPack 7.2.2 and later, as an installation of its own: the
device builds with the TensorRT that Python imports (NVIDIA's page on migrating Jetson to TensorRT 11, November 2026).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from scconv_deploy.errors import UsageError
from scconv_deploy.runtimes.tensorrt.versions import FUNCTIONS_BEHIND_PLUGINS, release
from scconv_deploy.system.backends import BACKENDS


@dataclass(frozen=True)
class DeviceTarget:
    """A device that builds its engine itself, with the oldest supported JetPack of its line and the versions in that.

    Attributes:
        linux: major releases of Jetson Linux.
        tensorrt, cuda, python: versions of that JetPack; a later one of the line may bring newer ones.
        compute_capability: as nvcc writes it.
    """

    name: str
    jetpack: str
    linux: tuple[int, ...]
    tensorrt: str
    cuda: str
    python: str
    compute_capability: str

    @property
    def needs_adapted_files(self) -> bool:
        """Whether the device's TensorRT reads functions wrongly, see :func:`.network.form_for`."""
        return release(self.tensorrt) < FUNCTIONS_BEHIND_PLUGINS


DEVICES = {
    target.name: target
    for target in (
        DeviceTarget("orin-jp6", "6.1", (36,), "10.3", "12.6", "3.10", "87"),
        DeviceTarget("orin-jp7", "7.2", (39,), "10.16", "13.2", "3.12", "87"),
        DeviceTarget("thor-jp7", "7.0", (38, 39), "10.13", "13.0", "3.12", "110"),
    )
}
TAKES = {name: (*facts.targets, *(DEVICES if facts.for_devices else ())) for name, facts in BACKENDS.items()}
"""Targets by backend."""


def jetpack_of(linux: str) -> str | None:
    """The JetPack of a release of Jetson Linux, ``JetPack 6`` for ``36.4``; None if unknown."""
    major = linux.split(".")[0]
    return next((f"JetPack {d.jetpack[0]}" for d in DEVICES.values() if major in map(str, d.linux)), None)


def target_parts(target: str) -> tuple[str, ...]:
    """The parts of ``--target`` in lower case, each once; none for "" (UsageError for an empty part)."""
    parts = [part.strip().lower() for part in target.split(",")] if target else []
    if "" in parts:
        raise UsageError(f"--target {target!r}: its part {parts.index('') + 1} is empty.", "Leave out the comma.")
    return tuple(dict.fromkeys(parts))


def check_build_target(backend: str, target: str) -> None:
    """Refuse targets that no engine can be built for, before the library is loaded.

    Raises:
        UsageError: a device, which builds its engine itself; ``local`` or ``portable`` beside others; an empty part.
    """
    parts = target_parts(target)
    if device := next((part for part in parts if part in DEVICES), None):
        raise UsageError(
            f"--target {device}: an engine for it is built on the device.",
            f"scconv-deploy deploy MODEL --backend tensorrt --target {device} makes a bundle for it.",
        )
    alone = next((part for part in parts if part in ("local", "portable")), None)
    if alone and len(parts) > 1:
        raise UsageError(f"--target {target}: {alone} cannot be combined with others.", f"Give {alone}, or the others.")
    if backend == "tensorrt" and parts not in ((), ("local",)):
        raise UsageError(
            f"--target {target}: TensorRT builds for the GPU of this machine.",
            "Leave --target out; --hardware-compatibility ampere+ makes the engine run on newer GPUs as well.",
        )


def split_targets(backends: Sequence[str], target: str) -> dict[str, tuple[str, ...]]:
    """Give each part of ``--target`` to the backends that take it.

    Args:
        backends: those that build engines.
        target: parts with commas between them; "" leaves each backend its default.

    Returns:
        backend -> its parts, in the order given, each once.

    Raises:
        UsageError: a part that is unknown, or that none of the backends takes; or a backend without a part.
    """
    parts = target_parts(target)
    for part in parts:
        takers = [backend for backend in TAKES if _kind(part) in TAKES[backend]]
        if not takers:
            known = dict.fromkeys(name for names in reversed(TAKES.values()) for name in names)
            raise UsageError(f"--target {part!r} is not known.", f"Known: {', '.join(known)}.")
        if not set(takers) & set(backends):
            raise UsageError(
                f"--target {part}: none of the backends ({', '.join(backends)}) builds for it.",
                f"Add --backend {takers[0]}, or leave {part} out.",
            )
    found = {b: tuple(part for part in parts if _kind(part) in TAKES[b]) for b in backends}
    idle = [backend for backend, taken in found.items() if parts and not taken]
    if idle:
        raise UsageError(
            f"--target {target} names nothing that {idle[0]} builds for.",
            f"It takes {', '.join(TAKES[idle[0]])}. Add one, or leave --backend {idle[0]} out.",
        )
    return found


def _kind(part: str) -> str:
    return "smNN" if re.fullmatch(r"sm\d+", part) else part
