"""Verdicts on engines. No onnx: the device has none."""
