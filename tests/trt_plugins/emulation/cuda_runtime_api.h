// The part of CUDA's runtime that the kernels' host code uses, for the CPU (emulation.cpp). Under the name of NVIDIA's
// header, so that the sources compile as they are; what is not declared here, they do not call: nothing that allocates,
// copies or synchronises.
#pragma once

#include <cstddef>
#include <cstdint>

enum cudaError_t
{
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
};
enum cudaDeviceAttr
{
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute
{
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
};
using cudaStream_t = struct CUstream_st*;

extern "C" cudaError_t cudaGetDevice(int* device);
extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
