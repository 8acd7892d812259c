"""The kernels' own sources on the CPU (emulation/), behind the same C interface, bound like the library for a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scconv_deploy.errors import ConfigurationError
from scconv_deploy.trt_plugins.build import KERNEL_SOURCES, SOURCES
from scconv_deploy.trt_plugins.library import ALGORITHMS, SruLibrary, SruParams, SruSettings, sru_params
from tests.made_once import key_of, once
from tests.trt_plugins.reference import H200

HERE = Path(__file__).parent / "emulation"
FLAGS = (
    "-std=c++17",
    "-U_FORTIFY_SOURCE",
    "-ffp-contract=off",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
)  # which says what loops the optimiser has unrolled
LIGHTLY = ("-Og",)
"""Half of -O1's time for compilers, and kernels that run nearly as fast."""
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RACES = ("-fsanitize=thread",)
EMULATION = [HERE / f"{name}.cpp" for name in ("fibers", "cluster", "threads", "emulation")]
ONE_OPERATOR = {
    f"sru_{name}.cu": (f"launch_operator<{type_}>(op, ", f"launch_vector<{type_}, Operator::{operator}>(")
    for name, type_, operator in (
        ("float", "float", "kSru"),
        ("half", "__half", "kSruNorm"),
        ("bfloat16", "__nv_bfloat16", "kSruSoft"),
    )
}
"""Changes that leave each type one operator, another for each: compilers take a third of the time, and no barrier is an
operator's own."""
ONE_KERNEL = ONE_OPERATOR | {
    f"sru_{name}.cu": (f"launch_operator<{type_}>(op, p, plan, stream)", "cudaErrorInvalidValue")
    for name, type_ in (("half", "__half"), ("bfloat16", "__nv_bfloat16"))
}
"""Changes that leave the kernels of one operator for float, for what is compiled and not run."""
GUARD, PATTERN = 256, 0xA5
"""Bytes before and after what a kernel may write, and what they hold."""


def copy_kernels(folder: Path, changes: Mapping[str, tuple[str, str]] | None = None) -> None:
    """The kernels' sources with the emulation's intrinsics.

    changes: file in kernel/ -> text that it holds once, and what replaces it.
    """
    (folder / "kernel").mkdir(parents=True)
    (folder / "sru_math.h").write_text((SOURCES / "sru_math.h").read_text())
    for path in (SOURCES / "kernel").iterdir():
        (folder / "kernel" / path.name).write_text(path.read_text())
    (folder / "kernel" / "intrinsics.cuh").write_text((HERE / "intrinsics.cuh").read_text())
    change_kernels(folder, changes or {})


def change_kernels(folder: Path, changes: Mapping[str, tuple[str, str]]) -> None:
    """Change a copy of the sources; ``changes`` as for :func:`copy_kernels`."""
    for name, (old, new) in changes.items():
        text = (folder / "kernel" / name).read_text()
        assert text.count(old) == 1, f"{name} does not hold {old!r} once"
        (folder / "kernel" / name).write_text(text.replace(old, new))


def compile_files(folder: Path, files: Sequence[Path], *flags: str) -> list[str]:
    """Objects of some files, compiled side by side. The emulation's own do not race: see emulation/races.h."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = [str(folder / f"{path.stem}.o") for path in files]
    own = ["-DEMULATION_RACES" if flag in RACES else flag for flag in flags]
    commands = [
        ["g++", *FLAGS, *(own if path in EMULATION else flags), "-I", str(HERE), "-I", str(folder / "kernel"),
         "-x", "c++", "-c", str(path), "-o", name]
        for path, name in zip(files, objects, strict=True)
    ]  # fmt: skip
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [process.communicate()[0] for process in running]
    assert not any(process.returncode for process in running), "\n".join(outputs)
    assert not any(outputs), "\n".join(outputs)  # no warning either
    return objects


def compile_once(
    folder: Path, files: Sequence[Path], *flags: str, changes: Mapping[str, tuple[str, str]] | None = None
) -> list[str]:
    """:func:`compile_files`, once a run for all workers. changes: those that the files have been copied with.

    The emulation's own files are compiled once for all that have the same flags.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, bytes] = {}
    others = [path for path in files if path not in EMULATION]
    for part, facts in ((EMULATION, None), (others, changes)):

        def made(part: Sequence[Path] = part) -> dict[str, bytes]:
            return {path: Path(path).read_bytes() for path in compile_files(folder, part, *flags)}

        found = once(key_of("objects", [path.name for path in part], flags, facts), made)
        contents |= {Path(path).name: content for path, content in found.items()}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in contents]


def compile_kernels(
    folder: Path,
    *flags: str,
    sources: Sequence[Path] = (),
    changes: Mapping[str, tuple[str, str]] | None = None,
) -> list[str]:
    """Objects of the kernels, the C interface, the emulation and further sources, compiled once a run."""
    copy_kernels(folder, changes)
    files = [*(folder / name for name in KERNEL_SOURCES), *EMULATION, *sources]
    return compile_once(folder, files, *flags, changes=changes)


def link(objects: Sequence[str], program: Path, *flags: str) -> Path:
    """A program of these objects."""
    subprocess.run(["g++", *flags, *objects, "-o", str(program)], check=True)
    return program


class EmulatedLibrary(SruLibrary):
    """Takes CPU tensors; what lies around the output and the workspace is checked after every call."""

    def __init__(self, folder: Path, compiled: Path | None = None) -> None:
        path = folder / "libscconv_sru_emulated.so"
        if compiled is not None:  # a copy is another library, which has seen no device yet
            shutil.copy(compiled, path)
        else:
            objects = compile_kernels(folder / "objects", *LIGHTLY)
            subprocess.run(["g++", "-shared", *objects, "-o", str(path)], check=True)
        super().__init__(path)
        self.device()

    def device(
        self,
        multiprocessors: int = H200[0],
        shared_bytes: int = H200[1],
        order: int = 0,
        capability: int = 90,
        compiled_for: int | None = None,
        widest_cluster: int = 8,
    ) -> None:
        """Another GPU, and the order in which threads run (0, 1 or 2).

        capability: e.g. 89. compiled_for: the architecture of the kernels' code, by default the GPU's; 0: none runs.
        widest_cluster: blocks that the GPU has room for side by side.
        """
        self._library.emulation_device(multiprocessors, shared_bytes, order)
        self._library.emulation_architecture(capability, capability if compiled_for is None else compiled_for)
        self._library.emulation_widest_cluster(widest_cluster)

    def permits(self) -> tuple[int, int, int]:
        """Calls of cudaFuncSetAttribute since :meth:`device`, and the least and most bytes they permitted."""
        least, most = ctypes.c_int(2**31 - 1), ctypes.c_int(0)
        count = self._library.emulation_permits(ctypes.byref(least), ctypes.byref(most))
        return count, least.value, most.value

    def sru(self, x: Tensor, parameters: Sequence[Tensor], settings: SruSettings) -> Tensor:
        """Like SruLibrary.sru, of an x that the kernels take as it is."""
        params = sru_params(x, parameters, settings)
        if reason := self.refusal(params):
            raise ConfigurationError(reason, "Change these.")
        room, y = _guarded(x.numel() * x.element_size())
        params.y = y.data_ptr()
        around, workspace = _guarded(self.workspace_bytes(params))
        params.workspace, params.workspace_bytes = workspace.data_ptr(), workspace.numel()
        assert self.enqueue(params) == 0
        for memory, size in ((room, y.numel()), (around, workspace.numel())):
            assert (memory[:GUARD] == PATTERN).all(), "memory before was written"
            assert (memory[GUARD + size :] == PATTERN).all(), "memory after was written"
        return y.clone().view(x.dtype).as_strided(x.shape, x.stride())

    def enqueue(self, params: SruParams) -> int:
        return self._library.scconv_sru_enqueue(ctypes.byref(params), None)

    def choose(self, params: SruParams) -> int:
        """CUDA's status of scconv_sru_choose."""
        return self._library.scconv_sru_choose(ctypes.byref(params), ctypes.byref(ctypes.c_int32()))

    def chosen(self, x: Tensor, parameters: Sequence[Tensor], settings: SruSettings) -> int:
        return ALGORITHMS.index(self.chosen_algorithm(sru_params(x, parameters, settings)))


def _guarded(size: int) -> tuple[Tensor, Tensor]:
    """Bytes between guards, and those in the middle; both begin at a multiple of 256 bytes."""
    room = torch.full((GUARD + size + GUARD + 256,), PATTERN, dtype=torch.uint8)
    skip = -room.data_ptr() % 256
    room = room[skip : skip + GUARD + size + GUARD]
    return room, room[GUARD : GUARD + size]
