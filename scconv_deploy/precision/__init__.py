"""Convert ONNX models to half precision: float16 or bfloat16 for the data, float32 for the gates."""
