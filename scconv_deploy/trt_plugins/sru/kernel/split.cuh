// For pairs that do not fit on chip, and for groups without a partner: statistics of pieces, then apply.
//
//   statistics_kernel   x -> moments of each piece of each group; a piece stays in registers for both of its passes
//   apply_kernel        a pair's moments merged by each of its blocks; x (from L2 where it stays there) -> y
//   merge_kernel, apply_general_kernel    the same where a block may meet many groups: merged by a kernel of their own
//
// Pieces are merged in a fixed order without atomics: equal inputs give equal bytes.
#pragma once

#include "on_chip.cuh"

namespace scconv {

template <typename T, int V>
__global__ void __launch_bounds__(kStatisticsThreads) statistics_kernel(const __grid_constant__ KernelParams p)
{
    using Data = Raw<T, V>;
    __shared__ float scratch[3 * 32];
    const int64_t group = blockIdx.x / p.pieces_per_group;
    const uint32_t piece = blockIdx.x % p.pieces_per_group;
    const Span span = Span::of<V>(group * p.length, p.length);
    const Data* x = reinterpret_cast<const Data*>(static_cast<const T*>(p.x) + (group * p.length - span.phase));
    const uint32_t first = piece * (kStatisticsThreads * kStatisticsVectors) + threadIdx.x;

    Data data[kStatisticsVectors];
    float value[V];
#pragma unroll
    for (int u = 0; u < kStatisticsVectors; ++u)
    {
        const uint32_t vector = first + u * kStatisticsThreads;
        data[u] = vector < span.vectors ? x[vector] : Data{};
    }
    Sums<1> sum{};
#pragma unroll
    for (int u = 0; u < kStatisticsVectors; ++u)
    {
        masked<T, V, false>(span, first + u * kStatisticsThreads, unpack<T, V>(data[u]), value, 0.0f);
        sum.value[0] = add(sum.value[0], sum_of<V>(value));
    }
    reduce_block(sum, scratch);

    // elements of this piece: those before its end less those before its beginning
    const uint32_t width = kStatisticsThreads * kStatisticsVectors * V;
    const uint32_t begin = piece == 0 ? 0 : min(piece * width - span.phase, p.length);
    const uint32_t end = min((piece + 1) * width - span.phase, p.length);
    const float count = static_cast<float>(end - begin);
    const float mean = end > begin ? divide(sum.value[0], count) : 0.0f;
    CentredSums sums{};
#pragma unroll
    for (int u = 0; u < kStatisticsVectors; ++u)
    {
        masked<T, V, false>(span, first + u * kStatisticsThreads, unpack<T, V>(data[u]), value, mean);
#pragma unroll
        for (int i = 0; i < V; ++i)
            accumulate(sums, value[i], mean);
    }
    Sums<2> centred{{sums.sum, sums.squares}};
    reduce_block(centred, scratch + 32);
    if (threadIdx.x == 0)
        p.pieces[blockIdx.x] = end > begin ? moments(count, mean, {centred.value[0], centred.value[1]}) : Moments{};
}

// A group's statistics from its pieces, by one warp; every lane returns them.
__device__ __forceinline__ Group merge_group(const KernelParams& p, int64_t group)
{
    const Moments* pieces = p.pieces + group * p.pieces_per_group;
    const uint32_t lane = threadIdx.x % 32;
    const float pivot = pieces[0].mean, length = static_cast<float>(p.length);
    Sums<1> shift{};
    for (uint32_t i = lane; i < p.pieces_per_group; i += 32)
        if (pieces[i].count > 0.0f)
            shift.value[0] = add(shift.value[0], weighted_shift(pieces[i], pivot));
    reduce_warp(shift);
    const float rest = divide(shift.value[0], length);
    Sums<1> squares{};
    for (uint32_t i = lane; i < p.pieces_per_group; i += 32)
        if (pieces[i].count > 0.0f)
            squares.value[0] = add(squares.value[0], shifted_squares(pieces[i], pivot, rest));
    reduce_warp(squares);
    return group_statistics({length, pivot, rest, squares.value[0]}, p.freedom, p.eps_var, p.eps_std);
}

template <typename T, Operator op, int V, bool rows>
__global__ void __launch_bounds__(kApplyThreads) apply_kernel(const __grid_constant__ KernelParams p)
{
    using Data = Raw<T, V>;
    __shared__ Group merged[2];
    const int64_t pair = blockIdx.x / p.blocks_per_item;
    const uint32_t part = blockIdx.x % p.blocks_per_item;
    const uint32_t group = static_cast<uint32_t>(pair % p.half_groups);
    const int64_t lower_index = pair / p.half_groups * p.num_groups + group;
    const Span span = Span::of<V>(lower_index * p.length, p.length);
    const int64_t offset = lower_index * p.length - span.phase;
    const Data* lower_x = reinterpret_cast<const Data*>(static_cast<const T*>(p.x) + offset);
    const Data* upper_x = lower_x + p.half_elements / V;
    Data* lower_y = reinterpret_cast<Data*>(static_cast<T*>(p.y) + offset);
    Data* upper_y = lower_y + p.half_elements / V;
    const uint32_t first = part * (kApplyThreads * kApplyVectors) + threadIdx.x;

    Data lower[kApplyVectors], upper[kApplyVectors];
#pragma unroll
    for (int u = 0; u < kApplyVectors; ++u)
    {
        const uint32_t vector = first + u * kApplyThreads;
        if (vector < span.vectors)
        {
            lower[u] = lower_x[vector];
            upper[u] = upper_x[vector];
        }
    }
    if (threadIdx.x < 64) // while the loads are under way
    {
        const uint32_t which = threadIdx.x / 32;
        const Group found = merge_group(p, lower_index + which * p.half_groups);
        if (threadIdx.x % 32 == 0)
            merged[which] = found;
    }
    __syncthreads();
    Segment segment;
    segment.lower_group = merged[0];
    segment.upper_group = merged[1];
    const auto locate = [&](uint32_t element, Segment& found) {
        locate_in_pair<T, op>(p, group * p.group_channels, element, found);
    };
#pragma unroll
    for (int u = 0; u < kApplyVectors; ++u)
    {
        const uint32_t vector = first + u * kApplyThreads;
        if (vector < span.vectors)
        {
            Vector<T, V> a = unpack<T, V>(lower[u]), b = unpack<T, V>(upper[u]);
            cross_vectors<T, op, V, rows>(span, vector, segment, a, b, locate);
            store<T, V, rows>(lower_y, span, vector, a);
            store<T, V, rows>(upper_y, span, vector, b);
        }
    }
}

// One warp a group: p.pieces -> p.groups.
template <typename T>
__global__ void __launch_bounds__(kApplyThreads) merge_kernel(const __grid_constant__ KernelParams p)
{
    const int64_t group = int64_t{blockIdx.x} * (kApplyThreads / 32) + threadIdx.x / 32;
    if (group >= p.batch * p.num_groups)
        return;
    const Group found = merge_group(p, group);
    if (threadIdx.x % 32 == 0)
        p.groups[group] = found;
}

template <typename T, Operator op, int V>
__global__ void __launch_bounds__(kApplyThreads) apply_general_kernel(const __grid_constant__ KernelParams p)
{
    using Data = Raw<T, V>;
    const int64_t sample = blockIdx.x / p.blocks_per_item;
    const uint32_t part = blockIdx.x % p.blocks_per_item;
    const int64_t offset = sample * 2 * p.half_elements;
    const Span span{0, p.half_elements, p.half_elements / V};
    const Data* lower_x = reinterpret_cast<const Data*>(static_cast<const T*>(p.x) + offset);
    const Data* upper_x = lower_x + span.vectors;
    Data* lower_y = reinterpret_cast<Data*>(static_cast<T*>(p.y) + offset);
    Data* upper_y = lower_y + span.vectors;
    const Group* groups = p.groups + sample * p.num_groups;
    const auto locate = [&](uint32_t element, Segment& found) {
        locate_in_sample<T, op>(p, groups, element, found);
    };
#pragma unroll 1
    for (int u = 0; u < kApplyVectors; ++u)
    {
        const uint32_t vector = (part * kApplyVectors + u) * kApplyThreads + threadIdx.x;
        if (vector >= span.vectors)
            return;
        Vector<T, V> lower = unpack<T, V>(lower_x[vector]), upper = unpack<T, V>(upper_x[vector]);
        Segment segment;
        cross_vectors<T, op, V, false>(span, vector, segment, lower, upper, locate);
        lower_y[vector] = pack<T, V>(lower);
        upper_y[vector] = pack<T, V>(upper);
    }
}

} // namespace scconv
