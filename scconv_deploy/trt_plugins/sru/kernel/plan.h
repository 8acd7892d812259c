// Which kernel runs, and how it is launched: one table, from the sizes and the device's queried limits.
//
// Host code without CUDA in it, so that the choices are tested where no GPU is. They have not been tuned on a GPU yet:
// TensorRT measures the algorithms itself (tactics), and benchmarks/sru_cuda.py prints what each choice costs.
#pragma once

#include <cstdint>

#include "../sru_math.h"

namespace scconv {

enum class Algorithm : int32_t { kAuto = 0, kOnChip = 1, kSplit = 2, kGeneral = 3 };

struct Problem
{
    int64_t batch;
    int64_t channels;
    int64_t pixels;
    int32_t num_groups;
    int32_t element_bytes;
    uint32_t alignment; // of x and of y in bytes: the smaller of both
    Algorithm wanted;

    int64_t group_elements() const
    {
        return channels * pixels / num_groups;
    }
    int64_t half_elements() const
    {
        return channels / 2 * pixels;
    }
    // Group g and g + G/2 hold the channels c and c + C/2: the pair can be reconstructed by itself.
    bool paired() const
    {
        return channels % num_groups == 0 && num_groups % 2 == 0;
    }
};

struct Limits
{
    int32_t multiprocessors;
    int32_t shared_bytes_per_block; // opted in: 64 KiB (sm_75) to 227 KiB (sm_90)
};

struct Plan
{
    Algorithm algorithm;
    int32_t vector;       // elements that a thread loads at once
    bool rows;            // every vector lies in one channel
    int32_t threads;      // of the kernel that writes y
    uint32_t shared_bytes;
    uint32_t shared_limit_bytes; // that the device gives a block
    int64_t blocks;       // of the kernel that writes y
    uint32_t pieces;      // into which the statistics kernel cuts a group
};

constexpr int32_t kReductionBytes = 1024;     // of shared memory before the on-chip kernel's data
constexpr int32_t kStatisticsThreads = 256;
constexpr int32_t kStatisticsVectors = 8;     // per thread, held in registers
constexpr int32_t kApplyThreads = 256;
constexpr int32_t kApplyVectors = 4;          // per thread and half
constexpr int32_t kAutoSmallPairBytes = 64 << 10;
constexpr int64_t kMaxSampleElements = int64_t{1} << 30;
constexpr int64_t kMaxElements = int64_t{1} << 40; // no product of sizes leaves 64 bits
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

// Threads of the on-chip kernel: enough for the loads in flight to cover the memory's latency with the one or few
// blocks that fit on a multiprocessor.
struct OnChipRow
{
    int64_t pair_bytes;
    int32_t threads;
};
constexpr OnChipRow kOnChipTable[] = {{8 << 10, 128}, {32 << 10, 256}, {96 << 10, 512}, {INT64_MAX, 1024}};

inline int64_t ceil_divide(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

// The widest vector of 16 bytes or less that divides half a sample, so that the partner's elements, the next sample's
// and the output's lie at the same place within their vectors.
inline int32_t widest_vector(const Problem& problem)
{
    int32_t vector = 16 / problem.element_bytes;
    const auto fits = [&](int32_t v) {
        return problem.half_elements() % v == 0
            && problem.alignment % static_cast<uint32_t>(v * problem.element_bytes) == 0;
    };
    while (vector > 1 && !fits(vector))
        vector = vector > 4 ? 4 : 1; // the widths that are compiled
    return vector;
}

inline uint32_t statistics_pieces(int64_t group_elements, int32_t vector)
{
    // one vector more than the elements need, for a group may start inside one
    const int64_t vectors = ceil_divide(group_elements, vector) + (vector > 1 ? 1 : 0);
    return static_cast<uint32_t>(ceil_divide(vectors, kStatisticsThreads * kStatisticsVectors));
}

// Workspace of any algorithm for these sizes or smaller ones: pieces of 16 bytes each, then 16 bytes per group.
inline uint64_t workspace_bytes(const Problem& problem)
{
    const int64_t groups = problem.batch * problem.num_groups;
    const int64_t pieces = statistics_pieces(problem.group_elements(), 1) + 1;
    return static_cast<uint64_t>(groups * (pieces + 1)) * sizeof(Moments);
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
    return nullptr;
}

inline Plan make_plan(const Problem& problem, const Limits& limits)
{
    Plan plan{};
    plan.shared_limit_bytes = static_cast<uint32_t>(limits.shared_bytes_per_block);
    const int64_t length = problem.group_elements();
    plan.vector = widest_vector(problem);
    // where a narrower vector of at least 8 bytes lies within one channel, it spares looking channels up per element
    if (problem.pixels % plan.vector != 0 && plan.vector * problem.element_bytes == 16 && plan.vector > 4
        && problem.pixels % 4 == 0)
        plan.vector = 4;
    plan.rows = problem.pixels % plan.vector == 0;
    plan.pieces = statistics_pieces(length, plan.vector);

    const int64_t vectors = ceil_divide(length, plan.vector) + (plan.rows ? 0 : 1);
    const int64_t pair_bytes = 2 * vectors * plan.vector * problem.element_bytes;
    const int64_t pairs = problem.batch * problem.num_groups / 2;
    const bool fits = pair_bytes + kReductionBytes <= limits.shared_bytes_per_block;
    // few large pairs would leave most multiprocessors idle
    const bool few = pairs * 4 < limits.multiprocessors && pair_bytes > kAutoSmallPairBytes;
    if (!problem.paired() || problem.wanted == Algorithm::kGeneral)
        plan.algorithm = Algorithm::kGeneral;
    else if (!fits || problem.wanted == Algorithm::kSplit || (problem.wanted == Algorithm::kAuto && few))
        plan.algorithm = Algorithm::kSplit;
    else
        plan.algorithm = Algorithm::kOnChip;

    if (plan.algorithm == Algorithm::kOnChip)
    {
        const OnChipRow* row = kOnChipTable;
        while (pair_bytes > row->pair_bytes)
            ++row;
        plan.threads = row->threads;
        while (plan.threads > 32 && plan.threads / 2 >= vectors)
            plan.threads /= 2;
        plan.shared_bytes = static_cast<uint32_t>(kReductionBytes + pair_bytes);
        plan.blocks = pairs;
        return plan;
    }
    plan.threads = kApplyThreads;
    const int64_t per_block = int64_t{kApplyThreads} * kApplyVectors * plan.vector;
    if (plan.algorithm == Algorithm::kSplit)
        plan.blocks = pairs * ceil_divide(vectors * plan.vector, per_block);
    else
        plan.blocks = problem.batch * ceil_divide(problem.half_elements(), per_block);
    return plan;
}

} // namespace scconv
