"""The fused SRU for TensorRT and PyTorch: sources in ``sru``; build, check and binding."""
