"""Export to ONNX, and build engines of TensorRT and TensorRT-RTX."""
