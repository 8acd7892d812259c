"""TensorRT and TensorRT-RTX at run time: engines, versions, plugin libraries, CUDA."""
