// What the kernels share: data types, vectors, parameters, the reconstruction of a pair of vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "intrinsics.cuh"
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

// Two elements as they lie in memory, rounded in one instruction; bfloat16 is the upper half of a float.
template <typename T>
struct PairOf;
template <>
struct PairOf<__half>
{
    __device__ static __forceinline__ uint32_t round(float a, float b)
    {
        const __half2 pair = __floats2half2_rn(a, b);
        uint32_t word;
        memcpy(&word, &pair, sizeof(word));
        return word;
    }
    __device__ static __forceinline__ void widen(uint32_t word, float& a, float& b)
    {
        __half pair[2];
        memcpy(pair, &word, sizeof(word));
        a = to_float(pair[0]);
        b = to_float(pair[1]);
    }
};
template <>
struct PairOf<__nv_bfloat16>
{
    __device__ static __forceinline__ uint32_t round(float a, float b)
    {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
        uint32_t word;
        memcpy(&word, &pair, sizeof(word));
        return word;
    }
    __device__ static __forceinline__ void widen(uint32_t word, float& a, float& b)
    {
        const uint32_t lower = word << 16, upper = word & 0xffff0000u;
        memcpy(&a, &lower, sizeof(a));
        memcpy(&b, &upper, sizeof(b));
    }
};

template <typename T>
struct RoundTo
{
    __device__ __forceinline__ float operator()(float value) const
    {
        return to_float(from_float<T>(value));
    }
};

// V elements as they lie in memory. What waits in registers waits like this: held as elements, bfloat16 took a register
// each and the kernels spilled.
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
__device__ __forceinline__ void unpack(Raw<T, V> raw, float (&value)[V])
{
    if constexpr (sizeof(T) == 2 && V > 1)
    {
        uint32_t word[V / 2];
        memcpy(word, &raw, sizeof(raw));
#pragma unroll
        for (int i = 0; i < V / 2; ++i)
            PairOf<T>::widen(word[i], value[2 * i], value[2 * i + 1]);
    }
    else
    {
        T lane[V];
        memcpy(lane, &raw, sizeof(raw));
#pragma unroll
        for (int i = 0; i < V; ++i)
            value[i] = to_float(lane[i]);
    }
}

template <typename T, int V>
__device__ __forceinline__ Raw<T, V> pack(const float (&value)[V])
{
    Raw<T, V> raw;
    if constexpr (sizeof(T) == 2 && V > 1)
    {
        uint32_t word[V / 2];
#pragma unroll
        for (int i = 0; i < V / 2; ++i)
            word[i] = PairOf<T>::round(value[2 * i], value[2 * i + 1]);
        memcpy(&raw, word, sizeof(raw));
    }
    else
    {
        T lane[V];
#pragma unroll
        for (int i = 0; i < V; ++i)
            lane[i] = from_float<T>(value[i]);
        memcpy(&raw, lane, sizeof(raw));
    }
    return raw;
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

template <Operator op>
__device__ __forceinline__ Channel load_channel(const KernelParams& p, uint32_t channel, const Group& group)
{
    const float cut = __ldg(p.cut + channel), sign = __ldg(p.sign + channel);
    if constexpr (op == Operator::kSru)
        return prepare_channel<op>(group, cut, sign, 0.0f, 0.0f);
    return prepare_channel<op>(group, cut, sign, __ldg(p.first + channel), __ldg(p.second + channel));
}

// Both halves' outputs of an element whose channels cross, before they are rounded to T.
template <typename T, Operator op>
__device__ __forceinline__ void cross(float& lower, float& upper, const Channel& lower_channel, const Channel& upper_channel)
{
    const Gated a = gated<op>(lower, lower_channel, RoundTo<T>{});
    const Gated b = gated<op>(upper, upper_channel, RoundTo<T>{});
    lower = reconstruct<op>(a, b);
    upper = reconstruct<op>(b, a);
}

// A channel of one of two, chosen by a selection for each value: a branch would cost more.
template <Operator op>
__device__ __forceinline__ Channel either(bool second, const Channel& a, const Channel& b)
{
    Channel found{second ? b.sign : a.sign, second ? b.shift : a.shift, second ? b.threshold : a.threshold, a.mean, 0.0f,
        0.0f}; // both are of one group
    if constexpr (op != Operator::kSru)
    {
        found.factor = second ? b.factor : a.factor;
        found.offset = second ? b.offset : a.offset;
    }
    return found;
}

// Reconstruct a vector of a lower channel and its partner. Where vectors are ragged (run 1), elements from `left` on are of
// the next channels, which `channels(1, ...)` gives.
template <typename T, Operator op, int V, int run, typename Channels>
__device__ __forceinline__ void cross_vectors(Raw<T, V>& lower, Raw<T, V>& upper, uint32_t left, Channels channels)
{
    float a[V], b[V];
    unpack<T, V>(lower, a);
    unpack<T, V>(upper, b);
    Channel lower_channel, upper_channel;
    channels(0, lower_channel, upper_channel);
    if constexpr (run == V)
    {
#pragma unroll
        for (int i = 0; i < V; ++i)
            cross<T, op>(a[i], b[i], lower_channel, upper_channel);
    }
    else
    {
        Channel lower_next, upper_next;
        channels(1, lower_next, upper_next);
#pragma unroll
        for (int i = 0; i < V; ++i)
        {
            const bool next = static_cast<uint32_t>(i) >= left;
            cross<T, op>(a[i], b[i], either<op>(next, lower_channel, lower_next), either<op>(next, upper_channel, upper_next));
        }
    }
    lower = pack<T, V>(a);
    upper = pack<T, V>(b);
}

} // namespace scconv
