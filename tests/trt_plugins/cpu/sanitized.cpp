// The CPU kernels under a sanitizer: shapes, tails, types and operators on buffers of the exact size, on both paths, by
// one thread and by four, whose bytes must agree. One width a program: SCCONV_TEST_LANES.
#include "sru.cpp"
#define SCCONV_LANES SCCONV_TEST_LANES
#include "width.h"

#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>

namespace scconv::cpu {

#define SCCONV_OTHER(lanes) SCCONV_NAME(kKernels, lanes)
#if SCCONV_TEST_LANES != 4
extern const Kernels kKernels4 = SCCONV_OTHER(SCCONV_TEST_LANES);
#endif
#if SCCONV_TEST_LANES != 8
extern const Kernels kKernels8 = SCCONV_OTHER(SCCONV_TEST_LANES);
#endif
extern const Kernels kKernels16 = SCCONV_OTHER(SCCONV_TEST_LANES);

} // namespace scconv::cpu

using namespace scconv::cpu;

namespace {

std::mt19937 generator(0);

struct Sizes
{
    int64_t batch, channels, pixels;
    int32_t groups;
};

// Whole groups, odd numbers of them, groups that straddle channels, tails of every kind, one element a group, large ones.
constexpr Sizes kSizes[] = {{2, 8, 49, 2}, {1, 12, 5, 3}, {2, 6, 7, 7}, {3, 10, 1, 5}, {1, 4, 1, 4}, {2, 24, 6, 16},
    {1, 2, 3, 1}, {2, 8, 33, 8}, {1, 4, 17000, 2}, {1, 4, 1030, 2}, {1, 6, 9001, 9001}, {1, 160, 3, 2}, {0, 8, 9, 2},
    {3, 4, 0, 2}};

uint16_t drawn_half(int32_t type)
{
    const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 6e4f, 1e-7f, -3e-5f};
    const float value = generator() % 64 ? std::normal_distribution<float>()(generator) : special[generator() % 8];
    if (type == 2)
    {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        return static_cast<uint16_t>(bits >> 16);
    }
    return static_cast<uint16_t>(generator() % 16 ? 0x3000 + generator() % 0x1000 : generator()); // any bits at times
}

// A buffer of exactly so many bytes, so that the address sanitizer sees the first byte beyond.
std::unique_ptr<char[]> drawn(int64_t elements, int32_t type)
{
    const int64_t size = elements * kElementBytes[type];
    std::unique_ptr<char[]> buffer(new char[size]);
    for (int64_t i = 0; i < elements; ++i)
    {
        const uint16_t half = drawn_half(type);
        const float wide = std::normal_distribution<float>()(generator);
        if (type == 0)
            std::memcpy(buffer.get() + 4 * i, &wide, 4);
        else
            std::memcpy(buffer.get() + 2 * i, &half, 2);
    }
    return buffer;
}

bool same_on_every_path(const Sizes& sizes, int32_t op, int32_t type)
{
    const int64_t elements = sizes.batch * sizes.channels * sizes.pixels;
    const std::unique_ptr<char[]> x = drawn(elements, type);
    std::vector<float> parameters[4];
    for (std::vector<float>& values : parameters)
        for (int64_t c = 0; c < sizes.channels; ++c)
            values.push_back(std::normal_distribution<float>()(generator));
    for (float& sign : parameters[1])
        sign = sign > 0.5f ? 1.0f : sign < -0.5f ? -1.0f : 0.0f;
    ScconvSruCpuParams p{x.get(), nullptr, parameters[0].data(), parameters[1].data(), parameters[2].data(),
        parameters[3].data(), sizes.batch, sizes.channels, sizes.pixels, sizes.groups, 1, 1e-5f, 1e-10f, op, type, 1, 0};
    if (refusal(p))
        return false;
    const size_t bytes = static_cast<size_t>(elements * kElementBytes[type]);
    std::unique_ptr<char[]> outputs[3];
    Alone alone;
    Threads threads(4);
    for (int i = 0; i < 3; ++i)
    {
        outputs[i].reset(new char[bytes]);
        p.y = outputs[i].get();
        if (i == 0)
            run(p, alone);
        else if (elements && i == 1 && paired(p))
            run_pairs(Call(p), threads);
        else if (elements)
            run_split(Call(p), threads);
    }
    return !std::memcmp(outputs[0].get(), outputs[1].get(), bytes) && !std::memcmp(outputs[0].get(), outputs[2].get(), bytes);
}

} // namespace

int main()
{
    int runs = 0;
    for (const Sizes& sizes : kSizes)
        for (int32_t op = 0; op < kOperators; ++op)
            for (int32_t type = 0; type < kTypes; ++type, ++runs)
                if (!same_on_every_path(sizes, op, type))
                {
                    std::printf("%d x %d x %d, %d groups, operator %d, type %d\n", int(sizes.batch), int(sizes.channels),
                        int(sizes.pixels), sizes.groups, op, type);
                    return 1;
                }
    std::printf("%d runs\n", runs);
    return 0;
}
