"""ONNX: the operator contract, and reading, checking and changing files."""
