// x and y as [N, H, W, C]. A piece is a tile of pixels of some channels of the lower half and their partners; a thread owns
// fixed channels, a vector of either half, so that its thresholds wait in registers.
//
//   on chip: a block, or a cluster of blocks, holds all pixels of its channels: one read, one write
//   split:   tile_statistics_kernel, merge_kernel, tile_apply_kernel: two reads, one write
//
// A column is what a thread adds up for one group: a vector where groups are of whole vectors (run == V), else a channel.
#pragma once

#include <type_traits>

#include "moments.cuh"

namespace scconv {

// Where a thread stands in its block's tile.
struct Place
{
    uint32_t block; // of channels
    uint32_t slot;  // the first of its pixels in a tile; the others lie p.tile.slots apart
    uint32_t channel; // its first one, of the block's channels
    bool works;       // threads are not always a multiple of the vectors

    template <int V>
    __device__ static Place of(const KernelParams& p, uint32_t block)
    {
        const uint32_t slot = p.tile.by_vectors.quotient(threadIdx.x);
        return {block, slot, (threadIdx.x - slot * p.tile.by_vectors.divisor) * V, slot < p.tile.slots};
    }
    __device__ __forceinline__ uint32_t pixel(const KernelParams& p, uint32_t tile, int u) const
    {
        return (tile * kPieceVectors + u) * p.tile.slots + slot;
    }
    __device__ __forceinline__ bool has(const KernelParams& p, uint32_t tile, int u) const
    {
        return works && pixel(p, tile, u) < p.pixels;
    }
    // Every thread of the block has all its pixels: asked once a tile instead of once a vector.
    __device__ __forceinline__ bool whole(const KernelParams& p, uint32_t tile) const
    {
        return (tile + 1) * kPieceVectors * p.tile.slots <= p.pixels
            && p.tile.slots * p.tile.by_vectors.divisor == blockDim.x;
    }
    // Its lower vectors in a tile lie `step(p)` apart, from here on.
    template <typename Data, int V>
    __device__ __forceinline__ Data* at(const KernelParams& p, Data* data, int64_t sample, uint32_t tile) const
    {
        const uint32_t wide = 2 * p.half_channels / V; // vectors of a pixel
        return data + sample * p.pixels * wide + pixel(p, tile, 0) * wide + (block * p.tile.channels + channel) / V;
    }
    template <int V>
    __device__ __forceinline__ uint32_t step(const KernelParams& p) const
    {
        return p.tile.slots * (2 * p.half_channels / V);
    }
};

// visit(u) for each of the thread's vectors in a tile.
template <bool whole, typename Visit>
__device__ __forceinline__ void each_vector(const KernelParams& p, const Place& place, uint32_t tile, Visit visit)
{
#pragma unroll
    for (int u = 0; u < kPieceVectors; ++u)
        if (whole || place.has(p, tile, u))
            visit(u);
}

// The global number of a block's group: lower groups first, then their partners.
__device__ __forceinline__ uint32_t group_of(const KernelParams& p, uint32_t block, uint32_t local)
{
    if (p.tile.blocks == 1)
        return local;
    const uint32_t lower = p.by_group_channels.quotient(p.tile.channels);
    return local < lower ? block * lower + local : p.half_groups + block * lower + local - lower;
}

__device__ __forceinline__ uint32_t groups_of_block(const KernelParams& p)
{
    return p.by_group_channels.quotient(2 * p.tile.channels);
}

template <typename T, int V, bool whole>
__device__ __forceinline__ void load_tile(
    const KernelParams& p, int64_t sample, const Place& place, uint32_t tile, Piece<T, V>& piece)
{
    const auto* x = place.template at<const Raw<T, V>, V>(p, static_cast<const Raw<T, V>*>(p.x), sample, tile);
    const uint32_t step = place.template step<V>(p), other = p.half_channels / V;
    each_vector<whole>(p, place, tile, [&](int u) {
        piece.lower[u] = x[u * step];
        piece.upper[u] = x[u * step + other];
    });
}

// Sums of a block's columns, by group: those of a group lie side by side, slot after slot.
template <int V, int run>
struct Columns
{
    static constexpr int kCount = V / run; // of a thread and half
    float* values; // [2][groups][slots][columns of a group]
    float* means;  // [groups]
    uint32_t groups;
    uint32_t of_group; // slots * columns of a group

    __device__ static Columns of(const KernelParams& p, float* scratch)
    {
        const uint32_t groups = groups_of_block(p);
        const uint32_t of_group = p.tile.slots * (p.group_channels / run);
        return {scratch, scratch + 2 * groups * of_group, groups, of_group};
    }
    __device__ __forceinline__ uint32_t group(const KernelParams& p, uint32_t channel) const
    {
        return p.by_group_channels.quotient(channel);
    }
    // Where a thread writes the sum of its column `which`.
    __device__ __forceinline__ uint32_t at(const KernelParams& p, const Place& place, uint32_t half, int which) const
    {
        const uint32_t channel = half * p.tile.channels + place.channel + which * run, own = group(p, channel);
        const uint32_t wide = p.group_channels / run;
        return own * of_group + place.slot * wide + (channel - own * p.group_channels) / run;
    }
    // A warp's sum of a group's columns.
    __device__ __forceinline__ float sum(uint32_t group, uint32_t second) const
    {
        const float* from = values + (second * groups + group) * of_group;
        float found = 0.0f;
        for (uint32_t i = threadIdx.x % kWarp; i < of_group; i += kWarp)
            found = add(found, from[i]);
        return sum_warp(found);
    }
};

// Moments of a tile's groups, group after group, each by one warp whose lanes all have them: store(group, moments).
template <typename T, int V, int run, bool whole, typename Store>
__device__ __forceinline__ void measure_tile(
    const KernelParams& p, const Place& place, uint32_t tile, const Piece<T, V>& piece, float* scratch, Store store)
{
    using Set = Columns<V, run>;
    constexpr int kColumns = Set::kCount;
    const Set columns = Set::of(p, scratch);
    const uint32_t warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const uint32_t first = tile * kPieceVectors * p.tile.slots;
    const float count = static_cast<float>(min(kPieceVectors * p.tile.slots, p.pixels - first) * p.group_channels);
    float value[2][V];

    float sums[2][kColumns] = {};
    each_vector<whole>(p, place, tile, [&](int u) {
        unpack<T, V>(piece.lower[u], value[0]);
        unpack<T, V>(piece.upper[u], value[1]);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int k = 0; k < kColumns; ++k)
                sums[half][k] = add(sums[half][k], sum_of<run>(value[half] + k * run));
    });
    __syncthreads(); // the last tile's sums have been read
    if (whole || place.works)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int k = 0; k < kColumns; ++k)
                columns.values[columns.at(p, place, half, k)] = sums[half][k];
    __syncthreads();
    for (uint32_t group = warp; group < columns.groups; group += warps)
    {
        const float mean = divide(columns.sum(group, 0), count);
        if (threadIdx.x % kWarp == 0)
            columns.means[group] = mean;
    }
    __syncthreads();

    CentredSums centred[2][kColumns] = {};
    float mean[2][kColumns];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < kColumns; ++k)
            mean[half][k] = columns.means[columns.group(p, half * p.tile.channels + place.channel + k * run)];
    each_vector<whole>(p, place, tile, [&](int u) {
        unpack<T, V>(piece.lower[u], value[0]);
        unpack<T, V>(piece.upper[u], value[1]);
#pragma unroll
        for (int i = 0; i < V; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                accumulate(centred[half][i / run], value[half][i], mean[half][i / run]);
    });
    if (whole || place.works)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int k = 0; k < kColumns; ++k)
            {
                const uint32_t at = columns.at(p, place, half, k);
                columns.values[at] = centred[half][k].sum;
                columns.values[columns.groups * columns.of_group + at] = centred[half][k].squares;
            }
    __syncthreads();
    for (uint32_t group = warp; group < columns.groups; group += warps)
    {
        const CentredSums found{columns.sum(group, 0), columns.sum(group, 1)};
        store(group, moments(count, columns.means[group], found, divide(found.sum, count)));
    }
}

// Parameters of a vector of channels, 16 bytes at a time where they are aligned.
template <int V>
__device__ __forceinline__ void load_parameters(bool are_aligned, const float* from, float (&value)[V])
{
    if constexpr (V % 4 == 0)
        if (are_aligned)
        {
#pragma unroll
            for (int i = 0; i < V; i += 4)
            {
                const float4 four = *reinterpret_cast<const float4*>(from + i);
                value[i] = four.x;
                value[i + 1] = four.y;
                value[i + 2] = four.z;
                value[i + 3] = four.w;
            }
            return;
        }
#pragma unroll
    for (int i = 0; i < V; ++i)
        value[i] = __ldg(from + i);
}

// What a thread needs of its channels: of the lower vector, then of the upper.
template <Operator op, int V, int run>
struct OwnChannels
{
    Channel channel[2][V];

    // statistics(local group)
    template <typename Statistics>
    __device__ __forceinline__ void load(const KernelParams& p, const Place& place, Statistics statistics)
    {
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            const uint32_t local = half * p.tile.channels + place.channel;
            const uint32_t first = half * p.half_channels + place.block * p.tile.channels + place.channel;
            float cut[V], sign[V], scale[V] = {}, shift[V] = {};
            load_parameters<V>(p.parameters_are_aligned, p.cut + first, cut);
            load_parameters<V>(p.parameters_are_aligned, p.sign + first, sign);
            if constexpr (op != Operator::kSru)
            {
                load_parameters<V>(p.parameters_are_aligned, p.first + first, scale);
                load_parameters<V>(p.parameters_are_aligned, p.second + first, shift);
            }
            Group group = statistics(p.by_group_channels.quotient(local));
#pragma unroll
            for (int i = 0; i < V; ++i)
            {
                if (run != V && i > 0)
                    group = statistics(p.by_group_channels.quotient(local + i));
                channel[half][i] = prepare_channel<op>(group, cut[i], sign[i], scale[i], shift[i]);
            }
        }
    }
    template <typename T>
    __device__ __forceinline__ void reconstruct_both(Raw<T, V>& lower, Raw<T, V>& upper) const
    {
        float a[V], b[V];
        unpack<T, V>(lower, a);
        unpack<T, V>(upper, b);
#pragma unroll
        for (int i = 0; i < V; ++i)
            cross<T, op>(a[i], b[i], channel[0][i], channel[1][i]);
        lower = pack<T, V>(a);
        upper = pack<T, V>(b);
    }
};

// Blocks that a multiprocessor's registers should hold: thresholds of 16 channels leave room for two, affine maps or sums of
// each channel for one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <Operator, bool>
constexpr int blocks_at_once = 1; // for bfloat16, which sm_75 converts by hand
#else
template <Operator op, bool whole>
constexpr int blocks_at_once = op == Operator::kSru && whole ? 2 : 1;
#endif

template <typename T, Operator op, int V, int run>
__global__ void __launch_bounds__(kTileThreads, blocks_at_once<op, run == V>)
    tile_fused_kernel(const __grid_constant__ KernelParams p)
{
    using Data = Raw<T, V>;
    unsigned char* shared = dynamic_shared();
    const uint32_t item = blockIdx.x / p.cluster, rank = blockIdx.x % p.cluster;
    const int64_t sample = item / p.tile.blocks;
    const Place place = Place::of<V>(p, item % p.tile.blocks);
    const uint32_t first = min(rank * p.pieces_per_block, p.pieces_per_group);
    const uint32_t end = min(first + p.pieces_per_block, p.pieces_per_group);
    Moments* found = reinterpret_cast<Moments*>(shared);
    Group* groups = reinterpret_cast<Group*>(shared + p.shared.groups);
    float* scratch = reinterpret_cast<float*>(shared + p.shared.scratch);
    // a thread's own, vector after vector: nobody else reads it
    Data* kept = reinterpret_cast<Data*>(shared + p.shared.data) + threadIdx.x;
    const uint32_t step = blockDim.x, other = kPieceVectors * step;

    if (p.cluster > 1)
        cluster_start();
    for (uint32_t tile = first; tile < end; ++tile)
    {
        Data* at = kept + (tile - first) * 2 * other;
        const auto take = [&](auto all) {
            constexpr bool whole = decltype(all)::value;
            Piece<T, V> piece;
            load_tile<T, V, whole>(p, sample, place, tile, piece);
            each_vector<whole>(p, place, tile, [&](int u) {
                at[u * step] = piece.lower[u];
                at[u * step + other] = piece.upper[u];
            });
            measure_tile<T, V, run, whole>(p, place, tile, piece, scratch, [&](uint32_t group, const Moments& moments) {
                if (threadIdx.x % kWarp < 8)
                    publish(p, found + group * p.pieces_per_group + tile, moments);
            });
        };
        if (place.whole(p, tile))
            take(std::true_type{});
        else
            take(std::false_type{});
    }
    meet(p);
    for (uint32_t group = threadIdx.x / kWarp; group < groups_of_block(p); group += blockDim.x / kWarp)
    {
        const Group merged = merge_group(p, found + group * p.pieces_per_group);
        if (threadIdx.x % kWarp == 0)
            groups[group] = merged;
    }
    __syncthreads();
    if (!place.works)
        return;
    OwnChannels<op, V, run> own;
    own.load(p, place, [&](uint32_t local) { return groups[local]; });
    const uint32_t apart = place.template step<V>(p), partner = p.half_channels / V;
    for (uint32_t tile = first; tile < end; ++tile)
    {
        const Data* at = kept + (tile - first) * 2 * other;
        Data* y = place.template at<Data, V>(p, static_cast<Data*>(p.y), sample, tile);
        each_vector<false>(p, place, tile, [&](int u) {
            Data lower = at[u * step], upper = at[u * step + other];
            own.template reconstruct_both<T>(lower, upper);
            y[u * apart] = lower;
            y[u * apart + partner] = upper;
        });
    }
}

template <typename T, int V, int run>
__global__ void __launch_bounds__(kTileThreads, blocks_at_once<Operator::kSru, run == V>)
    tile_statistics_kernel(const __grid_constant__ KernelParams p)
{
    const uint32_t item = blockIdx.x / p.pieces_per_group, tile = blockIdx.x % p.pieces_per_group;
    const int64_t sample = item / p.tile.blocks;
    const Place place = Place::of<V>(p, item % p.tile.blocks);
    float* scratch = reinterpret_cast<float*>(dynamic_shared() + p.shared.scratch);
    Piece<T, V> piece;
    load_tile<T, V, false>(p, sample, place, tile, piece);
    measure_tile<T, V, run, false>(p, place, tile, piece, scratch, [&](uint32_t group, const Moments& moments) {
        if (threadIdx.x % kWarp == 0)
            p.pieces[(sample * p.num_groups + group_of(p, place.block, group)) * p.pieces_per_group + tile] = moments;
    });
}

template <typename T, Operator op, int V, int run>
__global__ void __launch_bounds__(kTileThreads, blocks_at_once<op, run == V>)
    tile_apply_kernel(const __grid_constant__ KernelParams p)
{
    using Data = Raw<T, V>;
    const uint32_t block = gridDim.x - 1 - blockIdx.x; // as apply_kernel
    const uint32_t item = block / p.pieces_per_group, tile = block % p.pieces_per_group;
    const int64_t sample = item / p.tile.blocks;
    const Place place = Place::of<V>(p, item % p.tile.blocks);
    if (!place.works)
        return;
    Piece<T, V> piece;
    load_tile<T, V, false>(p, sample, place, tile, piece);
    const Group* groups = p.groups + sample * p.num_groups;
    OwnChannels<op, V, run> own;
    own.load(p, place, [&](uint32_t local) { return groups[group_of(p, place.block, local)]; });
    Data* y = place.template at<Data, V>(p, static_cast<Data*>(p.y), sample, tile);
    const uint32_t apart = place.template step<V>(p), partner = p.half_channels / V;
    each_vector<false>(p, place, tile, [&](int u) {
        own.template reconstruct_both<T>(piece.lower[u], piece.upper[u]);
        y[u * apart] = piece.lower[u];
        y[u * apart + partner] = piece.upper[u];
    });
}

} // namespace scconv
