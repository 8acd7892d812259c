// The fused SRU on the CPU: what is computed of a group, and which path the data take.
//
//   mean_g, SS_g    blocks of 2048 elements have moments of their own, in one reading of memory; merged in double
//   s_g             = sqrt(SS_g / (L - ddof) + eps_var) + eps_std
//   open            <=> sign_c * (x - mean0) >= threshold_c         mean_g = mean0 + rest, mean0 in float32
//   threshold_c     = s_g * cut_c + sign_c * rest, in double, rounded once
//   y               = concat(lower.open + upper.closed, upper.open + lower.closed)
//
// Two paths, the same bytes:
//   pairs      a task is a group and its partner half the channels away, from statistics to y: x comes from memory once
//   split      statistics of all groups, then y, each spread over the threads: where groups have no partner (an odd number
//              of groups, or groups that begin inside a channel), and where there are fewer pairs than processors
#include "sru.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace scconv::cpu {
namespace {

constexpr int64_t kBlocksAtOnce = 16;      // of a task of the split path
constexpr int64_t kElementsAtOnce = 32768; // a task of the split path has about so many
// A tensor of fewer has one thread. On two cores (AMD EPYC, Zen 3) two threads take as long for 200,704 elements as one, and
// 0.75 of its time for 802,816.
constexpr int64_t kElementsForThreads = int64_t{1} << 18;
constexpr int64_t kLargestSample = int64_t{1} << 40;
constexpr int64_t kElementBytes[kTypes] = {4, 2, 2};

// --- the processor ---

const Kernels& kernels_of(int32_t lanes) noexcept
{
#if defined(__x86_64__)
    if (lanes == 16)
        return kKernels16;
    if (lanes == 8)
        return kKernels8;
#endif
    (void)lanes;
    return kKernels4;
}

int32_t most_lanes() noexcept
{
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl"))
        return 16;
    // the system saves the registers of avx2, so those of F16C too
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c)
        return 8;
#endif
    return 4;
}

int64_t processors() noexcept
{
    static const int64_t count = std::thread::hardware_concurrency(); // for which glibc reads files: 10 us a call
    return count;
}

// --- a call ---

struct Call
{
    const ScconvSruCpuParams& p;
    const Kernels& kernels;
    int64_t half;       // C / 2
    int64_t sample;     // elements of a sample
    int64_t group_size; // L
    int64_t blocks;     // of a group

    explicit Call(const ScconvSruCpuParams& params)
        : p(params), kernels(kernels_of(params.lanes ? params.lanes : scconv_sru_cpu_lanes())),
          half(params.channels / 2), sample(params.channels * params.pixels), group_size(sample / params.num_groups),
          blocks((group_size + kBlock - 1) / kBlock)
    {
    }

    const char* x(int64_t element) const noexcept
    {
        return static_cast<const char*>(p.x) + element * kElementBytes[p.type];
    }
    char* y(int64_t element) const noexcept { return static_cast<char*>(p.y) + element * kElementBytes[p.type]; }

    void measure(int64_t first, int64_t count, Moments* found) const noexcept
    {
        kernels.measure[p.type](x(first), count, found);
    }

    Group group(const Moments* moments) const noexcept;
};

// Merge blocks (Chan et al. 1979), in their order.
Group Call::group(const Moments* moments) const noexcept
{
    const auto count = [&](int64_t b) { return double(std::min(kBlock, group_size - b * kBlock)); };
    double sum = 0.0, squares = 0.0;
    for (int64_t b = 0; b < blocks; ++b)
        sum += count(b) * moments[b].mean;
    const double mean = sum / double(group_size);
    for (int64_t b = 0; b < blocks; ++b)
    {
        const double shift = moments[b].mean - mean;
        squares += moments[b].squares + count(b) * shift * shift;
    }
    const double variance = squares / double(group_size - p.ddof);
    const float mean0 = static_cast<float>(mean);
    return {std::sqrt(variance + p.eps_var) + p.eps_std, mean0, mean - mean0};
}

// Channels lower, lower + 1, ... of a sample with their partners half the channels away, `pixels` elements of each from
// `at` on. Each of the two rows of channels lies in one group.
void reconstruct(const Call& call, int64_t n, int64_t lower, int64_t channels, int64_t at, int64_t pixels,
    const Group& group0, const Group& group1) noexcept
{
    const ScconvSruCpuParams& p = call.p;
    const int64_t first = n * call.sample + lower * p.pixels + at, second = first + call.half * p.pixels;
    call.kernels.reconstruct[p.op][p.type]({{call.x(first), call.x(second)}, {call.y(first), call.y(second)},
        {&group0, &group1}, {lower, lower + call.half}, {p.cut, p.sign, p.first, p.second}, channels, pixels});
}

// --- the path of pairs ---

// Whole channels a group, and a partner for each.
bool paired(const ScconvSruCpuParams& p) noexcept { return p.num_groups % 2 == 0 && p.channels % p.num_groups == 0; }

struct Pairs
{
    const Call& call;
    std::vector<Moments> moments; // of a task's two groups; each task has its own
    int64_t in_sample;            // G / 2
};

void run_pair(void* data, size_t index)
{
    Pairs& pairs = *static_cast<Pairs*>(data);
    const Call& call = pairs.call;
    const int64_t pair = static_cast<int64_t>(index), n = pair / pairs.in_sample, g = pair % pairs.in_sample;
    Moments* const first = pairs.moments.data() + pair * 2 * call.blocks;
    Moments* const moments[2] = {first, first + call.blocks};
    Group groups[2];
    for (int64_t half = 0; half < 2; ++half)
        call.measure(n * call.sample + (g + half * pairs.in_sample) * call.group_size, call.group_size, moments[half]);
    for (int64_t half = 0; half < 2; ++half) // not one after each: the processor then works on both at a time
        groups[half] = call.group(moments[half]);
    const int64_t channels = call.p.channels / call.p.num_groups;
    reconstruct(call, n, g * channels, channels, 0, call.p.pixels, groups[0], groups[1]);
}

bool run_pairs(const Call& call, Executor& executor)
{
    const int64_t in_sample = call.p.num_groups / 2, pairs = call.p.batch * in_sample;
    Pairs work{call, std::vector<Moments>(pairs * 2 * call.blocks), in_sample};
    return executor.run(run_pair, &work, static_cast<size_t>(pairs));
}

// --- the split path ---

struct Split
{
    const Call& call;
    std::vector<Moments> moments;
    std::vector<Group> groups;
    int64_t chunks;           // of kBlocksAtOnce blocks, of a group
    int64_t channels_at_once; // of a task's lower half
    int64_t rows;             // tasks of a sample, when y is made
};

void run_measure(void* data, size_t index)
{
    Split& split = *static_cast<Split*>(data);
    const Call& call = split.call;
    const int64_t group = static_cast<int64_t>(index) / split.chunks;
    const int64_t block = static_cast<int64_t>(index) % split.chunks * kBlocksAtOnce, start = block * kBlock;
    const int64_t count = std::min(kBlocksAtOnce * kBlock, call.group_size - start);
    call.measure(group * call.group_size + start, count, split.moments.data() + group * call.blocks + block);
}

void run_reconstruct(void* data, size_t index)
{
    Split& split = *static_cast<Split*>(data);
    const Call& call = split.call;
    const int64_t n = static_cast<int64_t>(index) / split.rows, pixels = call.p.pixels;
    const int64_t first = static_cast<int64_t>(index) % split.rows * split.channels_at_once;
    const int64_t last = std::min(first + split.channels_at_once, call.half);
    const Group* groups = split.groups.data() + n * call.p.num_groups;
    for (int64_t c = first; c < last; ++c)
        for (int64_t at = 0, end; at < pixels; at = end) // up to the next border of a group
        {
            const int64_t lower = c * pixels + at, upper = lower + call.half * pixels;
            const int64_t g0 = lower / call.group_size, g1 = upper / call.group_size;
            const int64_t left0 = (g0 + 1) * call.group_size - lower, left1 = (g1 + 1) * call.group_size - upper;
            end = std::min(pixels, at + std::min(left0, left1));
            reconstruct(call, n, c, 1, at, end - at, groups[g0], groups[g1]);
        }
}

bool run_split(const Call& call, Executor& executor)
{
    const int64_t groups = call.p.batch * call.p.num_groups;
    const int64_t chunks = (call.blocks + kBlocksAtOnce - 1) / kBlocksAtOnce;
    const int64_t at_once = std::clamp<int64_t>(kElementsAtOnce / (2 * call.p.pixels), 1, call.half);
    Split split{call, std::vector<Moments>(groups * call.blocks), std::vector<Group>(groups), chunks, at_once,
        (call.half + at_once - 1) / at_once};
    if (!executor.run(run_measure, &split, static_cast<size_t>(groups * chunks)))
        return false;
    for (int64_t g = 0; g < groups; ++g)
        split.groups[g] = call.group(split.moments.data() + g * call.blocks);
    return executor.run(run_reconstruct, &split, static_cast<size_t>(call.p.batch * split.rows));
}

// --- threads of our own, for callers that have none ---

class Alone final : public Executor
{
public:
    bool run(Task task, void* data, size_t count) override
    {
        for (size_t i = 0; i < count; ++i)
            task(data, i);
        return true;
    }
};

class Threads final : public Executor
{
public:
    explicit Threads(int64_t count) : count_(count) {}

    bool run(Task task, void* data, size_t count) override
    {
        std::atomic<size_t> next{0};
        const auto work = [&] {
            for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
                task(data, i);
        };
        std::vector<std::thread> threads;
        threads.reserve(static_cast<size_t>(count_));
        try
        {
            for (int64_t t = 1; t < count_; ++t)
                threads.emplace_back(work);
        }
        catch (const std::system_error&) // the system has no more: those that run do the work
        {
        }
        work();
        for (std::thread& thread : threads)
            thread.join();
        return true;
    }

private:
    int64_t count_;
};

} // namespace

const char* refusal(const ScconvSruCpuParams& p) noexcept
{
    if (p.op < 0 || p.op >= kOperators)
        return "the operator is unknown";
    if (p.type < 0 || p.type >= kTypes)
        return "the type is unknown";
    if (p.batch < 0 || p.channels < 0 || p.pixels < 0)
        return "a size is negative";
    if (p.channels % 2)
        return "the number of channels is odd";
    if (p.num_groups < 1)
        return "num_groups is less than 1";
    if (p.pixels > 0 && p.channels > kLargestSample / p.pixels)
        return "a sample has more than 2^40 elements";
    if (p.channels * p.pixels % p.num_groups)
        return "C * H * W is not a multiple of num_groups";
    const int64_t sample = p.channels * p.pixels;
    if (sample > 0 && p.batch > (int64_t{1} << 60) / sample)
        return "there are more than 2^60 elements";
    if (p.lanes != 0 && p.lanes != 4 && p.lanes != 8 && p.lanes != 16)
        return "lanes is not 0, 4, 8 or 16";
    if (p.lanes > scconv_sru_cpu_lanes())
        return "this processor has no vectors of so many lanes";
    return nullptr;
}

bool run(const ScconvSruCpuParams& params, Executor& given)
{
    if (params.batch == 0 || params.channels == 0 || params.pixels == 0)
        return true;
    const Call call(params);
    if (params.batch * call.sample < kElementsForThreads)
    {
        Alone alone;
        return paired(params) ? run_pairs(call, alone) : run_split(call, alone);
    }
    const bool enough = params.batch * (params.num_groups / 2) >= processors();
    return paired(params) && enough ? run_pairs(call, given) : run_split(call, given);
}

} // namespace scconv::cpu

extern "C" int32_t scconv_sru_cpu_abi_version(void) { return SCCONV_SRU_CPU_ABI_VERSION; }

extern "C" int32_t scconv_sru_cpu_lanes(void)
{
    static const int32_t lanes = scconv::cpu::most_lanes();
    return lanes;
}

extern "C" const char* scconv_sru_cpu_run(const ScconvSruCpuParams* params)
{
    using namespace scconv::cpu;
    if (const char* reason = refusal(*params))
        return reason;
    // a thread is started in 30 us, in which one makes some 100,000 elements
    const int64_t elements = params->batch * params->channels * params->pixels;
    const int64_t threads = std::min<int64_t>(params->threads, elements / (kElementsForThreads / 2));
    try
    {
        Threads several(threads);
        Alone alone;
        return run(*params, threads > 1 ? static_cast<Executor&>(several) : alone) ? nullptr : "a thread failed";
    }
    catch (const std::bad_alloc&)
    {
        return "out of memory";
    }
}
