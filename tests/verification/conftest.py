"""Artifacts of the small networks, for the tests of the verdict."""

from __future__ import annotations

import onnx
import pytest
import torch

from scconv_deploy.exporters.onnx import serialize
from scconv_deploy.exporting import ExportOptions, export_to_ir
from scconv_deploy.references import reference_from_module
from tests.mutations import two_heads


@pytest.fixture
def model(tiny_bytes):
    """TinyNet's artifact, a copy of its own for each test."""
    return onnx.load_model_from_string(tiny_bytes[0])


@pytest.fixture(scope="session")
def exported():
    """(reference, bytes of its model.onnx): a small ScConv-ResNet with two heads, one block a stage, 16x16."""
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reference, log = reference_from_module(two_heads(1, 16), image)
    return reference, serialize(export_to_ir(reference, ExportOptions(), log))
