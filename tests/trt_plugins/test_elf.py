"""Reading shared libraries: against libraries compiled for the test, and damaged ones."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess

import pytest

from scconv_deploy.errors import IntegrityError
from scconv_deploy.trt_plugins.elf import SharedLibrary, _images, read_library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("elf")
    source = folder / "one.cpp"
    source.write_text(
        'extern "C" { int puts(const char*); __attribute__((visibility("default"))) int seen() { return puts("x"); }\n'
        '__attribute__((visibility("hidden"))) int unseen() { return 2; } }\n'
    )
    command = ["g++", "-shared", "-fPIC", str(source), "-Wl,-soname,libone.so.3", "-o", str(folder / "libone.so")]
    subprocess.run(command, check=True)
    return folder / "libone.so"


def test_symbols_dependencies_and_versions(library):
    found = read_library(library)
    assert found.soname == "libone.so.3"
    assert "seen" in found.exported
    assert "unseen" not in found.exported | found.undefined
    assert "puts" in found.undefined
    assert "libc.so.6" in found.needed
    assert tuple(map(int, found.versions["GLIBC"].split("."))) >= (2, 2)
    assert (found.cubins, found.ptx) == ((), ())


def test_what_is_no_shared_library_is_refused(library, tmp_path):
    data = library.read_bytes()
    for name, content, reason in (
        ("text", b"#!/bin/sh\n" * 10, "no 64-bit Linux"),
        ("empty", b"", "no 64-bit Linux"),
        ("truncated", data[: len(data) // 2], "damaged"),
        ("object", data[:16] + struct.pack("<H", 1) + data[18:], "no shared library"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match=reason):
            read_library(path)


def test_what_the_loader_maps_must_be_in_the_file(library, tmp_path):
    """The tables are all there, and the second segment is said to go on one byte beyond the file."""
    data = bytearray(library.read_bytes())
    (start,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    loaded = [start + i * size for i in range(count) if struct.unpack_from("<I", data, start + i * size) == (1,)]
    (offset,) = struct.unpack_from("<Q", data, loaded[1] + 8)
    path = tmp_path / "long.so"
    for beyond in (0, 1):
        struct.pack_into("<Q", data, loaded[1] + 32, len(data) - offset + beyond)
        path.write_bytes(data)
        if beyond:
            with pytest.raises(IntegrityError, match="is damaged: its ELF structure ends early"):
                read_library(path)
        else:
            assert "seen" in read_library(path).exported


def test_images_of_a_fat_binary():
    def entry(kind, capability, payload):
        return struct.pack("<HHIQ", kind, 0x101, 64, len(payload)).ljust(28, b"\0") + struct.pack(
            "<I", capability
        ) + b"\0" * 32 + payload  # fmt: skip

    entries = entry(2, 87, b"a" * 40) + entry(2, 120, b"b" * 8) + entry(1, 120, b"c" * 16)
    container = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    assert list(_images(container + b"\0" * 8 + container)) == [(2, 87), (2, 120), (1, 120)] * 2
    assert list(_images(b"something else" * 4)) == []
    broken = struct.pack("<IHHQ", 0xBA55ED50, 1, 0, 0)  # a container of no size must not stop the reader for ever
    assert list(_images(broken + container)) == [(2, 87), (2, 120), (1, 120)]


def test_a_damaged_library_is_refused_or_read_and_never_more(library):
    """Bytes changed at random, most of them in the headers: one error of ours, or an answer, in any case soon."""
    data, generator = library.read_bytes(), random.Random(0)
    (start,) = struct.unpack_from("<Q", data, 40)
    path, refused = library.with_name("damaged.so"), 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 6)):
            at = generator.choice(
                [generator.randrange(64), generator.randrange(start, len(data)), generator.randrange(len(data))]
            )
            damaged[at] = generator.randrange(256)
        path.write_bytes(damaged[: generator.choice([len(data), generator.randrange(len(data))])])
        try:
            read_library(path)
        except IntegrityError:
            refused += 1
    assert 100 < refused < 400


CAPABILITIES = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0", "12.1")


@pytest.mark.parametrize(
    ("cubins", "ptx", "served", "words"),
    [
        (("8.0",), (), ("8.0", "8.6", "8.7", "8.9"), "machine code for 8.0, no PTX for newer GPUs"),
        (("8.6", "12.0"), (), ("8.6", "8.7", "8.9", "12.0", "12.1"),
         "machine code for 8.6, 12.0, no PTX for newer GPUs"),
        (("7.5", "9.0"), ("7.5", "9.0"), CAPABILITIES,
         "machine code for 7.5, 9.0, PTX 7.5, 9.0 for every GPU from 7.5"),
        (("8.0", "12.0"), ("12.0",), ("8.0", "8.6", "8.7", "8.9", "12.0", "12.1"),
         "machine code for 8.0, 12.0, PTX 12.0 for every GPU from 12.0"),
        ((), ("9.0", "10.0"), CAPABILITIES[5:], "machine code for none, PTX 9.0, 10.0 for every GPU from 9.0"),
        ((), (), (), "machine code for none, no PTX for newer GPUs"),
    ],
)  # fmt: skip
def test_which_gpus_the_code_serves(cubins, ptx, served, words):
    """The CUDA C++ Programming Guide's rules of binary and PTX compatibility."""
    found = SharedLibrary("x86-64", "", (), frozenset(), frozenset(), {}, cubins, ptx)
    assert tuple(filter(found.serves, CAPABILITIES)) == served
    assert found.code == words
