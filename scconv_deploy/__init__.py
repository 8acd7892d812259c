"""Take PyTorch models with ScConv in them to ONNX, and prove that the artifact computes what PyTorch computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
