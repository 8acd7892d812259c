"""Bundles: folder, manifest, reference, and the program that finishes them on a device. No torch, no onnx."""
