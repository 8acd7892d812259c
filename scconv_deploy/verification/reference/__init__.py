"""Reference runs of a PyTorch model or an ONNX file, with their noise floors."""
