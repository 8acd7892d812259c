// Moments of pieces, in one order of every sum, and their merge (Chan et al. 1979): shared by all kernels.
//
// A warp adds up by halves: lane l with l + 16, the sums with those 8 further on, and so on. Where it adds up two values,
// half of its lanes go on with each, which gives the same sums in fewer steps.
#pragma once

#include "device.cuh"

namespace scconv {

__device__ __forceinline__ float from_lane(float value, int offset)
{
    return __shfl_xor_sync(0xffffffffu, value, offset);
}

// Sums over the warp; every lane returns it.
__device__ __forceinline__ float sum_warp(float value)
{
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        value = add(value, from_lane(value, offset));
    return value;
}

// One step of two sums: lanes whose bit `offset` is clear go on with a, the others with b.
__device__ __forceinline__ float halve(float a, float b, int offset)
{
    const bool second = threadIdx.x & offset;
    return add(second ? b : a, from_lane(second ? a : b, offset));
}

// A warp's vectors of a lower and an upper group (or of any two).
template <typename T, int V>
struct Piece
{
    Raw<T, V> lower[kPieceVectors];
    Raw<T, V> upper[kPieceVectors];
};

// Moments of both, of `vectors` vectors each, lane after lane: lanes 0 to 7 return the lower group's, 16 to 23 the upper's.
// whole: all vectors are there, and the count is a power of two, so that multiplying divides exactly.
template <typename T, int V, bool whole>
__device__ __forceinline__ Moments measure(const Piece<T, V>& piece, uint32_t vectors)
{
    constexpr float kCount = kWarp * kPieceVectors * V, kInverse = 1.0f / kCount;
    const uint32_t lane = threadIdx.x % kWarp;
    const float count = whole ? kCount : static_cast<float>(vectors * V);
    const auto average = [&](float sum) { return whole ? multiply(sum, kInverse) : divide(sum, count); };
    float a[V], b[V];

    float lower_sum = 0.0f, upper_sum = 0.0f;
#pragma unroll
    for (int u = 0; u < kPieceVectors; ++u)
        if (whole || u * kWarp + lane < vectors)
        {
            unpack<T, V>(piece.lower[u], a);
            unpack<T, V>(piece.upper[u], b);
            lower_sum = add(lower_sum, sum_of<V>(a));
            upper_sum = add(upper_sum, sum_of<V>(b));
        }
    float sum = halve(lower_sum, upper_sum, 16);
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2)
        sum = add(sum, from_lane(sum, offset));
    const float mean = average(sum);
    const float lower_mean = __shfl_sync(0xffffffffu, mean, 0), upper_mean = __shfl_sync(0xffffffffu, mean, 16);

    CentredSums lower{}, upper{};
#pragma unroll
    for (int u = 0; u < kPieceVectors; ++u)
        if (whole || u * kWarp + lane < vectors)
        {
            unpack<T, V>(piece.lower[u], a);
            unpack<T, V>(piece.upper[u], b);
#pragma unroll
            for (int i = 0; i < V; ++i)
            {
                accumulate(lower, a[i], lower_mean);
                accumulate(upper, b[i], upper_mean);
            }
        }
    const float sums = halve(lower.sum, upper.sum, 16), squares = halve(lower.squares, upper.squares, 16);
    float total = halve(sums, squares, 8);
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2)
        total = add(total, from_lane(total, offset));
    const CentredSums centred{total, from_lane(total, 8)};
    return moments(count, mean, centred, average(centred.sum));
}

// A group's statistics from its pieces, by one warp; every lane returns them.
__device__ __forceinline__ Group merge_group(const KernelParams& p, const Moments* pieces)
{
    const uint32_t lane = threadIdx.x % kWarp;
    const float pivot = pieces[0].mean, length = static_cast<float>(p.length);
    float shift = 0.0f;
    for (uint32_t i = lane; i < p.pieces_per_group; i += kWarp)
        shift = add(shift, weighted_shift(pieces[i], pivot));
    const float rest = divide(sum_warp(shift), length);
    float squares = 0.0f;
    for (uint32_t i = lane; i < p.pieces_per_group; i += kWarp)
        squares = add(squares, shifted_squares(pieces[i], pivot, rest));
    return group_statistics({length, pivot, rest, sum_warp(squares)}, p.freedom, p.eps_var, p.eps_std);
}

// One warp a group: p.pieces -> p.groups. (A template, for every data type's file has its own.)
template <typename T>
__global__ void __launch_bounds__(kSplitThreads) merge_kernel(const __grid_constant__ KernelParams p)
{
    const int64_t group = int64_t{blockIdx.x} * (kSplitThreads / kWarp) + threadIdx.x / kWarp;
    if (group >= p.batch * p.num_groups)
        return;
    const Group found = merge_group(p, p.pieces + group * p.pieces_per_group);
    if (threadIdx.x % kWarp == 0)
        p.groups[group] = found;
}

// Pieces of a cluster's block to all blocks of the cluster: lane r of 8 has the moments and writes to block r.
__device__ __forceinline__ void publish(const KernelParams& p, Moments* at, const Moments& found)
{
    const uint32_t rank = threadIdx.x % 8;
    if (rank < p.cluster)
        store_remote(reinterpret_cast<float4*>(at), rank, {found.count, found.mean, found.rest, found.squares});
}

// The block meets, or the blocks of its cluster.
__device__ __forceinline__ void meet(const KernelParams& p)
{
    if (p.cluster > 1)
        cluster_barrier();
    else
        __syncthreads();
}

} // namespace scconv
