"""The gate: variants, exact cut, margins, recognition. No ONNX."""
