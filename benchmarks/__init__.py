"""Benchmarks: one harness, one file a question. ``python -m benchmarks`` lists them."""
