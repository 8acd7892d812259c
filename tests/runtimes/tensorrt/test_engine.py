"""An engine and its manifest: nothing is handed to the library that is not what the manifest says."""

import hashlib
import json

import pytest

from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.runtimes.tensorrt import engine as engines
from scconv_deploy.runtimes.tensorrt.engine import (
    EngineLayer,
    EngineManifest,
    EngineProfile,
    EngineSRU,
    EngineTensor,
    load_engine,
    sidecar,
    write_engine,
)


def manifest_of(data, **changes):
    values = {
        "sha256": hashlib.sha256(data).hexdigest(), "file_bytes": len(data), "backend": "tensorrt-rtx",
        "library_version": "1.7.1.116", "target": "sm89,sm120", "compute_capabilities": ("sm89", "sm120"), "gpu": "",
        "flags": ("TF32",), "settings": {"optimization_level": 3},
        "inputs": (EngineTensor("x", "FLOAT", (-1, 3)),), "outputs": (EngineTensor("y", "FLOAT", (-1, 3)),),
        "profiles": (EngineProfile("x", (1, 3), (2, 3), (8, 3)),), "layers": (EngineLayer("c", "CAST", ("HALF",)),),
        "srus": (EngineSRU("s", "expanded", "no plugins", 12),), "plugin_sha256": "", "onnx_sha256": "0" * 64,
        "command": "scconv-deploy build", "warnings": ("one",), "build_seconds": 1.5, "versions": {"python": "3.11"},
    }  # fmt: skip
    return EngineManifest(**values | changes)


DATA = b"vtrt" + bytes(60) + b"plan" * 100


@pytest.fixture
def built(tmp_path):
    return write_engine(tmp_path / "m.engine", DATA, manifest_of(DATA))


def test_a_manifest_is_read_back_as_it_was_written(built):
    assert load_engine(built.path) == built
    assert load_engine(built.path).verified_bytes() == DATA


def test_a_manifest_of_one_profile_without_its_index_is_still_read(built):
    document = json.loads(sidecar(built.path).read_text())
    document.pop("seal")
    del document["profiles"][0]["index"]
    sidecar(built.path).write_text(json.dumps(document | {"seal": engines._seal(document)}))
    assert load_engine(built.path).manifest.profiles == built.manifest.profiles


def test_a_tampered_byte_a_truncated_file_and_a_missing_manifest_are_refused(built):
    changed = bytearray(DATA)
    changed[100] ^= 1
    built.path.write_bytes(changed)
    with pytest.raises(IntegrityError, match="its SHA-256 is"):
        load_engine(built.path)
    with pytest.raises(IntegrityError, match="its SHA-256 is"):
        built.verified_bytes()  # also when it changed after it was loaded
    built.path.write_bytes(DATA[:-7])
    with pytest.raises(IntegrityError, match="has 457 bytes, its manifest says 464"):
        load_engine(built.path)
    built.path.write_bytes(DATA)
    sidecar(built.path).unlink()
    with pytest.raises(IntegrityError, match=r"has no manifest m\.engine\.json"):
        load_engine(built.path)
    with pytest.raises(UsageError, match="does not exist"):
        load_engine(built.path.with_name("other.engine"))


@pytest.mark.parametrize(
    "change",
    [
        {"library_version": "1.6.0.1"},
        {"compute_capabilities": ["sm75"]},
        {"command": "something else"},
        {"flags": []},
    ],
)
def test_an_edited_manifest_is_noticed_by_its_seal(built, change):
    document = json.loads(sidecar(built.path).read_text())
    sidecar(built.path).write_text(json.dumps(document | change))
    with pytest.raises(IntegrityError, match="was edited"):
        load_engine(built.path)


def test_a_sealed_lie_is_held_against_the_plan(tmp_path):
    built = write_engine(tmp_path / "m.engine", DATA, manifest_of(DATA, sha256="0" * 64))
    with pytest.raises(IntegrityError, match="its manifest says 000000000000"):
        load_engine(built.path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"schema_version": 1}', "[" * 100_000, '{"seal": "", "schema_version": 1}'],
)
def test_a_manifest_that_is_none_is_refused(built, text):
    sidecar(built.path).write_text(text)
    with pytest.raises(IntegrityError, match="is damaged or not ours"):
        load_engine(built.path)


@pytest.mark.parametrize(
    "change", [{"file_bytes": "464"}, {"layers": [{"name": "c"}]}, {"flags": "TF32"}, {"unknown": 1}]
)
def test_fields_of_the_wrong_kind_are_refused(built, change):
    document = json.loads(sidecar(built.path).read_text()) | change
    document.pop("seal")
    sidecar(built.path).write_text(json.dumps(document | {"seal": engines._seal(document)}))
    with pytest.raises(IntegrityError, match="is damaged or not ours"):
        load_engine(built.path)


def test_another_schema_is_said_to_be_one(built):
    document = json.loads(sidecar(built.path).read_text()) | {"schema_version": 9}
    sidecar(built.path).write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="schema version 9, expected 1"):
        load_engine(built.path)
