// Kernels and reference over many sizes, types, layouts and algorithms, in memory of exactly the size asked for, so
// that the address sanitizer sees the first byte outside. Prints how many calls gave the reference's bytes.
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "../../../scconv_deploy/trt_plugins/sru/reference/sru_reference.cpp"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "poison.h"
#include "sru.h"

extern "C" void emulation_device(int multiprocessors, int shared_bytes, int order);

namespace {

// An allocation that begins at a multiple of 256 bytes and ends where the array ends.
class Array
{
public:
    Array(size_t elements, size_t element_bytes)
        : bytes_(elements * element_bytes)
        , data_(static_cast<char*>(std::aligned_alloc(256, (bytes_ + 255) / 256 * 256)))
    {
        // aligned_alloc wants whole multiples: what is left of the last one is closed by hand
        ASAN_POISON_MEMORY_REGION(data_ + bytes_, -bytes_ % 256);
    }
    ~Array()
    {
        ASAN_UNPOISON_MEMORY_REGION(data_, (bytes_ + 255) / 256 * 256);
        std::free(data_);
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    void* data() const
    {
        return data_;
    }

private:
    size_t bytes_;
    char* data_;
};

constexpr int32_t kSharedBytes = 227 << 10;

struct Size
{
    int64_t batch, channels, pixels;
    int32_t num_groups;
};

float narrowed(float value, int32_t type, void* to, size_t i)
{
    if (type == SCCONV_HALF)
        return __half2float(static_cast<__half*>(to)[i] = __float2half_rn(value));
    if (type == SCCONV_BFLOAT16)
        return __bfloat162float(static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(value));
    return static_cast<float*>(to)[i] = value;
}

float widened(int32_t type, const void* from, size_t i)
{
    return type == SCCONV_HALF    ? __half2float(static_cast<const __half*>(from)[i])
        : type == SCCONV_BFLOAT16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i])
                                  : static_cast<const float*>(from)[i];
}

bool equal(const Size& size, int32_t op, int32_t type, int32_t layout, int32_t algorithm)
{
    const size_t elements = static_cast<size_t>(size.batch * size.channels * size.pixels);
    const size_t channels = static_cast<size_t>(size.channels), pixels = static_cast<size_t>(size.pixels);
    const size_t bytes = type == SCCONV_FLOAT ? 4 : 2;
    const Array x(elements, bytes), y(elements, bytes);
    const Array cut(channels, 4), sign(channels, 4), first(channels, 4), second(channels, 4);
    std::vector<float> wide(elements), expected(elements);
    std::vector<uint8_t> open(elements);
    // where an element of [N, C, H, W] lies
    const auto place = [&](size_t i) {
        const size_t pixel = i % pixels, channel = i / pixels % channels, sample = i / pixels / channels;
        return layout == SCCONV_LINEAR ? i : (sample * pixels + pixel) * channels + channel;
    };
    for (size_t i = 0; i < elements; ++i)
        wide[i] = narrowed(static_cast<float>((i * 2654435761u >> 7) % 1000) / 250.0f - 2.0f, type, x.data(), place(i));
    for (size_t c = 0; c < channels; ++c)
    {
        static_cast<float*>(cut.data())[c] = static_cast<float>(c % 7) / 7.0f - 0.4f;
        static_cast<float*>(sign.data())[c] = c % 3 == 0 ? -1.0f : 1.0f;
        static_cast<float*>(first.data())[c] = 1.0f + static_cast<float>(c % 5) / 8.0f;
        static_cast<float*>(second.data())[c] = static_cast<float>(c % 4) / 4.0f;
    }
    const auto* const cuts = static_cast<float*>(cut.data());
    const auto* const signs = static_cast<float*>(sign.data());
    const auto* const firsts = static_cast<float*>(first.data());
    const auto* const seconds = static_cast<float*>(second.data());
    ScconvSruParams p{x.data(), y.data(), cuts, signs, firsts, seconds, nullptr, 0, size.batch, size.channels,
        size.pixels, size.num_groups, 1, 0.0f, 1e-10f, op, type, layout, algorithm};
    if (scconv_sru_refusal(&p) != nullptr) // groups that straddle channels, channels-last
        return layout == SCCONV_CHANNELS_LAST && size.channels % size.num_groups != 0;
    p.workspace_bytes = scconv_sru_workspace_bytes(&p);
    const Array workspace(p.workspace_bytes, 1);
    p.workspace = workspace.data();
    if (scconv_sru_enqueue(&p, nullptr) != cudaSuccess)
        return false;
    const ReferenceParams r{wide.data(), expected.data(), open.data(), cuts, signs, firsts, seconds, size.batch,
        size.channels, size.pixels, size.num_groups, 1, 0.0f, 1e-10f, op, type, layout, algorithm, 132, kSharedBytes, 1};
    reference_sru(&r);
    for (size_t i = 0; i < elements; ++i)
        if (widened(type, y.data(), place(i)) != expected[i])
            return false;
    return true;
}

} // namespace

int main()
{
    // whole and ragged rows, straddling groups, an odd number of groups, vectors of one element, several pieces
    const Size sizes[] = {{2, 8, 1, 2}, {1, 8, 7, 8}, {1, 12, 9, 2}, {2, 6, 12, 4}, {1, 6, 49, 3}, {1, 32, 16, 2},
        {1, 64, 196, 4}, {1, 4, 2500, 2}};
    const std::pair<int32_t, int32_t> kinds[] = {
        {SCCONV_SRU, SCCONV_FLOAT}, {SCCONV_SRU_NORM, SCCONV_HALF}, {SCCONV_SRU_SOFT, SCCONV_BFLOAT16}};
    // operators, each of a type of its own, take turns, so that each meets all sizes, and each layout every algorithm
    int calls = 0, alike = 0;
    emulation_device(132, kSharedBytes, 2);
    for (const Size& size : sizes)
        for (int32_t layout = SCCONV_LINEAR; layout <= SCCONV_CHANNELS_LAST; ++layout)
            for (int32_t algorithm = SCCONV_ON_CHIP; algorithm <= SCCONV_SPLIT; ++algorithm)
                for (int32_t turn = 0; turn < 2; ++turn)
                {
                    const auto& [op, type] = kinds[(&size - sizes + algorithm + turn + layout) % 3];
                    ++calls;
                    alike += equal(size, op, type, layout, algorithm);
                }
    std::printf("%d of %d\n", alike, calls);
    return alike == calls ? EXIT_SUCCESS : EXIT_FAILURE;
}
