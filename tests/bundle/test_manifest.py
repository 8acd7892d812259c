"""The seal: what it covers, and what breaks it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from scconv_deploy.bundle.manifest import (
    MANIFEST,
    check_bundle,
    differing_files,
    extra_files,
    manifest_bytes,
    read_manifest,
)
from scconv_deploy.errors import IntegrityError, UsageError


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    (folder / "reference").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"model")
    (folder / "reference" / "inputs.npz").write_bytes(bytes(3 << 20))
    (folder / MANIFEST).write_bytes(manifest_bytes(folder, {"command": "deploy", "verdict": "passed"}))
    return folder


def changed(folder):
    return differing_files(folder, read_manifest(folder))


def test_the_manifest_names_every_file_but_itself(bundle):
    manifest = read_manifest(bundle)
    assert manifest["command"] == "deploy"
    assert manifest["schema_version"] == 1
    assert manifest["files"] == {
        "model.onnx": {"sha256": hashlib.sha256(b"model").hexdigest(), "bytes": 5},
        "reference/inputs.npz": {"sha256": hashlib.sha256(bytes(3 << 20)).hexdigest(), "bytes": 3 << 20},
    }
    assert changed(bundle) == ()


def test_equal_folders_have_equal_seals(bundle):
    facts = {"verdict": "passed", "command": "deploy"}  # in another order
    assert manifest_bytes(bundle, facts) == (bundle / MANIFEST).read_bytes()
    (bundle / "model.onnx").write_bytes(b"other")
    assert manifest_bytes(bundle, facts) != (bundle / MANIFEST).read_bytes()


def test_changed_missing_and_extra_files(bundle):
    (bundle / "model.onnx").write_bytes(b"mode1")
    assert changed(bundle) == ("model.onnx",)
    (bundle / "reference" / "inputs.npz").unlink()
    (bundle / "plugin.so").write_bytes(b"")
    (bundle / "reference" / "more").mkdir()
    (bundle / "reference" / "more" / "x").write_bytes(b"")
    (bundle / "gone").symlink_to("nowhere")
    assert changed(bundle) == ("gone", "model.onnx", "plugin.so", "reference/inputs.npz", "reference/more/x")
    assert extra_files(bundle, read_manifest(bundle)) == ("gone", "plugin.so", "reference/more/x")


def test_a_folder_in_a_files_place(bundle):
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").mkdir()
    assert changed(bundle) == ("model.onnx",)


@pytest.mark.parametrize("name", ["model.onnx", "reference/inputs.npz", MANIFEST])
@pytest.mark.parametrize("kind", ["symbolic link", "hard link out of the bundle"])
def test_a_link_to_identical_bytes_is_refused(bundle, name, kind):
    outside = bundle.parent / "outside"
    shutil.copy(bundle / name, outside)
    (bundle / name).unlink()
    if kind == "symbolic link":
        (bundle / name).symlink_to(outside)
    else:
        (bundle / name).hardlink_to(outside)
    with pytest.raises(IntegrityError, match=rf"{name} is a {kind}, expected a plain file"):
        check_bundle(bundle)
    outside.unlink()
    if kind != "symbolic link":  # now the name in the bundle is the only one
        assert check_bundle(bundle)


def test_a_folder_that_is_a_symbolic_link_is_refused(bundle):
    (bundle / "reference").rename(bundle.parent / "elsewhere")
    (bundle / "reference").symlink_to(bundle.parent / "elsewhere")
    with pytest.raises(IntegrityError, match=r"reference/inputs\.npz is a symbolic link"):
        check_bundle(bundle)


def test_links_within_a_bundle_and_to_it_are_its_own(bundle):
    """Deduplicated, and found by another name."""
    (bundle / "same.onnx").hardlink_to(bundle / "model.onnx")
    (bundle / MANIFEST).write_bytes(manifest_bytes(bundle, {}))
    assert check_bundle(bundle)
    (bundle.parent / "latest").symlink_to(bundle)
    assert check_bundle(bundle.parent / "latest")


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", "\xff", "{}", '{"files": []}', '{"files": {"a": 3}}', '{"files": {"a": {}}}',
        '{"files": {"a": {"sha256": 3}}}', "[" * 100_000, '{"manifest_version": 3, "name": "A browser extension"}',
    ],
)  # fmt: skip
def test_a_damaged_manifest(bundle, text):
    (bundle / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged or not ours") as caught:
        read_manifest(bundle)
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_points_outside(bundle, name):
    (bundle / MANIFEST).write_text(json.dumps({"files": {name: {"sha256": "0"}}}))
    with pytest.raises(IntegrityError, match="lies outside the bundle"):
        read_manifest(bundle)


def test_a_folder_without_a_manifest(tmp_path):
    with pytest.raises(UsageError, match="is not a bundle: it has no manifest"):
        read_manifest(tmp_path)
    with pytest.raises(UsageError, match=r"nowhere does not exist\. Check the path"):
        read_manifest(Path("nowhere"))
