// The kernels on the CPU: the same header, the same plan, the same order of every sum, one thread after the other.
//
// For tests and benchmarks where no GPU is. What it cannot show is what only hardware has: races, alignment, launches.
// Compile with -ffp-contract=off, or the compiler rounds elsewhere than the GPU does.

#include <algorithm>
#include <cstring>
#include <vector>

#include "../kernel/plan.h"

using namespace scconv;

namespace {

struct ReferenceParams
{
    const float* x; // values of the data type, as float
    float* y;
    uint8_t* open;
    const float* cut;
    const float* sign;
    const float* first;
    const float* second;
    int64_t batch;
    int64_t channels;
    int64_t pixels;
    int32_t num_groups;
    int32_t ddof;
    float eps_var;
    float eps_std;
    int32_t op;
    int32_t type; // 0 float, 1 half, 2 bfloat16
    int32_t layout; // in whose order sums are added up; x and y are [N, C, H, W] here
    int32_t algorithm;
    int32_t multiprocessors;
    int32_t shared_bytes;
    int32_t clusters;
};

struct Round
{
    int32_t type;

    float operator()(float value) const
    {
        if (type == 1)
            return static_cast<float>(static_cast<_Float16>(value));
        if (type == 2)
        {
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof(bits));
            if (value == value) // to nearest, ties to even
                bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
            std::memcpy(&value, &bits, sizeof(bits));
        }
        return value;
    }
};

// sum_warp() of moments.cuh, and what halve() makes of it: lanes by halves.
float sum_warp(std::vector<float> lanes)
{
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        for (int i = 0; i < offset; ++i)
            lanes[i] = add(lanes[i], lanes[i + offset]);
    return lanes[0];
}

float sum_of(const float* value, int width)
{
    return width == 1 ? value[0] : add(sum_of(value, width / 2), sum_of(value + width / 2, width / 2));
}

// Moments of runs of elements that threads take one after the other: thread_of[i] has the i-th run. Where there are more
// threads than a warp's lanes, lane t % 32 adds up the sums of the threads t.
Moments measure(const std::vector<float>& values, int32_t run, const std::vector<int32_t>& thread_of, int32_t threads)
{
    std::vector<float> sums(threads, 0.0f), squares(threads, 0.0f);
    const auto total = [&](const std::vector<float>& of_threads) {
        if (threads == kWarp)
            return sum_warp(of_threads);
        std::vector<float> lanes(kWarp, 0.0f);
        for (int32_t i = 0; i < threads; ++i)
            lanes[i % kWarp] = add(lanes[i % kWarp], of_threads[i]);
        return sum_warp(lanes);
    };
    const float count = static_cast<float>(values.size());
    for (size_t i = 0; i < thread_of.size(); ++i)
    {
        float& sum = sums[thread_of[i]];
        sum = add(sum, sum_of(&values[i * run], run));
    }
    const float mean = divide(total(sums), count);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (size_t i = 0; i < thread_of.size(); ++i)
    {
        CentredSums centred{sums[thread_of[i]], squares[thread_of[i]]};
        for (int32_t k = 0; k < run; ++k)
            accumulate(centred, values[i * run + k], mean);
        sums[thread_of[i]] = centred.sum;
        squares[thread_of[i]] = centred.squares;
    }
    const CentredSums centred{total(sums), total(squares)};
    return moments(count, mean, centred, divide(centred.sum, count));
}

// A piece of linear.cuh: 128 vectors, lane after lane.
Moments linear_piece(const float* group, int64_t length, const Plan& plan, int64_t piece)
{
    const int64_t size = int64_t{kWarp} * kPieceVectors * plan.vector, first = piece * size;
    const std::vector<float> values(group + first, group + std::min(first + size, length));
    std::vector<int32_t> lanes(values.size() / plan.vector);
    for (size_t i = 0; i < lanes.size(); ++i)
        lanes[i] = static_cast<int32_t>(i % kWarp);
    return measure(values, plan.vector, lanes, kWarp);
}

// A tile of channels_last.cuh, the columns of one group: slot after slot.
Moments tile_piece(const float* group, const Problem& problem, const Plan& plan, int64_t tile)
{
    const int64_t wide = problem.group_channels() / plan.run, slots = plan.tile.slots;
    std::vector<float> values;
    std::vector<int32_t> columns;
    for (int64_t u = 0; u < kPieceVectors; ++u)
        for (int64_t slot = 0; slot < slots; ++slot)
        {
            const int64_t pixel = (tile * kPieceVectors + u) * slots + slot;
            for (int64_t k = 0; pixel < problem.pixels && k < wide; ++k)
            {
                for (int64_t i = 0; i < plan.run; ++i)
                    values.push_back(group[(k * plan.run + i) * problem.pixels + pixel]);
                columns.push_back(static_cast<int32_t>(slot * wide + k));
            }
        }
    // lanes without a column add nothing
    return measure(values, plan.run, columns, static_cast<int32_t>(std::max<int64_t>(slots * wide, kWarp)));
}

// merge_group() of moments.cuh.
Moments merge(const std::vector<Moments>& pieces, float length)
{
    std::vector<float> lanes(kWarp, 0.0f);
    for (size_t i = 0; i < pieces.size(); ++i)
        lanes[i % kWarp] = add(lanes[i % kWarp], weighted_shift(pieces[i], pieces[0].mean));
    const float rest = divide(sum_warp(lanes), length);
    std::fill(lanes.begin(), lanes.end(), 0.0f);
    for (size_t i = 0; i < pieces.size(); ++i)
        lanes[i % kWarp] = add(lanes[i % kWarp], shifted_squares(pieces[i], pieces[0].mean, rest));
    return {length, pieces[0].mean, rest, sum_warp(lanes)};
}

Group statistics(const ReferenceParams& p, const Problem& problem, const Plan& plan, int64_t group)
{
    const int64_t length = problem.group_elements();
    const float* values = p.x + group * length;
    std::vector<Moments> pieces;
    for (int64_t piece = 0; piece < plan.pieces; ++piece)
        pieces.push_back(problem.layout == Layout::kLinear ? linear_piece(values, length, plan, piece)
                                                           : tile_piece(values, problem, plan, piece));
    const Moments found = merge(pieces, static_cast<float>(length));
    return group_statistics(found, static_cast<float>(length - p.ddof), p.eps_var, p.eps_std);
}

template <Operator op>
void apply(const ReferenceParams& p, const Problem& problem, const std::vector<Group>& groups)
{
    const Divisor by_pixels = make_divisor(static_cast<uint32_t>(p.pixels));
    const Divisor by_length = make_divisor(static_cast<uint32_t>(problem.group_elements()));
    const int64_t half = problem.half_elements();
    const Round round{p.type};
    const auto channel_of = [&](uint32_t channel, const Group& group) {
        const bool affine = op != Operator::kSru;
        return prepare_channel<op>(group, p.cut[channel], p.sign[channel], affine ? p.first[channel] : 0.0f,
            affine ? p.second[channel] : 0.0f);
    };
    for (int64_t n = 0; n < p.batch; ++n)
        for (int64_t i = 0; i < half; ++i)
        {
            const uint32_t lower = static_cast<uint32_t>(i), upper = static_cast<uint32_t>(i + half);
            const Group& a = groups[n * p.num_groups + by_length.quotient(lower)];
            const Group& b = groups[n * p.num_groups + by_length.quotient(upper)];
            const Channel lower_channel = channel_of(by_pixels.quotient(lower), a);
            const Channel upper_channel = channel_of(by_pixels.quotient(upper), b);
            const int64_t at = n * 2 * half + i;
            const Gated own = gated<op>(p.x[at], lower_channel, round);
            const Gated other = gated<op>(p.x[at + half], upper_channel, round);
            p.y[at] = round(reconstruct<op>(own, other));
            p.y[at + half] = round(reconstruct<op>(other, own));
            p.open[at] = opened(p.x[at], lower_channel) != 0.0f;
            p.open[at + half] = opened(p.x[at + half], upper_channel) != 0.0f;
        }
}

Problem problem_of(const ReferenceParams& p)
{
    return {p.batch, p.channels, p.pixels, p.num_groups, p.type == 0 ? 4 : 2, static_cast<Layout>(p.layout),
        static_cast<Algorithm>(p.algorithm)};
}

Plan plan_of(const ReferenceParams& p)
{
    return make_plan(problem_of(p), {p.multiprocessors, p.shared_bytes, p.clusters != 0});
}

} // namespace

extern "C" {

const char* reference_refusal(const ReferenceParams* p)
{
    return refusal(problem_of(*p), p->ddof);
}

uint64_t reference_workspace_bytes(const ReferenceParams* p)
{
    return workspace_bytes(problem_of(*p));
}

// algorithm, vector, run, pieces, threads, blocks, cluster, pieces per block, shared bytes
void reference_plan(const ReferenceParams* p, int64_t* out)
{
    const Plan plan = plan_of(*p);
    const int64_t values[] = {static_cast<int64_t>(plan.algorithm), plan.vector, plan.run, plan.pieces, plan.threads,
        plan.blocks, plan.cluster, plan.pieces_per_block, plan.shared_bytes};
    std::copy(std::begin(values), std::end(values), out);
}

uint32_t reference_quotient(uint32_t n, uint32_t divisor)
{
    return make_divisor(divisor).quotient(n);
}

void reference_sru(const ReferenceParams* p)
{
    const Problem problem = problem_of(*p);
    const Plan plan = plan_of(*p);
    std::vector<Group> groups;
    for (int64_t group = 0; group < p->batch * p->num_groups; ++group)
        groups.push_back(statistics(*p, problem, plan, group));
    switch (static_cast<Operator>(p->op))
    {
    case Operator::kSru: return apply<Operator::kSru>(*p, problem, groups);
    case Operator::kSruNorm: return apply<Operator::kSruNorm>(*p, problem, groups);
    case Operator::kSruSoft: return apply<Operator::kSruSoft>(*p, problem, groups);
    }
}

} // extern "C"
