// What device code is written in: threads of a block as fibers that meet at barriers and shuffles (threads.cpp).
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// no __shared__: a block has no shared memory but intrinsics.cuh's dynamic_shared()

struct Index
{
    unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4
{
    float x, y, z, w;
};
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

// mask: all lanes, always
void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);

namespace emulation {

unsigned lane();
// Every lane of a warp gives a value and takes one.
uint32_t exchange(unsigned mask, uint32_t value, unsigned from);

template <typename T>
T exchanged(unsigned mask, T value, unsigned from)
{
    static_assert(sizeof(T) == sizeof(uint32_t));
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    bits = exchange(mask, bits, from);
    std::memcpy(&value, &bits, sizeof(bits));
    return value;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);

} // namespace emulation

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset)
{
    return emulation::exchanged(mask, value, emulation::lane() ^ static_cast<unsigned>(offset));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from)
{
    return emulation::exchanged(mask, value, static_cast<unsigned>(from) % 32);
}

template <typename T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value)
{
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <typename T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T* kernel)
{
    return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}

// Kernels take one struct by value, of this name; complete where a kernel is launched.
namespace scconv {
struct KernelParams;
}

template <typename Params = scconv::KernelParams>
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments)
{
    const auto function = reinterpret_cast<void (*)(Params)>(reinterpret_cast<uintptr_t>(kernel));
    return emulation::launch(*config, kernel, [=] { function(*static_cast<const Params*>(arguments[0])); });
}
