"""What a file is, is said at once, and no remedy is named that would not work."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scconv_deploy.errors import IntegrityError, ModelError, UntrustedError, UsageError
from scconv_deploy.model.load import load
from scconv_deploy.model.spec import ModelSpec, source_kind
from scconv_deploy.model.weights import read_weights
from scconv_deploy.model.weights_load import load_weights


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def net():
    return nn.Conv2d(3, 4, 3).eval()


def scripted(path):
    torch.jit.script(net()).save(path)


def traced(path):
    torch.jit.trace(net(), torch.ones(1, 3, 8, 8)).save(path)


def exported(path):
    torch.export.save(torch.export.export(net(), (torch.ones(1, 3, 8, 8),)), "program.pt2")
    Path("program.pt2").rename(path)


def an_onnx(path):
    text = '<ir_version: 10, opset_import: ["": 18]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    Path(path).write_bytes(onnx.parser.parse_model(text).SerializeToString())


def archive_of(names):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "x")

    return write


def an_npz(path):
    np.savez("arrays.npz", a=np.ones(3))
    Path("arrays.npz").rename(path)


def a_tar(path):
    Path("inner").write_text("x")
    with tarfile.open(path, "w") as archive:
        archive.add("inner")


def text(words):
    return lambda path: Path(path).write_text(words)


def data(start):
    return lambda path: Path(path).write_bytes(start + bytes(range(256)) * 4)


def saved(value):
    return lambda path: torch.save(value, path)


def cut(write, keep):
    def cut_file(path):
        write(path)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: int(len(whole) * keep)])

    return cut_file


def compressed(path):
    buffer = io.BytesIO()
    torch.save(net().state_dict(), buffer)
    Path(path).write_bytes(gzip.compress(buffer.getvalue()))


def shard_index(path):
    Path(path).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {"weight": "a.safetensors"}}))


NO_PYTORCH = [
    (an_npz, "a NumPy archive (.npz)"),
    (data(b"\x93NUMPY\x01\x00"), "a NumPy array"),
    (data(b"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
    (data(b"GGUF"), "a GGUF file"),
    (data(b"\x1c\0\0\0TFL3"), "a TensorFlow Lite model"),
    (archive_of(["metadata.json", "config.json", "model.weights.h5"]), "a Keras model"),
    (archive_of(["a/saved_model.pb", "a/variables/variables.index"]), "a zip archive (of a/saved_model.pb"),
    (text("<!DOCTYPE html>\n<html><body>Sign in</body></html>"), "a web page"),
    (text("\n\n  <html><head></head></html>"), "a web page"),
    (text('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'), "a web page"),
    (text('{"error": "Repository not found"}'), "JSON text"),
    (shard_index, "the index of weights in several files"),
    (a_tar, "a tar archive: unpack it first"),
    (compressed, "a gzip archive: unpack it first"),
    (cut(saved({"weight": torch.ones(4, 3, 3, 3)}), 0.5), "damaged"),
    (cut(scripted, 0.7), "damaged"),
]


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(("write", "words"), NO_PYTORCH)
def test_what_is_no_pytorch_file(write, words, trust):
    write("w.pt")
    for use in (
        lambda: load(ModelSpec("w.pt", trust_checkpoint=trust)),
        lambda: load_weights(net(), read_weights(Path("w.pt"), trust), "Net"),
    ):
        with pytest.raises(IntegrityError) as error:
            use()
        assert words in error.value.message
        assert "w.pt" in error.value.message
        assert "--trust-checkpoint" not in str(error.value)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    ("write", "kind", "words", "way"),
    [
        (scripted, ModelError, "is a TorchScript archive", "dynamo=False"),
        (traced, ModelError, "is a TorchScript archive", "scconv-deploy rewrite"),
        (exported, ModelError, "is an exported program", "torch.export.load"),
        (an_onnx, UsageError, "is an ONNX file", "scconv-deploy rewrite"),
        (saved(net().state_dict()), UsageError, "holds weights, not a module", "--weights m.pt"),
        (saved({"epoch": 1, "model": net().state_dict()}), UsageError, "holds weights, not a module", "--weights m.pt"),
        (saved({"args": argparse.Namespace(a=1), "model": net().state_dict()}), UsageError, "holds weights", "m.pt"),
        (saved({"loss": np.float64(1), "model": net().state_dict()}), UsageError, "holds weights", "--weights m.pt"),
        (lambda path: save_file(net().state_dict(), path), UsageError, "holds weights, not a module", "--weights m.pt"),
    ],
)  # fmt: skip
def test_what_is_no_model(write, kind, words, way, trust):
    write("m.pt")
    with pytest.raises(kind) as error:
        load(ModelSpec("m.pt", trust_checkpoint=trust))
    assert type(error.value) is kind
    assert words in error.value.message
    assert way in error.value.remedy


@pytest.mark.parametrize(
    ("write", "kind", "words", "way"),
    [
        (scripted, ModelError, "is a TorchScript archive, not a state dict", "torch.jit.load('w.pt').state_dict()"),
        (exported, ModelError, "is an exported program", "torch.export.load('w.pt').state_dict"),
        (an_onnx, UsageError, "is an ONNX file, not a state dict", "torch.save"),
    ],
)
def test_what_is_no_weights(write, kind, words, way):
    write("w.pt")
    with pytest.raises(kind) as error:
        load_weights(net(), read_weights(Path("w.pt")), "Net")
    assert words in error.value.message
    assert way in error.value.remedy


def test_the_ways_that_are_named_work():
    model = net()
    torch.jit.script(model).save("s.pt")
    torch.save(torch.jit.load("s.pt").state_dict(), "weights.pt")
    again = net()
    load_weights(again, read_weights(Path("weights.pt")), "Net")
    assert torch.equal(again.weight, model.weight)


def test_a_module_still_needs_trust():
    torch.save({"model": net(), "tensor": torch.ones(1)}, "m.pt")
    with pytest.raises(UntrustedError, match="--trust-checkpoint"):
        load(ModelSpec("m.pt"))


@pytest.mark.parametrize("name", ["m.pth.tar", "m.pt2", "m.pkl", "m.model", "m"])
def test_the_content_makes_a_checkpoint(name):
    torch.save(net().state_dict(), name)
    assert source_kind(name) == "checkpoint"
    with pytest.raises(UsageError, match="holds weights, not a module"):
        load(ModelSpec(name))


def test_modules_that_differ():
    first, second = net(), net()
    torch.save({"model": first, "ema": second, "criterion": nn.ReLU()}, "m.pt")
    with pytest.raises(UsageError, match="2 modules that differ: model, ema") as error:
        load(ModelSpec("m.pt", trust_checkpoint=True))
    assert "--weights-key ema" in error.value.remedy
    assert torch.equal(load(ModelSpec("m.pt", trust_checkpoint=True, weights_key="ema")).weight, second.weight)
    torch.save({"model": first, "ema": first, "best": None}, "m.pt")
    assert torch.equal(load(ModelSpec("m.pt", trust_checkpoint=True)).weight, first.weight)
