// What the kernels share: data types, vectors, reductions over a block, parameters.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernel_params.h"

namespace scconv {

__device__ __forceinline__ float to_float(float value)
{
    return value;
}
__device__ __forceinline__ float to_float(__half value)
{
    return __half2float(value);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 value)
{
    return __bfloat162float(value);
}

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value)
{
    return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value)
{
    return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value)
{
    return __float2bfloat16_rn(value);
}

template <typename T>
struct RoundTo
{
    __device__ __forceinline__ float operator()(float value) const
    {
        return to_float(from_float<T>(value));
    }
};

// V elements that are loaded and stored at once.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector
{
    T lane[V];
};

// A vector as it lies in memory. What waits in registers waits like this: held as elements, bfloat16 took a register each
// and the on-chip kernel spilled (216 bytes on sm_90).
template <int bytes>
struct RawOf;
template <>
struct RawOf<16>
{
    using type = uint4;
};
template <>
struct RawOf<8>
{
    using type = uint2;
};
template <>
struct RawOf<4>
{
    using type = uint32_t;
};
template <>
struct RawOf<2>
{
    using type = uint16_t;
};
template <typename T, int V>
using Raw = typename RawOf<static_cast<int>(sizeof(T)) * V>::type;

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> unpack(const Raw<T, V>& raw)
{
    Vector<T, V> value;
    memcpy(&value, &raw, sizeof(value));
    return value;
}

template <typename T, int V>
__device__ __forceinline__ Raw<T, V> pack(const Vector<T, V>& value)
{
    Raw<T, V> raw;
    memcpy(&raw, &value, sizeof(raw));
    return raw;
}

// One parameter of a channel, whichever type the parameters have.
template <typename T>
__device__ __forceinline__ float parameter(const void* values, uint32_t channel, bool is_float)
{
    return is_float ? __ldg(static_cast<const float*>(values) + channel)
                    : to_float(static_cast<const T*>(values)[channel]);
}

template <typename T, Operator op>
__device__ __forceinline__ Channel load_channel(const KernelParams& p, uint32_t channel, const Group& group)
{
    const float cut = parameter<T>(p.cut, channel, p.parameters_are_float);
    const float sign = parameter<T>(p.sign, channel, p.parameters_are_float);
    if constexpr (op == Operator::kSru)
        return prepare_channel<op>(group, cut, sign, 0.0f, 0.0f);
    const float first = parameter<T>(p.first, channel, p.parameters_are_float);
    const float second = parameter<T>(p.second, channel, p.parameters_are_float);
    return prepare_channel<op>(group, cut, sign, first, second);
}

// Sums over the block of K values each; every thread returns them. scratch: 32 * K floats, not in use.
template <int K>
struct Sums
{
    float value[K];
};

template <int K>
__device__ __forceinline__ void reduce_warp(Sums<K>& sums)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
        for (int k = 0; k < K; ++k)
            sums.value[k] = add(sums.value[k], __shfl_xor_sync(0xffffffffu, sums.value[k], offset));
}

template <int K>
__device__ __forceinline__ void reduce_block(Sums<K>& sums, float* scratch)
{
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    reduce_warp(sums);
    if (lane == 0)
#pragma unroll
        for (int k = 0; k < K; ++k)
            scratch[warp * K + k] = sums.value[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k)
        sums.value[k] = lane < warps ? scratch[lane * K + k] : 0.0f;
    reduce_warp(sums);
}

// The sum of a vector's elements, by halves.
template <int V>
__device__ __forceinline__ float sum_of(const float* value)
{
    if constexpr (V == 1)
        return value[0];
    else
        return add(sum_of<V / 2>(value), sum_of<V / 2>(value + V / 2));
}

// Elements of a group as vectors at multiples of V in the sample: `phase` elements of the first one lie before it.
struct Span
{
    uint32_t phase;
    uint32_t length;
    uint32_t vectors;

    template <int V>
    __device__ static Span of(int64_t start, uint32_t length)
    {
        const uint32_t phase = static_cast<uint32_t>(start % V);
        return {phase, length, (phase + length + V - 1) / V};
    }
    // unsigned: what lies before the group wraps to a large number
    __device__ __forceinline__ uint32_t element(uint32_t vector, int lane, int width) const
    {
        return vector * width + lane - phase;
    }
    __device__ __forceinline__ bool inside(uint32_t element) const
    {
        return element < length;
    }
    __device__ __forceinline__ bool whole(uint32_t vector, int width) const
    {
        return inside(element(vector, 0, width)) && inside(element(vector, width - 1, width));
    }
};

// Both halves' outputs of the elements whose channels cross.
template <typename T, Operator op>
__device__ __forceinline__ void cross(T& lower, T& upper, const Group& lower_group, const Group& upper_group,
    const Channel& lower_channel, const Channel& upper_channel)
{
    const Parts a = split<op>(to_float(lower), lower_group.mean, lower_channel, RoundTo<T>{});
    const Parts b = split<op>(to_float(upper), upper_group.mean, upper_channel, RoundTo<T>{});
    lower = from_float<T>(reconstruct(a, b));
    upper = from_float<T>(reconstruct(b, a));
}

// Elements over which channels and groups stay the same: everything that a pair of elements needs, and how many follow.
struct Segment
{
    Group lower_group;
    Group upper_group;
    Channel lower_channel;
    Channel upper_channel;
    uint32_t left;
};

// The segment of an element of two groups of whole channels; the statistics are given.
template <typename T, Operator op>
__device__ __forceinline__ void locate_in_pair(
    const KernelParams& p, uint32_t first_channel, uint32_t element, Segment& segment)
{
    const uint32_t row = p.by_pixels.quotient(element);
    const uint32_t channel = first_channel + row;
    segment.lower_channel = load_channel<T, op>(p, channel, segment.lower_group);
    segment.upper_channel = load_channel<T, op>(p, channel + p.half_channels, segment.upper_group);
    segment.left = (row + 1) * p.by_pixels.divisor - element;
}

// The segment of an element of a sample's lower half, wherever groups begin and end.
template <typename T, Operator op>
__device__ __forceinline__ void locate_in_sample(
    const KernelParams& p, const Group* groups, uint32_t element, Segment& segment)
{
    const uint32_t channel = p.by_pixels.quotient(element);
    const uint32_t lower = p.by_length.quotient(element);
    const uint32_t upper = p.by_length.quotient(element + p.half_elements);
    segment.lower_group = groups[lower];
    segment.upper_group = groups[upper];
    segment.lower_channel = load_channel<T, op>(p, channel, segment.lower_group);
    segment.upper_channel = load_channel<T, op>(p, channel + p.half_channels, segment.upper_group);
    const uint32_t row_left = (channel + 1) * p.by_pixels.divisor - element;
    const uint32_t lower_left = (lower + 1) * p.length - element;
    const uint32_t upper_left = (upper + 1) * p.length - (element + p.half_elements);
    segment.left = min(row_left, min(lower_left, upper_left));
}

// Reconstruct a vector of the lower half and its partner; elements outside the span stay as they are.
template <typename T, Operator op, int V, bool rows, typename Locate>
__device__ __forceinline__ void cross_vectors(
    const Span& span, uint32_t vector, Segment& segment, Vector<T, V>& lower, Vector<T, V>& upper, Locate locate)
{
    segment.left = 0;
#pragma unroll
    for (int i = 0; i < V; ++i)
    {
        const uint32_t element = span.element(vector, i, V);
        if constexpr (!rows)
            if (!span.inside(element))
                continue;
        if (rows ? i == 0 : segment.left == 0)
            locate(element, segment);
        --segment.left;
        cross<T, op>(lower.lane[i], upper.lane[i], segment.lower_group, segment.upper_group, segment.lower_channel,
            segment.upper_channel);
    }
}

// Write a vector, or of one at an edge the elements that are inside.
template <typename T, int V, bool rows>
__device__ __forceinline__ void store(Raw<T, V>* y, const Span& span, uint32_t vector, const Vector<T, V>& value)
{
    if constexpr (rows)
    {
        y[vector] = pack<T, V>(value);
    }
    else if (span.whole(vector, V))
    {
        y[vector] = pack<T, V>(value);
    }
    else
    {
#pragma unroll
        for (int i = 0; i < V; ++i)
            if (span.inside(span.element(vector, i, V)))
                reinterpret_cast<T*>(y + vector)[i] = value.lane[i];
    }
}

} // namespace scconv
