"""Whole or not at all: no half file, nothing lost, nothing left behind."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest

from scconv_deploy.bundle.folder import check_output_folder, new_folder
from scconv_deploy.bundle.manifest import MANIFEST, manifest_bytes
from scconv_deploy.errors import UsageError
from scconv_deploy.system.atomic import check_output_file, write_file


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder="."):
    """Every file below a folder, its text, and every empty folder."""
    found = sorted(Path(folder).rglob("*"))
    return {str(p): p.read_text() if p.is_file() else "" for p in found if p.is_file() or not any(p.iterdir())}


def make_bundle(folder, text="old"):
    folder = Path(folder)
    folder.mkdir()
    (folder / "model.onnx").write_text(text)
    (folder / MANIFEST).write_bytes(manifest_bytes(folder, {}))
    return folder


def failing(monkeypatch, function, error, calls=(1,)):
    """Let some calls of os.<function> raise."""
    real, count = getattr(os, function), [0]

    def replacement(*args, **kwargs):
        count[0] += 1
        if count[0] in calls:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(os, function, replacement)


READ_ONLY = OSError(errno.EROFS, "Read-only file system")


def refuses(words, function, *args):
    before = content()
    with pytest.raises(UsageError) as caught:
        function(*args)
    assert words in caught.value.message
    assert caught.value.remedy
    assert content() == before
    return caught.value


# --- files ------------------------------------------------------------------------------------------------------


def test_write_a_file():
    umask = os.umask(0o027)
    try:
        write_file(Path("deep/er/model.onnx"), b"new")
    finally:
        os.umask(umask)
    assert content() == {"deep/er/model.onnx": "new"}
    assert stat.S_IMODE(os.stat("deep/er/model.onnx").st_mode) == 0o640


def test_replace_a_file():
    Path("model.onnx").write_text("old")
    write_file(Path("model.onnx"), b"new")
    assert content() == {"model.onnx": "new"}


def test_a_reader_of_the_old_file_keeps_it():
    Path("model.onnx").write_text("old")
    with open("model.onnx") as reader:
        write_file(Path("model.onnx"), b"new")
        assert reader.read() == "old"


def test_a_symbolic_link_stays_one():
    Path("releases").mkdir()
    Path("releases/3.onnx").write_text("old")
    Path("latest.onnx").symlink_to("releases/3.onnx")
    write_file(Path("latest.onnx"), b"new")
    assert Path("latest.onnx").is_symlink()
    assert Path("releases/3.onnx").read_text() == "new"
    assert len(list(Path("releases").iterdir())) == 1


def test_a_name_as_long_as_names_can_be():
    name = "n" * 250 + ".onnx"
    check_output_file(Path(name), force=False)
    write_file(Path(name), b"new")
    assert content() == {name: "new"}


@pytest.mark.parametrize("function", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("error", [READ_ONLY, OSError(errno.ENOSPC, "No space left on device")])
def test_a_write_that_fails_leaves_the_old_file(monkeypatch, function, error):
    Path("model.onnx").write_text("old")
    failing(monkeypatch, function, error)
    refuses(f"model.onnx cannot be written: {error.strerror}", write_file, Path("model.onnx"), b"new")


@pytest.mark.parametrize("function", ["replace", "fsync", "chmod"])
def test_a_write_that_is_interrupted(monkeypatch, function):
    Path("model.onnx").write_text("old")
    failing(monkeypatch, function, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write_file(Path("model.onnx"), b"new")
    assert content() == {"model.onnx": "old"}


def test_no_temporary_file_can_be_made(monkeypatch):
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(READ_ONLY))
    refuses("cannot be written: Read-only", write_file, Path("model.onnx"), b"new")


def test_below_a_regular_file():
    Path("file").write_text("mine")
    for check in (check_output_file, check_output_folder):
        refuses("is not a folder", check, Path("file/deep/model.onnx"), True)
    refuses("cannot be written", write_file, Path("file/model.onnx"), b"new")


@pytest.mark.parametrize("check", [check_output_file, check_output_folder])
def test_places_that_cannot_be_written(check):
    refuses("File name too long", check, Path("n" * 300), True)
    refuses("cannot be written", check, Path("/proc/model"), True)


def test_an_output_file_that_exists():
    Path("model.onnx").write_text("old")
    assert "--force" in refuses("model.onnx exists", check_output_file, Path("model.onnx"), False).remedy
    check_output_file(Path("model.onnx"), True)
    Path("folder").mkdir()
    assert "folder/model.onnx" in refuses("is a folder", check_output_file, Path("folder"), True).remedy


@pytest.mark.parametrize("path", ["/dev/null", "pipe"])
def test_what_is_no_regular_file_is_never_replaced(path):
    if path == "pipe":
        os.mkfifo(path)
    with pytest.raises(UsageError, match="is no regular file"):
        check_output_file(Path(path), True)


def test_checks_write_nothing():
    check_output_file(Path("new/model.onnx"), False)
    check_output_folder(Path("new/bundle"), False)
    assert content() == {}


# --- folders ----------------------------------------------------------------------------------------------------


def fill(folder, error=None):
    with new_folder(Path(folder)) as temporary:
        (temporary / "model.onnx").write_text("new")
        if error is not None:
            raise error


def test_write_a_folder():
    umask = os.umask(0o027)
    try:
        fill("deep/bundle")
    finally:
        os.umask(umask)
    assert content() == {"deep/bundle/model.onnx": "new"}
    assert stat.S_IMODE(os.stat("deep/bundle").st_mode) == 0o750


def test_replace_a_bundle_and_an_empty_folder():
    make_bundle("bundle")
    Path("empty").mkdir()
    for name in ("bundle", "empty"):
        check_output_folder(Path(name), force=name == "bundle")
        fill(name)
    assert content() == {"bundle/model.onnx": "new", "empty/model.onnx": "new"}


def test_a_link_to_a_bundle_stays_one():
    make_bundle("bundle")
    Path("latest").symlink_to("bundle")
    fill("latest")
    assert Path("latest").is_symlink()
    assert content("bundle") == {"bundle/model.onnx": "new"}


@pytest.mark.parametrize("error", [ValueError("in the block"), FileNotFoundError("too"), KeyboardInterrupt()])
def test_a_block_that_fails(error):
    make_bundle("bundle")
    before = content()
    for name in ("bundle", "other"):
        with pytest.raises(type(error)):
            fill(name, error)
    assert content() == before


@pytest.mark.parametrize("calls", [(1,), (2,)])
@pytest.mark.parametrize("error", [READ_ONLY, KeyboardInterrupt()])
def test_a_replacement_that_fails_keeps_the_old_bundle(monkeypatch, calls, error):
    make_bundle("bundle")
    before = content()
    failing(monkeypatch, "replace", error, calls)
    with pytest.raises((UsageError, KeyboardInterrupt)) as caught:
        fill("bundle")
    assert content() == before
    if error is READ_ONLY:
        assert caught.value.message == "bundle cannot be written: Read-only file system."


def test_a_replacement_that_cannot_be_undone_still_deletes_nothing(monkeypatch):
    make_bundle("bundle", "precious")
    failing(monkeypatch, "replace", READ_ONLY, calls=(2, 3))
    with pytest.raises(UsageError):
        fill("bundle")
    assert "precious" in content().values()


def test_no_temporary_folder_can_be_made(monkeypatch):
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(READ_ONLY))
    refuses("bundle cannot be written: Read-only", fill, "bundle")


def test_a_bundle_that_exists():
    make_bundle("bundle")
    assert "--force" in refuses("bundle exists", check_output_folder, Path("bundle"), False).remedy
    check_output_folder(Path("bundle"), True)


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_bundle_is_never_replaced(force):
    Path("file").write_text("mine")
    refuses("is a file, expected a folder", check_output_folder, Path("file"), force)
    Path("folder").mkdir()
    Path("folder/thesis.tex").write_text("mine")
    refuses("exists and is not a bundle", check_output_folder, Path("folder"), force)
    # a browser extension has a manifest.json too
    Path("folder/manifest.json").write_text('{"manifest_version": 3}')
    refuses("exists and is not a bundle", check_output_folder, Path("folder"), force)
    make_bundle("bundle")
    Path("bundle/thesis.tex").write_text("mine")
    refuses("holds more than the bundle: thesis.tex", check_output_folder, Path("bundle"), force)
    refuses("is the current folder", check_output_folder, Path(), force)
    refuses("is the current folder", check_output_folder, Path.cwd(), force)


def test_a_bundle_whose_files_changed_is_still_one():
    make_bundle("bundle")
    Path("bundle/model.onnx").write_text("edited")
    check_output_folder(Path("bundle"), True)
