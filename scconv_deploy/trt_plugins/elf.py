"""Symbols, dependencies and GPU code of a shared library, read without executing it.

Reads little-endian ELF64 (x86-64 and aarch64 Linux; System V ABI, gABI 4.1) and the section ``.nv_fatbin``, whose
layout NVIDIA does not document: an image header of 16 bytes, then entries of a kind, a header size, a size and a
compute capability (as ``cuobjdump --list-elf`` shows them).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scconv_deploy.errors import IntegrityError

_DYNAMIC_SYMBOLS, _DYNAMIC, _VERSIONS_NEEDED = 11, 6, 0x6FFFFFFE  # section types
_LOADED = 1  # a segment that the loader maps
_NEEDED, _SONAME, _RPATH, _RUNPATH = 1, 14, 15, 29  # tags of the dynamic section
_FATBIN_MAGIC = 0xBA55ED50
_PTX, _CUBIN = 1, 2


@dataclass(frozen=True)
class SharedLibrary:
    """The dynamic part of an ELF file.

    Attributes:
        machine: ``x86-64``, ``aarch64`` or the ELF number.
        exported, undefined: names of dynamic symbols, without their versions.
        needed: sonames of the libraries it is linked to.
        versions: the newest symbol version that it needs of each, for example ``{"GLIBC": "2.34"}``.
        cubins, ptx: compute capabilities of the GPU code, for example ``("8.7", "9.0")``.
        run_path: where the loader looks for what it needs, before the system's folders.
    """

    machine: str
    soname: str
    needed: tuple[str, ...]
    exported: frozenset[str]
    undefined: frozenset[str]
    versions: dict[str, str]
    cubins: tuple[str, ...]
    ptx: tuple[str, ...]
    run_path: tuple[str, ...] = ()

    def serves(self, capability: str) -> bool:
        """Whether a GPU can run the code, given its compute capability, for example ``"8.9"``.

        Machine code runs on later GPUs of its major version, PTX on all later ones (CUDA C++ Programming Guide).
        """
        wanted = _number(capability)
        older = [found for found in map(_number, self.cubins) if found <= wanted]
        return any(found // 10 == wanted // 10 for found in older) or any(_number(c) <= wanted for c in self.ptx)

    @property
    def code(self) -> str:
        """The GPU code and the GPUs that it serves, in words."""
        if not self.ptx:
            return f"machine code for {', '.join(self.cubins) or 'none'}, no PTX for newer GPUs"
        oldest = min(self.ptx, key=_number)
        return f"machine code for {', '.join(self.cubins) or 'none'}, PTX {', '.join(self.ptx)} for every GPU from {oldest}"


def _number(capability: str) -> int:
    major, minor = capability.split(".")
    return 10 * int(major) + int(minor)


@dataclass(frozen=True)
class _Section:
    name_at: int
    kind: int
    offset: int
    size: int
    link: int


def read_library(path: Path) -> SharedLibrary:
    """Read a shared library.

    Raises:
        IntegrityError: it is no 64-bit little-endian ELF shared library, or it is truncated.
    """
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64:
        raise IntegrityError(f"{path} is no 64-bit Linux shared library.", "Build one with: scconv-deploy plugin build")
    try:
        kind, machine = struct.unpack_from("<HH", data, 16)
        if kind != 3:
            raise IntegrityError(f"{path} is an ELF file, but no shared library.", "Name the .so file.")
        _check_segments(data)
        return _read(data, {62: "x86-64", 183: "aarch64"}.get(machine, f"machine {machine}"))
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise IntegrityError(f"{path} is damaged: its ELF structure ends early.", "Build it again.") from error


def _check_segments(data: bytes) -> None:
    """Refuse a file that ends before its segments do (ValueError): a missing page ends the process with SIGBUS."""
    (start,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    for i in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", data, start + i * size)
        if kind == _LOADED and offset + length > len(data):
            raise ValueError(f"segment {i} ends at {offset + length}, the file at {len(data)}")


def _read(data: bytes, machine: str) -> SharedLibrary:
    sections, names = _sections(data)
    exported: set[str] = set()
    undefined: set[str] = set()
    needed: list[str] = []
    soname, run_path = "", ""
    versions: dict[str, str] = {}
    for section in sections:
        if section.kind == _DYNAMIC_SYMBOLS:
            for name, defined, visible in _symbols(data, section, sections[section.link]):
                if name and visible:
                    (exported if defined else undefined).add(name)
        elif section.kind == _DYNAMIC:
            strings = sections[section.link].offset
            for at in range(section.offset, section.offset + section.size, 16):
                tag, value = struct.unpack_from("<qQ", data, at)
                if tag == _NEEDED:
                    needed.append(_string(data, strings + value))
                elif tag == _SONAME:
                    soname = _string(data, strings + value)
                elif tag in (_RPATH, _RUNPATH):
                    run_path = _string(data, strings + value)
        elif section.kind == _VERSIONS_NEEDED:
            versions |= _versions(data, section, sections[section.link].offset)
    fatbin = [s for s in sections if _string(data, names + s.name_at) == ".nv_fatbin"]
    images = [image for section in fatbin for image in _images(data[section.offset : section.offset + section.size])]
    cubins, ptx = (
        tuple(f"{arch // 10}.{arch % 10}" for arch in sorted({a for k, a in images if k == wanted}))
        for wanted in (_CUBIN, _PTX)
    )
    return SharedLibrary(
        machine, soname, tuple(needed), frozenset(exported), frozenset(undefined), versions, cubins, ptx,
        tuple(filter(None, run_path.split(":"))),
    )  # fmt: skip


def _sections(data: bytes) -> tuple[list[_Section], int]:
    """All sections, and the offset of their names."""
    (start,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    found = []
    for i in range(count):
        name_at, kind, _, _, offset, length, link = struct.unpack_from("<IIQQQQI", data, start + i * size)
        found.append(_Section(name_at, kind, offset, length, link))
    return found, found[names].offset


def _symbols(data: bytes, section: _Section, strings: _Section) -> Iterator[tuple[str, bool, bool]]:
    """Symbols as (name, whether it is defined, whether it is visible to others)."""
    for at in range(section.offset, section.offset + section.size, 24):
        name_at, info, other, index = struct.unpack_from("<IBBH", data, at)
        yield _string(data, strings.offset + name_at), index != 0, info >> 4 != 0 and other & 3 in (0, 3)


def _versions(data: bytes, section: _Section, strings: int) -> dict[str, str]:
    newest: dict[str, tuple[int, ...]] = {}
    at = section.offset
    while True:
        _, count, _, first, following = struct.unpack_from("<HHIII", data, at)
        entry = at + first
        for _ in range(count):
            _, _, _, name_at, next_entry = struct.unpack_from("<IHHII", data, entry)
            family, _, number = _string(data, strings + name_at).rpartition("_")
            if family and number.replace(".", "").isdigit():
                parts = tuple(map(int, number.split(".")))
                newest[family] = max(newest.get(family, ()), parts)
            entry += next_entry
        if not following:
            return {family: ".".join(map(str, parts)) for family, parts in newest.items()}
        at += following


def _images(section: bytes) -> Iterator[tuple[int, int]]:
    """Kind and compute capability (times ten) of each image, up to the first of an unknown layout."""
    at = 0
    while at + 16 <= len(section):
        magic, _, header, size = struct.unpack_from("<IHHQ", section, at)
        if magic != _FATBIN_MAGIC or not header:
            at += 8  # padding between the containers of two object files
            continue
        entry, end = at + header, at + header + size
        while entry + 32 <= end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", section, entry)
            (capability,) = struct.unpack_from("<I", section, entry + 28)
            if not entry_header:
                return
            yield kind, capability
            entry += entry_header + entry_size
        at = end


def _string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode("utf-8", "replace")
