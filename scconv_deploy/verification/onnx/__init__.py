"""Verdicts on ONNX files: run on the reference samples, gates compared, masks injected."""
