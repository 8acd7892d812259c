// One CTA per sample and pair of groups (g, g + G/2): x is read once into shared memory, y written once.
//
//   x --16 bytes a thread--> shared memory, summed on the way          mean0 of both groups
//   shared memory --> sum(x - mean0), sum((x - mean0)^2)               rest and s of both groups
//   shared memory --> gate, cross reconstruction --16 bytes--> y
//
// A thread handles the same vectors in all three steps, so only the sums need the block to meet.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace scconv {

// Vectors of either group that a thread has in flight. Fewer where channels are looked up per element: the block of
// 1024 threads leaves 64 registers, and four spill (benchmarks/results/sru_registers.json).
template <bool rows>
constexpr int kOnChipUnroll = rows ? 4 : 2;

template <typename T, int V, bool rows>
__device__ __forceinline__ void masked(const Span& span, uint32_t vector, const Vector<T, V>& value, float (&out)[V],
    float outside)
{
#pragma unroll
    for (int i = 0; i < V; ++i)
        out[i] = rows || span.inside(span.element(vector, i, V)) ? to_float(value.lane[i]) : outside;
}

template <typename T, Operator op, int V, bool rows>
__global__ void __launch_bounds__(1024) on_chip_kernel(const __grid_constant__ KernelParams p)
{
    using Data = Raw<T, V>;
    constexpr int unroll = kOnChipUnroll<rows>;
    extern __shared__ __align__(16) unsigned char shared[];
    float* scratch = reinterpret_cast<float*>(shared);
    const int64_t sample = blockIdx.x / p.half_groups;
    const uint32_t group = blockIdx.x % p.half_groups;
    const int64_t start = (sample * p.num_groups + group) * p.length;
    const Span span = Span::of<V>(start, p.length);
    Data* lower_data = reinterpret_cast<Data*>(shared + kReductionBytes);
    Data* upper_data = lower_data + span.vectors;
    const Data* lower_x = reinterpret_cast<const Data*>(static_cast<const T*>(p.x) + (start - span.phase));
    const Data* upper_x = lower_x + p.half_elements / V;

    Sums<2> sums{};
    for (uint32_t base = threadIdx.x; base < span.vectors; base += unroll * blockDim.x)
    {
        Data lower[unroll], upper[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u)
        {
            const uint32_t vector = base + u * blockDim.x;
            if (vector < span.vectors)
            {
                lower[u] = lower_x[vector];
                upper[u] = upper_x[vector];
            }
        }
#pragma unroll
        for (int u = 0; u < unroll; ++u)
        {
            const uint32_t vector = base + u * blockDim.x;
            if (vector < span.vectors)
            {
                float value[V];
                lower_data[vector] = lower[u];
                upper_data[vector] = upper[u];
                masked<T, V, rows>(span, vector, unpack<T, V>(lower[u]), value, 0.0f);
                sums.value[0] = add(sums.value[0], sum_of<V>(value));
                masked<T, V, rows>(span, vector, unpack<T, V>(upper[u]), value, 0.0f);
                sums.value[1] = add(sums.value[1], sum_of<V>(value));
            }
        }
    }
    reduce_block(sums, scratch);
    const float length = static_cast<float>(p.length);
    const float lower_mean = divide(sums.value[0], length), upper_mean = divide(sums.value[1], length);

    CentredSums lower_sums{}, upper_sums{};
    for (uint32_t vector = threadIdx.x; vector < span.vectors; vector += blockDim.x)
    {
        float value[V];
        masked<T, V, rows>(span, vector, unpack<T, V>(lower_data[vector]), value, lower_mean); // outside counts as the mean: 0
#pragma unroll
        for (int i = 0; i < V; ++i)
            accumulate(lower_sums, value[i], lower_mean);
        masked<T, V, rows>(span, vector, unpack<T, V>(upper_data[vector]), value, upper_mean);
#pragma unroll
        for (int i = 0; i < V; ++i)
            accumulate(upper_sums, value[i], upper_mean);
    }
    Sums<4> centred{{lower_sums.sum, lower_sums.squares, upper_sums.sum, upper_sums.squares}};
    reduce_block(centred, scratch + 2 * 32); // beside the first sums, which slower warps may still read
    Segment segment;
    segment.lower_group = group_statistics(
        moments(length, lower_mean, {centred.value[0], centred.value[1]}), p.freedom, p.eps_var, p.eps_std);
    segment.upper_group = group_statistics(
        moments(length, upper_mean, {centred.value[2], centred.value[3]}), p.freedom, p.eps_var, p.eps_std);

    Data* lower_y = reinterpret_cast<Data*>(static_cast<T*>(p.y) + (start - span.phase));
    Data* upper_y = lower_y + p.half_elements / V;
    const uint32_t first_channel = group * p.group_channels;
    const auto locate = [&](uint32_t element, Segment& found) {
        locate_in_pair<T, op>(p, first_channel, element, found);
    };
    for (uint32_t vector = threadIdx.x; vector < span.vectors; vector += blockDim.x)
    {
        Vector<T, V> lower = unpack<T, V>(lower_data[vector]), upper = unpack<T, V>(upper_data[vector]);
        cross_vectors<T, op, V, rows>(span, vector, segment, lower, upper, locate);
        store<T, V, rows>(lower_y, span, vector, lower);
        store<T, V, rows>(upper_y, span, vector, upper);
    }
}

} // namespace scconv
