// What device code is written in: threads of a block as fibers that meet at barriers and shuffles.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// one block runs at a time, so that a static variable is one of the block; `extern __shared__` becomes `extern` before
#define __shared__ static

struct dim3
{
    explicit dim3(unsigned count)
        : x(count)
    {
    }
    unsigned x;
};
struct Index
{
    unsigned x;
};
extern Index threadIdx, blockIdx, blockDim;

struct alignas(16) uint4
{
    unsigned x, y, z, w;
};
struct alignas(8) uint2
{
    unsigned x, y;
};
using std::min;

template <typename T>
T __ldg(const T* at)
{
    return *at;
}

void __syncthreads();
float __shfl_xor_sync(unsigned mask, float value, int offset);

namespace emulation {

cudaError_t permit_shared(const void* kernel, int bytes);
cudaError_t launch(
    const void* kernel, unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& thread);

} // namespace emulation

template <typename Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params), cudaFuncAttribute, int value)
{
    return emulation::permit_shared(reinterpret_cast<const void*>(kernel), value);
}

template <typename Params>
cudaError_t cudaLaunchKernel(
    void (*kernel)(Params), dim3 blocks, dim3 threads, void** arguments, size_t shared_bytes, cudaStream_t)
{
    return emulation::launch(reinterpret_cast<const void*>(kernel), blocks.x, threads.x, shared_bytes,
        [=] { kernel(*static_cast<const Params*>(arguments[0])); });
}
