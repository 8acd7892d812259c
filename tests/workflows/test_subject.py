"""What a MODEL or ARTIFACT names, by its form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import scconv_deploy
from scconv_deploy.errors import UsageError
from scconv_deploy.workflows.subject import Bundle, Engine, Model, OnnxFile, artifact_of, subject_of
from tests.command_line import failed, run
from tests.exporters.tensorrt.engines import conv_model, save


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("scconv_resnet50", Model),
        ("package.module:make", Model),
        ("folder/net.py:make", Model),
        ("best.pt", Model),
        ("model.onnx", OnnxFile),
        ("model.onnx.rejected", OnnxFile),
        ("model.engine", Engine),
        ("model.engine.rejected", Engine),
        ("folder", Bundle),
        ("folder.onnx", Bundle),
    ],
)
def test_a_text_is_told_by_its_form(tmp_path, monkeypatch, text, kind):
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "folder.onnx"):
        Path(folder).mkdir()
    assert type(subject_of(text)) is kind
    if kind is not Model:
        assert subject_of(text) == artifact_of(Path(text)) == kind(Path(text))


def test_where_only_an_artifact_can_be_meant_any_name_is_an_onnx_file():
    assert artifact_of(Path("network.bin")) == OnnxFile(Path("network.bin"))


def test_a_rejected_file_is_no_reference(tmp_path):
    save(conv_model(), tmp_path / "m.onnx")
    save(conv_model(), tmp_path / "m.onnx.rejected")
    result = run("verify", tmp_path / "m.onnx", "--reference", tmp_path / "m.onnx.rejected", "--input", "1x3x8x8")
    failed(result, 2, "m.onnx.rejected is an artifact, expected a model")


def test_the_python_api_says_that_an_engine_is_for_the_command_line():
    with pytest.raises(UsageError, match=r"m\.engine is an engine, expected an ONNX file or a bundle\. Use scconv-dep"):
        scconv_deploy.verify("m.engine", nn.Identity(), torch.zeros(1))
