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

constexpr uint32_t kPiece = kWarp * kPieceVectors; // vectors

// A warp's vectors of a lower and an upper group (or of any two).
template <typename T, int V>
struct Piece
{
    Raw<T, V> lower[kPieceVectors];
    Raw<T, V> upper[kPieceVectors];
};

// A warp's two sums, of a and of b: lanes 0 to 15 return a's, the others b's.
__device__ __forceinline__ float sum_both(float a, float b)
{
    float sum = halve(a, b, 16);
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2)
        sum = add(sum, from_lane(sum, offset));
    return sum;
}

// The same of two sums each: lanes 0 to 7 return a's, 16 to 23 b's.
__device__ __forceinline__ CentredSums sum_both(const CentredSums& a, const CentredSums& b)
{
    float total = halve(halve(a.sum, b.sum, 16), halve(a.squares, b.squares, 16), 8);
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2)
        total = add(total, from_lane(total, offset));
    return {total, from_lane(total, 8)};
}

// Moments of a warp's piece of a lower and an upper group (or of any two), of vectors that visit(unpacked) hands out, twice
// and in the same order: lanes 0 to 7 return the lower group's, 16 to 23 the upper's. average(sum) divides by count.
template <int V, typename Visit, typename Average>
__device__ __forceinline__ Moments measure(float count, Visit visit, Average average)
{
    float lower_sum = 0.0f, upper_sum = 0.0f;
    visit([&](const float(&a)[V], const float(&b)[V]) {
        lower_sum = add(lower_sum, sum_of<V>(a));
        upper_sum = add(upper_sum, sum_of<V>(b));
    });
    const float mean = average(sum_both(lower_sum, upper_sum));
    const float lower_mean = __shfl_sync(0xffffffffu, mean, 0), upper_mean = __shfl_sync(0xffffffffu, mean, 16);
    CentredSums lower{}, upper{};
    visit([&](const float(&a)[V], const float(&b)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i)
        {
            accumulate(lower, a[i], lower_mean);
            accumulate(upper, b[i], upper_mean);
        }
    });
    const CentredSums sums = sum_both(lower, upper);
    return moments(count, mean, sums, average(sums.sum));
}

// Of a whole piece, in registers. The count is a power of two, so that multiplying divides exactly.
template <typename T, int V>
__device__ __forceinline__ Moments measure_whole(const Piece<T, V>& piece)
{
    constexpr float kCount = kPiece * V;
    return measure<V>(
        kCount,
        [&](auto use) {
#pragma unroll
            for (int u = 0; u < kPieceVectors; ++u)
            {
                float a[V], b[V];
                unpack<T, V>(piece.lower[u], a);
                unpack<T, V>(piece.upper[u], b);
                use(a, b);
            }
        },
        [](float sum) { return multiply(sum, 1.0f / kCount); });
}

// Of a whole piece in shared memory: read twice, which costs less than the registers.
template <typename T, int V>
__device__ __forceinline__ Moments measure_shared(const Raw<T, V>* lower, const Raw<T, V>* upper)
{
    constexpr float kCount = kPiece * V;
    const uint32_t lane = threadIdx.x % kWarp;
    return measure<V>(
        kCount,
        [&](auto use) {
#pragma unroll
            for (int u = 0; u < kPieceVectors; ++u)
            {
                float a[V], b[V];
                unpack<T, V>(lower[u * kWarp + lane], a);
                unpack<T, V>(upper[u * kWarp + lane], b);
                use(a, b);
            }
            __syncwarp(); // without it the assembler keeps what it has converted
        },
        [](float sum) { return multiply(sum, 1.0f / kCount); });
}

// Of a group's last piece, wherever it lies.
template <typename T, int V>
__device__ __forceinline__ Moments measure_part(const Raw<T, V>* lower, const Raw<T, V>* upper, uint32_t vectors)
{
    const float count = static_cast<float>(vectors * V);
    return measure<V>(
        count,
        [&](auto use) {
#pragma unroll 1
            for (uint32_t i = threadIdx.x % kWarp; i < vectors; i += kWarp)
            {
                float a[V], b[V];
                unpack<T, V>(lower[i], a);
                unpack<T, V>(upper[i], b);
                use(a, b);
            }
        },
        [=](float sum) { return divide(sum, count); });
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
