"""The program that finishes a bundle on a device. No torch, no onnx."""
