"""Verdicts on ONNX files: run on the reference samples, masks injected, gates compared."""
