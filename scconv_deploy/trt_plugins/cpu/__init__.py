"""The fused SRU on the CPU: its library for ONNX Runtime and PyTorch, built, bound and checked."""
