// x and y as [N, C, H, W]. A group is contiguous, and cut into pieces of 128 vectors; a warp measures a piece of two groups.
//
//   on chip: a block, or a cluster of blocks, holds a group and its partner: x is read once, y written once
//     x --16 bytes a thread, or in bulk--> shared memory and registers --> moments of each piece --> all blocks of the cluster
//     moments --> statistics --> thresholds of each channel
//     shared memory --> gate, cross reconstruction --16 bytes--> y
//   split: for pairs that do not fit, and for groups without a partner or with borders inside a channel
//     statistics_kernel    x -> moments of each piece
//     merge_kernel         moments -> statistics
//     apply_kernel         x (from L2 where it stays there), statistics -> y
#pragma once

#include "moments.cuh"

namespace scconv {

// Channels of a block's slice: their thresholds in shared memory, of the lower group, then of the upper.
template <Operator op>
struct ChannelTable
{
    static constexpr int kRows = op == Operator::kSru ? 1 : 2; // of 16 bytes
    float4* rows;
    uint32_t first; // channel of the group
    uint32_t count;

    __device__ __forceinline__ float4* at(uint32_t half, uint32_t channel) const
    {
        return rows + (half * count + channel) * kRows;
    }
    __device__ __forceinline__ void write(uint32_t half, uint32_t channel, const Channel& c) const
    {
        at(half, channel)[0] = {c.sign, c.shift, c.threshold, c.mean};
        if constexpr (op != Operator::kSru)
            at(half, channel)[1] = {c.factor, c.offset, 0.0f, 0.0f};
    }
    __device__ __forceinline__ Channel read(uint32_t half, uint32_t channel) const
    {
        const float4 row = at(half, channel)[0];
        Channel found{row.x, row.y, row.z, row.w, 0.0f, 0.0f};
        if constexpr (op != Operator::kSru)
        {
            const float4 affine = at(half, channel)[1];
            found.factor = affine.x;
            found.offset = affine.y;
        }
        return found;
    }
};

template <typename T, int V>
__device__ __forceinline__ void load_piece(const Raw<T, V>* lower, const Raw<T, V>* upper, Piece<T, V>& piece)
{
#pragma unroll
    for (int u = 0; u < kPieceVectors; ++u)
    {
        piece.lower[u] = lower[u * kWarp + threadIdx.x % kWarp];
        piece.upper[u] = upper[u * kWarp + threadIdx.x % kWarp];
    }
}

// A block's slice of a pair: pieces [first, end), the warp's first one, and where they lie.
template <typename T, int V>
struct Slice
{
    uint32_t first;
    uint32_t end;
    uint32_t vectors; // of a group
    const Raw<T, V>* lower_x;
    const Raw<T, V>* upper_x;
    Raw<T, V>* lower; // in shared memory
    Raw<T, V>* upper;
    BulkBarrier* barriers;

    __device__ __forceinline__ uint32_t size(uint32_t piece) const
    {
        return min(kPiece, vectors - piece * kPiece);
    }
};

// One thread a warp asks for the warp's pieces, all at once.
template <typename T, int V>
__device__ __forceinline__ void ask(const Slice<T, V>& slice)
{
    if (threadIdx.x % kWarp == 0)
        for (uint32_t piece = slice.first + threadIdx.x / kWarp; piece < slice.end; piece += blockDim.x / kWarp)
        {
            const uint32_t at = (piece - slice.first) * kPiece, bytes = slice.size(piece) * sizeof(Raw<T, V>);
            BulkBarrier* barrier = slice.barriers + (piece - slice.first);
            bulk_init(barrier);
            bulk_expect(barrier, 2 * bytes);
            bulk_load(slice.lower + at, slice.lower_x + piece * kPiece, bytes, barrier);
            bulk_load(slice.upper + at, slice.upper_x + piece * kPiece, bytes, barrier);
        }
    __syncwarp();
}

// Moments of a piece, which lies in shared memory afterwards: where it was copied in bulk, it does already.
template <typename T, int V, bool bulk>
__device__ __forceinline__ Moments take(const Slice<T, V>& slice, uint32_t piece)
{
    const uint32_t vectors = slice.size(piece), lane = threadIdx.x % kWarp;
    const Raw<T, V>* lower_x = slice.lower_x + piece * kPiece;
    const Raw<T, V>* upper_x = slice.upper_x + piece * kPiece;
    Raw<T, V>* lower = slice.lower + (piece - slice.first) * kPiece;
    Raw<T, V>* upper = slice.upper + (piece - slice.first) * kPiece;
    if (vectors == kPiece)
    {
        if constexpr (!bulk)
        {
            Piece<T, V> data;
            load_piece<T, V>(lower_x, upper_x, data);
#pragma unroll
            for (int u = 0; u < kPieceVectors; ++u)
            {
                lower[u * kWarp + lane] = data.lower[u];
                upper[u * kWarp + lane] = data.upper[u];
            }
        }
        return measure_shared<T, V>(lower, upper);
    }
    if constexpr (!bulk)
#pragma unroll 1
        for (uint32_t i = lane; i < vectors; i += kWarp)
        {
            lower[i] = lower_x[i];
            upper[i] = upper_x[i];
        }
    return measure_part<T, V>(lower, upper, vectors);
}

// Moments of the block's pieces, to every block of the cluster: of the lower group, then of the upper.
template <typename T, int V, bool bulk>
__device__ __forceinline__ void gather(const KernelParams& p, const Slice<T, V>& slice, Moments* found)
{
    if constexpr (bulk)
        ask(slice);
    if (p.cluster > 1)
        cluster_start();
    for (uint32_t piece = slice.first + threadIdx.x / kWarp; piece < slice.end; piece += blockDim.x / kWarp)
    {
        if constexpr (bulk)
            bulk_wait(slice.barriers + (piece - slice.first));
        const Moments moments = take<T, V, bulk>(slice, piece);
        const uint32_t lane = threadIdx.x % kWarp;
        if (lane % 16 < 8)
            publish(p, found + lane / 16 * p.pieces_per_group + piece, moments);
    }
    meet(p);
}

// Blocks of the most threads that a multiprocessor's registers should hold: two leave 64 registers a thread, where the compiler
// spills affine maps, and on sm_75 and from sm_100 on others too. Blocks of half the threads, the usual ones, still fit twice.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000)
template <Operator>
constexpr int kFusedBlocks = 1;
#else
template <Operator op>
constexpr int kFusedBlocks = op == Operator::kSru ? 2 : 1;
#endif

template <typename T, Operator op, int V, int run>
__global__ void __launch_bounds__(kFusedThreads, kFusedBlocks<op>) fused_kernel(const __grid_constant__ KernelParams p)
{
    using Data = Raw<T, V>;
    unsigned char* shared = dynamic_shared();
    const uint32_t warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
    const uint32_t pair = blockIdx.x / p.cluster, rank = blockIdx.x % p.cluster;
    const uint32_t sample = pair / p.half_groups, group = pair % p.half_groups;
    const int64_t start = (int64_t{sample} * p.num_groups + group) * p.length;
    Slice<T, V> slice;
    slice.first = min(rank * p.pieces_per_block, p.pieces_per_group);
    slice.end = min(slice.first + p.pieces_per_block, p.pieces_per_group);
    slice.vectors = p.length / V;
    slice.lower_x = reinterpret_cast<const Data*>(static_cast<const T*>(p.x) + start);
    slice.upper_x = slice.lower_x + p.half_elements / V;
    slice.lower = reinterpret_cast<Data*>(shared + p.shared.data);
    slice.upper = slice.lower + p.pieces_per_block * kPiece;
    slice.barriers = reinterpret_cast<BulkBarrier*>(shared + p.shared.barriers);

    Moments* found = reinterpret_cast<Moments*>(shared);
    if (sizeof(Data) == 16 && bulk_copies())
        gather<T, V, sizeof(Data) == 16>(p, slice, found);
    else
        gather<T, V, false>(p, slice, found);

    Group* groups = reinterpret_cast<Group*>(shared + p.shared.groups);
    for (uint32_t half = warp; half < 2; half += warps)
    {
        const Group merged = merge_group(p, found + half * p.pieces_per_group);
        if (lane == 0)
            groups[half] = merged;
    }
    __syncthreads();
    ChannelTable<op> table;
    table.rows = reinterpret_cast<float4*>(shared + p.shared.scratch);
    table.first = p.by_pixels.quotient(slice.first * kPiece * V);
    const uint32_t after = min(slice.end * kPiece * V, p.length); // elements
    table.count = slice.first < slice.end ? p.by_pixels.quotient(after - 1) + 1 - table.first : 0;
    for (uint32_t i = threadIdx.x; i < 2 * table.count; i += blockDim.x)
    {
        const uint32_t half = i >= table.count, channel = i - half * table.count;
        table.write(half, channel,
            load_channel<op>(p, half * p.half_channels + group * p.group_channels + table.first + channel, groups[half]));
    }
    __syncthreads();

    Data* y = reinterpret_cast<Data*>(static_cast<T*>(p.y) + start) + lane;
    for (uint32_t piece = slice.first + warp; piece < slice.end; piece += warps)
    {
        const uint32_t vectors = slice.size(piece), at = (piece - slice.first) * kPiece + lane;
        Data* lower_y = y + piece * kPiece;
        Data* upper_y = lower_y + p.half_elements / V;
        const auto write = [&](int u) {
            const uint32_t element = (piece * kPiece + u * kWarp + lane) * V;
            const uint32_t channel = p.by_pixels.quotient(element);
            Data lower = slice.lower[at + u * kWarp], upper = slice.upper[at + u * kWarp];
            cross_vectors<T, op, V, run>(
                lower, upper, (channel + 1) * p.pixels - element, [&](uint32_t next, Channel& a, Channel& b) {
                    uint32_t row = channel - table.first + next;
                    if constexpr (run != V)
                        row = min(row, table.count - 1);
                    a = table.read(0, row);
                    b = table.read(1, row);
                });
            lower_y[u * kWarp] = lower;
            upper_y[u * kWarp] = upper;
        };
        // both ways in one kernel want registers, which are few where there are bulk copies or affine maps
        if (op == Operator::kSru && !bulk_copies() && vectors == kPiece)
        {
#pragma unroll
            for (int u = 0; u < kPieceVectors; ++u)
                write(u);
            continue;
        }
#pragma unroll
        for (int u = 0; u < kPieceVectors; ++u)
            if (u * kWarp + lane < vectors)
                write(u);
    }
}

// A warp a piece of two groups, which need not be partners.
template <typename T, int V>
__global__ void __launch_bounds__(kSplitThreads) statistics_kernel(const __grid_constant__ KernelParams p)
{
    using Data = Raw<T, V>;
    const int64_t groups = p.batch * p.num_groups, half = (groups + 1) / 2;
    const int64_t index = int64_t{blockIdx.x} * (kSplitThreads / kWarp) + threadIdx.x / kWarp;
    if (index >= half * p.pieces_per_group)
        return;
    const int64_t group = index / p.pieces_per_group, partner = min(group + half, groups - 1);
    const uint32_t piece = static_cast<uint32_t>(index % p.pieces_per_group);
    const uint32_t vectors = min(kPiece, p.length / V - piece * kPiece);
    const auto place = [&](int64_t which) {
        return reinterpret_cast<const Data*>(static_cast<const T*>(p.x) + which * p.length) + piece * kPiece;
    };
    Moments found;
    if (vectors == kPiece)
    {
        Piece<T, V> data;
        load_piece<T, V>(place(group), place(partner), data);
        found = measure_whole<T, V>(data);
    }
    else
    {
        found = measure_part<T, V>(place(group), place(partner), vectors);
    }
    const uint32_t lane = threadIdx.x % kWarp;
    if (lane == 0 || (lane == 16 && group + half < groups)) // the last of an odd number has no partner
        p.pieces[(lane == 0 ? group : partner) * p.pieces_per_group + piece] = found;
}

template <typename T, Operator op, int V, int run>
__global__ void __launch_bounds__(kSplitThreads) apply_kernel(const __grid_constant__ KernelParams p)
{
    using Data = Raw<T, V>;
    // the last first: what the statistics read last is still in the L2
    const uint32_t block = gridDim.x - 1 - blockIdx.x;
    const int64_t sample = block / p.blocks_per_item;
    const uint32_t part = block % p.blocks_per_item;
    const uint32_t vectors = p.half_elements / V;
    const int64_t start = sample * 2 * p.half_elements;
    const Data* lower_x = reinterpret_cast<const Data*>(static_cast<const T*>(p.x) + start);
    const Data* upper_x = lower_x + vectors;
    Data* lower_y = reinterpret_cast<Data*>(static_cast<T*>(p.y) + start);
    Data* upper_y = lower_y + vectors;
    const Group* groups = p.groups + sample * p.num_groups;
    const uint32_t first = part * kPieceVectors * kSplitThreads + threadIdx.x;
    Data lower[kPieceVectors], upper[kPieceVectors];
#pragma unroll
    for (int u = 0; u < kPieceVectors; ++u)
        if (first + u * kSplitThreads < vectors)
        {
            lower[u] = lower_x[first + u * kSplitThreads];
            upper[u] = upper_x[first + u * kSplitThreads];
        }
#pragma unroll
    for (int u = 0; u < kPieceVectors; ++u)
    {
        const uint32_t vector = first + u * kSplitThreads;
        if (vector >= vectors)
            continue;
        const uint32_t element = vector * V, channel = p.by_pixels.quotient(element);
        const Group a = groups[p.by_length.quotient(element)];
        const Group b = groups[p.by_length.quotient(element + p.half_elements)];
        const uint32_t left = (channel + 1) * p.pixels - element;
        cross_vectors<T, op, V, run>(lower[u], upper[u], left, [&](uint32_t next, Channel& own, Channel& other) {
            const uint32_t which = min(channel + next, p.half_channels - 1);
            own = load_channel<op>(p, which, a);
            other = load_channel<op>(p, which + p.half_channels, b);
        });
        lower_y[vector] = lower[u];
        upper_y[vector] = upper[u];
    }
}

} // namespace scconv
