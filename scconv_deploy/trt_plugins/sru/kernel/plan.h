// Which kernel runs, and how it is launched: one table, from the sizes and the device's queried limits.
//
// Host code without CUDA in it, so that the choices are tested where no GPU is. They have not been tuned on a GPU yet:
// TensorRT measures the algorithms itself (tactics), and benchmarks/sru_cuda.py prints what each choice costs.
//
// What decides how sums are added up (vector, run, pieces, threads of a tile) hangs on the sizes, the type and the layout:
// not on the batch, the algorithm or the device. So a sample's gates are the same wherever it stands and whatever computes
// them; but LINEAR and channels-last add up in different orders.
#pragma once

#include <cstdint>

#include "../sru_math.h"

namespace scconv {

enum class Algorithm : int32_t { kAuto = 0, kOnChip = 1, kSplit = 2 };
enum class Layout : int32_t { kLinear = 0, kChannelsLast = 1 };

struct Problem
{
    int64_t batch;
    int64_t channels;
    int64_t pixels;
    int32_t num_groups;
    int32_t element_bytes;
    Layout layout;
    Algorithm wanted;

    int64_t group_elements() const
    {
        return channels * pixels / num_groups;
    }
    int64_t half_elements() const
    {
        return channels / 2 * pixels;
    }
    int64_t group_channels() const
    {
        return channels / num_groups;
    }
    // Groups are of whole channels.
    bool whole() const
    {
        return channels % num_groups == 0;
    }
    // Group g and g + G/2 hold the channels c and c + C/2: the pair can be reconstructed by itself.
    bool paired() const
    {
        return whole() && num_groups % 2 == 0;
    }
};

struct Limits
{
    int32_t multiprocessors;
    int32_t shared_bytes_per_block; // opted in: 64 KiB (sm_75) to 227 KiB (sm_90)
    bool clusters;                  // blocks that read each other's shared memory: sm_90 and later
};

// Channels-last: a block takes some pixels of `channels` channels of the lower half and their partners. A thread owns
// one vector of channels of either half, in kPieceVectors pixels that lie `slots` apart.
struct Tile
{
    uint32_t threads;
    uint32_t channels;
    uint32_t blocks; // of channels, in a sample
    uint32_t slots;  // pixels that a block reads at once
    Divisor by_vectors; // vectors of channels / vector
};

// Where things begin in a block's shared memory, in bytes; the moments are at 0.
struct SharedLayout
{
    uint32_t groups;
    uint32_t scratch; // LINEAR: channels; channels-last: sums that the block adds up
    uint32_t barriers;
    uint32_t data;
};

struct Plan
{
    Algorithm algorithm;
    int32_t vector;  // elements that a thread loads at once
    int32_t run;     // LINEAR: vector where every vector lies in one channel, else 1; channels-last: the same of groups
    uint32_t pieces; // of a group, each with moments of its own
    int32_t threads; // of the kernel that writes y
    int64_t blocks;
    uint32_t cluster;
    uint32_t pieces_per_block; // on chip
    uint32_t shared_bytes;
    SharedLayout shared;
    Tile tile;
};

constexpr int32_t kPieceVectors = 4; // that a thread has of either half
constexpr int32_t kWarp = 32;
constexpr int32_t kTileThreads = 256;
constexpr int32_t kFusedThreads = 512; // at most
constexpr int32_t kSplitThreads = 256;
constexpr int32_t kMaxCluster = 8; // that every device with clusters gives
constexpr int32_t kSliceBytes = 52 << 10; // of shared memory: four blocks a multiprocessor of 227 KiB
constexpr int32_t kDefaultSharedBytes = 48 << 10; // that a kernel needs no permission for
constexpr int32_t kAutoBytes = 64 << 10;
constexpr int32_t kChannelBytes = 32; // of a channel's thresholds in shared memory
constexpr int32_t kSegmentBytes = 128; // of a pixel's channels that are worth a block of their own
constexpr int64_t kMaxSampleElements = int64_t{1} << 30;
constexpr int64_t kMaxElements = int64_t{1} << 40; // no product of sizes leaves 64 bits
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

inline int64_t ceil_divide(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

constexpr int64_t aligned(int64_t bytes)
{
    return (bytes + 15) / 16 * 16;
}

// The widest vector that lies in one group: of 16 bytes, 4 elements or 1, the widths that are compiled.
inline int32_t widest_vector(const Problem& problem)
{
    int32_t vector = 16 / problem.element_bytes;
    const auto fits = [&](int32_t v) {
        if (problem.layout == Layout::kChannelsLast)
            return (v == 1 || v * problem.element_bytes == 16) && problem.channels / 2 % v == 0;
        // the partner lies at the same place within its vector, and a vector meets two channels at most
        return problem.group_elements() % v == 0 && problem.half_elements() % v == 0
            && (problem.pixels >= v || v == 1);
    };
    while (vector > 1 && !fits(vector))
        vector = vector > 4 ? 4 : 1;
    return vector;
}

// Channels-last: the fewest pairs of groups whose channels fill a segment of memory.
inline Tile make_tile(const Problem& problem, int32_t vector)
{
    const int64_t half = problem.channels / 2;
    int64_t channels = half;
    if (problem.paired())
        for (int64_t pairs = 1; pairs < problem.num_groups / 2; ++pairs)
        {
            const int64_t wide = pairs * problem.group_channels();
            if (problem.num_groups / 2 % pairs == 0 && wide % vector == 0 && wide * problem.element_bytes >= kSegmentBytes)
            {
                channels = wide;
                break;
            }
        }
    const int64_t vectors = channels / vector;
    int64_t threads = kTileThreads;
    while (threads > kWarp && threads / 2 >= vectors && threads / 2 / vectors * kPieceVectors >= problem.pixels)
        threads /= 2;
    return {static_cast<uint32_t>(threads), static_cast<uint32_t>(channels), static_cast<uint32_t>(half / channels),
        static_cast<uint32_t>(threads / vectors), make_divisor(static_cast<uint32_t>(vectors))};
}

// What does not hang on batch, algorithm and device.
inline Plan make_sums(const Problem& problem)
{
    Plan plan{};
    plan.vector = widest_vector(problem);
    if (problem.layout == Layout::kLinear)
    {
        plan.run = problem.pixels % plan.vector == 0 && (plan.vector == 1 || plan.vector * problem.element_bytes == 16)
            ? plan.vector
            : 1;
        plan.pieces = static_cast<uint32_t>(ceil_divide(problem.group_elements(), kWarp * kPieceVectors * plan.vector));
        return plan;
    }
    plan.run = problem.group_channels() % plan.vector == 0 ? plan.vector : 1;
    plan.tile = make_tile(problem, plan.vector);
    plan.pieces = static_cast<uint32_t>(ceil_divide(problem.pixels, plan.tile.slots * kPieceVectors));
    return plan;
}

// Workspace of the split algorithm for these sizes or smaller ones: moments of each piece, then statistics of each group.
inline uint64_t workspace_bytes(const Problem& problem)
{
    const int64_t groups = problem.batch * problem.num_groups;
    // LINEAR: smaller sizes may have narrower vectors and so more pieces: one element a vector is the worst
    const int64_t pieces = problem.layout == Layout::kLinear
        ? ceil_divide(problem.group_elements(), kWarp * kPieceVectors)
        : int64_t{make_sums(problem).pieces};
    return static_cast<uint64_t>(groups * (pieces + 1)) * sizeof(Moments);
}

// Bytes of shared memory of a block that holds plan.pieces_per_block pieces of a cluster's plan.pieces.
inline int64_t lay_out(const Problem& problem, Plan& plan)
{
    const bool linear = problem.layout == Layout::kLinear;
    const int64_t vector_bytes = int64_t{plan.vector} * problem.element_bytes;
    const int64_t held = plan.pieces_per_block;
    const int64_t groups = linear ? 2 : 2 * int64_t{plan.tile.channels} / problem.group_channels();
    int64_t scratch = 0, threads = kWarp;
    if (linear)
    {
        const int64_t channels = ceil_divide(held * kWarp * kPieceVectors * plan.vector, problem.pixels) + 1;
        scratch = 2 * (channels < problem.group_channels() ? channels : problem.group_channels()) * kChannelBytes;
    }
    else
    {
        threads = plan.tile.threads;
        scratch = (2 * int64_t{plan.tile.slots} * 2 * plan.tile.channels / plan.run + groups) * int64_t{sizeof(float)};
    }
    const int64_t moments = held == 0 ? 0 : groups * plan.pieces * int64_t{sizeof(Moments)};
    const int64_t barriers = aligned(moments) + aligned(groups * int64_t{sizeof(Group)}) + aligned(scratch);
    const int64_t data = barriers + (linear ? aligned(held * 8) : 0);
    plan.shared = {static_cast<uint32_t>(aligned(moments)),
        static_cast<uint32_t>(aligned(moments) + aligned(groups * int64_t{sizeof(Group)})),
        static_cast<uint32_t>(barriers), static_cast<uint32_t>(data)};
    return data + held * 2 * kPieceVectors * threads * vector_bytes;
}

// Shared memory of a block that measures a tile, of so many pixels that the tile is as large as it gets.
inline int64_t tile_scratch_bytes(Problem problem)
{
    problem.pixels = kTileThreads * kPieceVectors;
    Plan plan = make_sums(problem);
    return lay_out(problem, plan);
}

inline const char* refusal(const Problem& problem, int32_t ddof)
{
    // an empty batch is none to refuse: PyTorch and TensorRT hand one on, and nothing is to be done for it
    if (problem.batch < 0 || problem.channels < 1 || problem.pixels < 1)
        return "a size is not positive";
    if (problem.channels % 2 != 0)
        return "the channels cannot be crossed in two halves: their number is odd";
    if (problem.num_groups < 1 || problem.num_groups > problem.channels)
        return "num_groups is not between 1 and the number of channels";
    if (problem.channels > kMaxSampleElements / problem.pixels)
        return "a sample has more than 2^30 elements";
    if (problem.batch > kMaxElements / (problem.channels * problem.pixels))
        return "x has more than 2^40 elements";
    if (problem.channels * problem.pixels % problem.num_groups != 0)
        return "C*H*W is not a multiple of num_groups";
    if (ddof != 0 && ddof != 1)
        return "ddof is neither 0 nor 1";
    if (problem.group_elements() < 2)
        return "each group has one element, whose unbiased deviation is not a number";
    if (problem.layout == Layout::kChannelsLast && !problem.whole())
        return "channels-last: num_groups does not divide the channels";
    if (problem.layout == Layout::kChannelsLast && make_tile(problem, widest_vector(problem)).slots == 0)
        return "channels-last: a block's channels are more than 256 vectors";
    if (problem.layout == Layout::kChannelsLast && tile_scratch_bytes(problem) > kDefaultSharedBytes)
        return "channels-last: too many groups";
    return nullptr;
}

// On chip: into how many blocks what is reconstructed together is cut. More where a slice is large, so that several blocks
// share a multiprocessor, and where there are few of them. False where not even the most hold it.
inline bool choose_cluster(const Problem& problem, const Limits& limits, Plan& plan, int64_t items)
{
    plan.cluster = 0;
    for (uint32_t blocks = 1; blocks <= (limits.clusters ? kMaxCluster : 1); ++blocks)
    {
        Plan found = plan;
        found.pieces_per_block = static_cast<uint32_t>(ceil_divide(plan.pieces, blocks));
        if (ceil_divide(plan.pieces, found.pieces_per_block) < blocks)
            continue; // one would have nothing
        const int64_t bytes = lay_out(problem, found);
        if (bytes > limits.shared_bytes_per_block)
            continue;
        found.cluster = blocks;
        found.shared_bytes = static_cast<uint32_t>(bytes);
        plan = found;
        if (bytes <= kSliceBytes && items * blocks >= 2 * int64_t{limits.multiprocessors})
            break;
    }
    return plan.cluster != 0;
}

inline Plan make_plan(const Problem& problem, const Limits& limits)
{
    Plan plan = make_sums(problem);
    const bool linear = problem.layout == Layout::kLinear;
    const int64_t items = problem.batch * (linear ? problem.num_groups / 2 : plan.tile.blocks);
    const bool possible = (problem.paired() || !linear) && problem.wanted != Algorithm::kSplit;
    if (possible && choose_cluster(problem, limits, plan, items))
    {
        // without clusters, few large items would leave most multiprocessors idle
        const bool few = !limits.clusters && items * 4 < limits.multiprocessors && plan.shared_bytes > kAutoBytes;
        if (!few || problem.wanted == Algorithm::kOnChip)
        {
            plan.algorithm = Algorithm::kOnChip;
            plan.blocks = items * plan.cluster;
            plan.threads = static_cast<int32_t>(plan.tile.threads);
            if (linear) // warps that have the same number of pieces, or one less
            {
                const int32_t most = plan.shared_bytes > kSliceBytes ? kFusedThreads / kWarp : kSplitThreads / kWarp;
                const int64_t rounds = ceil_divide(plan.pieces_per_block, most);
                plan.threads = static_cast<int32_t>(kWarp * ceil_divide(plan.pieces_per_block, rounds));
            }
            return plan;
        }
    }
    plan.algorithm = Algorithm::kSplit;
    plan.cluster = 1;
    plan.pieces_per_block = 0;
    plan.shared_bytes = linear ? 0 : static_cast<uint32_t>(lay_out(problem, plan));
    plan.threads = linear ? kSplitThreads : static_cast<int32_t>(plan.tile.threads);
    const int64_t per_block = int64_t{kSplitThreads} * kPieceVectors * plan.vector;
    plan.blocks = problem.batch
        * (linear ? ceil_divide(problem.half_elements(), per_block) : int64_t{plan.tile.blocks} * plan.pieces);
    return plan;
}

} // namespace scconv
