"""The program that a bundle runs on the device. No torch, no onnx."""
