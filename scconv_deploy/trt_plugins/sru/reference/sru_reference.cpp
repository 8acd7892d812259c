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
    int32_t algorithm;
    int32_t alignment;
    int32_t multiprocessors;
    int32_t shared_bytes;
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

// reduce_block() of device.cuh: lanes by halves, then warps by halves.
float reduce_32(float* values)
{
    for (int offset = 16; offset > 0; offset /= 2)
        for (int i = 0; i < offset; ++i)
            values[i] = add(values[i], values[i + offset]);
    return values[0];
}

float reduce(std::vector<float> values)
{
    if (values.size() == 32)
        return reduce_32(values.data());
    float warps[32] = {};
    for (size_t warp = 0; warp * 32 < values.size(); ++warp)
        warps[warp] = reduce_32(values.data() + warp * 32);
    return reduce_32(warps);
}

float sum_of(const float* value, int width)
{
    return width == 1 ? value[0] : add(sum_of(value, width / 2), sum_of(value + width / 2, width / 2));
}

// A block's moments of the vectors [begin, end) of a group; thread t takes begin + t, begin + t + threads, ...
Moments block_moments(const float* group, int64_t length, int64_t phase, int width, int64_t begin, int64_t end, int threads)
{
    std::vector<float> sums(threads, 0.0f), squares(threads, 0.0f);
    float value[8];
    int64_t count = 0;
    for (int64_t vector = begin; vector < end; ++vector)
    {
        for (int i = 0; i < width; ++i)
        {
            const int64_t element = vector * width + i - phase;
            const bool inside = element >= 0 && element < length;
            value[i] = inside ? group[element] : 0.0f;
            count += inside;
        }
        float& sum = sums[(vector - begin) % threads];
        sum = add(sum, sum_of(value, width));
    }
    if (count == 0)
        return {};
    const float mean = divide(reduce(sums), static_cast<float>(count));
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t vector = begin; vector < end; ++vector)
        for (int i = 0; i < width; ++i)
        {
            const int64_t element = vector * width + i - phase;
            const size_t thread = static_cast<size_t>((vector - begin) % threads);
            CentredSums centred{sums[thread], squares[thread]};
            accumulate(centred, element >= 0 && element < length ? group[element] : mean, mean);
            sums[thread] = centred.sum;
            squares[thread] = centred.squares;
        }
    return moments(static_cast<float>(count), mean, {reduce(sums), reduce(squares)});
}

// merge_group() of split.cuh.
Moments merge(const std::vector<Moments>& pieces, float length)
{
    std::vector<float> lanes(32, 0.0f);
    for (size_t i = 0; i < pieces.size(); ++i)
        if (pieces[i].count > 0.0f)
            lanes[i % 32] = add(lanes[i % 32], weighted_shift(pieces[i], pieces[0].mean));
    const float rest = divide(reduce(lanes), length);
    std::fill(lanes.begin(), lanes.end(), 0.0f);
    for (size_t i = 0; i < pieces.size(); ++i)
        if (pieces[i].count > 0.0f)
            lanes[i % 32] = add(lanes[i % 32], shifted_squares(pieces[i], pieces[0].mean, rest));
    return {length, pieces[0].mean, rest, reduce(lanes)};
}

Group statistics(const ReferenceParams& p, const Problem& problem, const Plan& plan, int64_t group)
{
    const int64_t length = problem.group_elements(), phase = group * length % plan.vector;
    const float* values = p.x + group * length;
    const int64_t vectors = ceil_divide(phase + length, plan.vector);
    Moments found{};
    if (plan.algorithm == Algorithm::kOnChip)
    {
        found = block_moments(values, length, phase, plan.vector, 0, vectors, plan.threads);
    }
    else
    {
        const int64_t step = int64_t{kStatisticsThreads} * kStatisticsVectors;
        std::vector<Moments> pieces;
        for (int64_t piece = 0; piece < plan.pieces; ++piece)
            pieces.push_back(block_moments(values, length, phase, plan.vector, std::min(piece * step, vectors),
                std::min((piece + 1) * step, vectors), kStatisticsThreads));
        found = merge(pieces, static_cast<float>(length));
    }
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
            const Parts own = split<op>(p.x[at], a.mean, lower_channel, round);
            const Parts other = split<op>(p.x[at + half], b.mean, upper_channel, round);
            p.y[at] = round(reconstruct(own, other));
            p.y[at + half] = round(reconstruct(other, own));
            p.open[at] = is_open(subtract(p.x[at], a.mean), lower_channel);
            p.open[at + half] = is_open(subtract(p.x[at + half], b.mean), upper_channel);
        }
}

Problem problem_of(const ReferenceParams& p)
{
    return {p.batch, p.channels, p.pixels, p.num_groups, p.type == 0 ? 4 : 2, static_cast<uint32_t>(p.alignment),
        static_cast<Algorithm>(p.algorithm)};
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

// algorithm, vector, rows, threads, shared bytes, blocks, pieces
void reference_plan(const ReferenceParams* p, int64_t* out)
{
    const Plan plan = make_plan(problem_of(*p), {p->multiprocessors, p->shared_bytes});
    const int64_t values[] = {static_cast<int64_t>(plan.algorithm), plan.vector, plan.rows, plan.threads,
        plan.shared_bytes, plan.blocks, plan.pieces};
    std::copy(std::begin(values), std::end(values), out);
}

uint32_t reference_quotient(uint32_t n, uint32_t divisor)
{
    return make_divisor(divisor).quotient(n);
}

void reference_sru(const ReferenceParams* p)
{
    const Problem problem = problem_of(*p);
    const Plan plan = make_plan(problem, {p->multiprocessors, p->shared_bytes});
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
