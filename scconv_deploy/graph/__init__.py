"""The operator contract and ONNX files."""
