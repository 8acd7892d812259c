// The part of CUDA's runtime that the kernels' host code uses, for the CPU (emulation.cpp). Under the name of NVIDIA's
// header, so that the sources compile as they are; what is not declared here, they do not call: nothing that allocates,
// copies or synchronises. Values are NVIDIA's, which a test compares.
#pragma once

#include <cstddef>
#include <cstdint>

enum cudaError_t
{
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorNotSupported = 801,
    cudaErrorInvalidClusterSize = 912,
};
enum cudaDeviceAttr
{
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute
{
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
};
enum cudaLaunchAttributeID
{
    cudaLaunchAttributeClusterDimension = 4,
};
using cudaStream_t = struct CUstream_st*;

struct dim3
{
    constexpr dim3(unsigned x_count = 1, unsigned y_count = 1, unsigned z_count = 1)
        : x(x_count)
        , y(y_count)
        , z(z_count)
    {
    }
    unsigned x, y, z;
};
struct cudaFuncAttributes
{
    int ptxVersion;
    int binaryVersion;
};
union cudaLaunchAttributeValue
{
    char pad[64];
    struct
    {
        unsigned x, y, z;
    } clusterDim;
};
struct cudaLaunchAttribute
{
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t
{
    dim3 gridDim;
    dim3 blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

extern "C" {

cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel, const cudaLaunchConfig_t* config);

} // extern "C"
