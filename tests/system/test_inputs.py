"""What a process read: contents of folders, opened files, the user's modules, packages."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from scconv_deploy.system import inputs
from scconv_deploy.system.inputs import (
    OpenedFiles,
    code_files,
    digest_of,
    package_digest,
    packages,
    read_files,
    relative,
)


def test_a_folders_digest_is_that_of_its_names_and_contents(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "sub/b").write_text("2")
    first = digest_of(folder)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/a.pyc").write_text("3")
    assert digest_of(folder) == first
    seen = {first}
    for change in (
        lambda: (folder / "a").write_text("2"),
        lambda: (folder / "a").rename(folder / "c"),
        lambda: (folder / "sub/b").rename(folder / "b"),
        lambda: (folder / "new").write_text(""),
    ):
        change()
        seen.add(digest_of(folder))
    assert len(seen) == 5
    assert digest_of(tmp_path / "none") == ""


def test_files_that_python_opens_are_noticed(tmp_path):
    for name in ("text", "before", "rewritten", "gone"):
        (tmp_path / name).write_text("1")
    np.save(tmp_path / "array.npy", np.zeros(2))
    (tmp_path / "before").read_text()
    with OpenedFiles().recording() as opened:
        (tmp_path / "text").read_text()
        np.load(tmp_path / "array.npy")
        (tmp_path / "gone").read_text()
        (tmp_path / "rewritten").read_text()
        (tmp_path / "rewritten").write_text("2")
        Path(np.__file__).read_text()
    (tmp_path / "gone").unlink()
    (tmp_path / "before").read_text()
    assert read_files(opened) == {tmp_path / "text", tmp_path / "array.npy"}


def test_the_users_modules_are_told_from_installed_ones(tmp_path, monkeypatch):
    (tmp_path / "of_the_user.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import of_the_user  # noqa: F401

    assert (tmp_path / "of_the_user.py").resolve() in code_files()
    monkeypatch.delitem(sys.modules, "of_the_user")
    assert not [f for f in code_files() if "site-packages" in f.parts or f.is_relative_to(inputs._OWN)]


def test_packages_are_those_that_were_imported():
    found = packages()
    assert {"numpy", "scconv-deploy"} <= set(found)
    assert "mkdocs" not in found
    assert found["numpy"] == package_digest("numpy") != package_digest("no such package") == ""
    assert found["scconv-deploy"] == digest_of(inputs._OWN)


def test_paths_below_the_current_folder_are_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert relative([tmp_path / "a/b", Path("/c")]) == ["/c", "a/b"]
