"""TensorRT and TensorRT-RTX at run time: engines, versions, libraries of plugins, CUDA."""
