"""Verdicts on engines. No onnx: it also runs on the device, which has none."""
