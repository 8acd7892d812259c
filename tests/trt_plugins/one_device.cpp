// As much of CUDA's runtime as an H200 answers before anything is launched, for a plugin without kernels (no_device.cpp).
#include <cstdio>

#include <cuda_runtime_api.h>

extern "C" {

cudaError_t cudaGetDevice(int* device)
{
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int)
{
    switch (attribute)
    {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = 132; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; return cudaSuccess;
    default: return cudaErrorInvalidValue;
    }
}
const char* cudaGetErrorString(cudaError_t status)
{
    static char text[16];
    std::snprintf(text, sizeof(text), "error %d", static_cast<int>(status));
    return text;
}
cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}
}
