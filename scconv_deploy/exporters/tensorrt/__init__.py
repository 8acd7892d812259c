"""Build engines with TensorRT and TensorRT-RTX: options, targets, profiles, network, build and cache."""
