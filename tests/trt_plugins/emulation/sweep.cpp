// Kernels and reference over many sizes, types, algorithms and alignments, in memory of exactly the size asked for, so
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

// An allocation that ends where the array ends and begins `offset` elements behind a multiple of 256 bytes.
class Array
{
public:
    Array(size_t elements, size_t element_bytes, size_t offset)
        : bytes_(elements * element_bytes)
        , base_(static_cast<char*>(std::aligned_alloc(256, (offset * element_bytes + bytes_ + 255) / 256 * 256)))
        , data_(base_ + offset * element_bytes)
    {
        // aligned_alloc wants whole multiples: what is left of the last one is closed by hand
        ASAN_POISON_MEMORY_REGION(data_ + bytes_, static_cast<size_t>(-(offset * element_bytes + bytes_)) % 256);
    }
    ~Array()
    {
        ASAN_UNPOISON_MEMORY_REGION(base_, (static_cast<size_t>(data_ - base_) + bytes_ + 255) / 256 * 256);
        std::free(base_);
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    void* data() const
    {
        return data_;
    }

private:
    size_t bytes_;
    char* base_;
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

bool equal(const Size& size, int32_t op, int32_t type, int32_t algorithm, size_t offset)
{
    const size_t elements = static_cast<size_t>(size.batch * size.channels * size.pixels);
    const size_t channels = static_cast<size_t>(size.channels), bytes = type == SCCONV_FLOAT ? 4 : 2;
    const Array x(elements, bytes, offset), y(elements, bytes, offset);
    const Array cut(channels, 4, 0), sign(channels, 4, 0), first(channels, 4, 0), second(channels, 4, 0);
    std::vector<float> wide(elements), expected(elements);
    std::vector<uint8_t> open(elements);
    for (size_t i = 0; i < elements; ++i)
        wide[i] = narrowed(static_cast<float>((i * 2654435761u >> 7) % 1000) / 250.0f - 2.0f, type, x.data(), i);
    for (size_t c = 0; c < channels; ++c)
    {
        static_cast<float*>(cut.data())[c] = static_cast<float>(c % 7) / 7.0f - 0.4f;
        static_cast<float*>(sign.data())[c] = c % 3 == 0 ? -1.0f : 1.0f;
        static_cast<float*>(first.data())[c] = 1.0f + static_cast<float>(c % 5) / 8.0f;
        static_cast<float*>(second.data())[c] = static_cast<float>(c % 4) / 4.0f;
    }
    ScconvSruParams p{x.data(), y.data(), cut.data(), sign.data(), first.data(), second.data(), nullptr, 0, size.batch,
        size.channels, size.pixels, size.num_groups, 1, 0.0f, 1e-10f, op, type, SCCONV_FLOAT, algorithm};
    p.workspace_bytes = scconv_sru_workspace_bytes(&p);
    const Array workspace(p.workspace_bytes, 1, 0);
    p.workspace = workspace.data();
    if (scconv_sru_enqueue(&p, nullptr) != cudaSuccess)
        return false;
    const int32_t alignment = static_cast<int32_t>(offset == 0 ? 16 : (offset * bytes) & (~(offset * bytes) + 1));
    const ReferenceParams r{wide.data(), expected.data(), open.data(), static_cast<float*>(cut.data()),
        static_cast<float*>(sign.data()), static_cast<float*>(first.data()), static_cast<float*>(second.data()),
        size.batch, size.channels, size.pixels, size.num_groups, 1, 0.0f, 1e-10f, op, type, algorithm,
        std::min(alignment, 16), 132, kSharedBytes};
    reference_sru(&r);
    for (size_t i = 0; i < elements; ++i)
        if (widened(type, y.data(), i) != expected[i])
            return false;
    return true;
}

} // namespace

int main()
{
    // whole and ragged rows (groups of 7 that take three vectors of 4), straddling groups, an odd number of groups, more
    // pieces than one
    const Size sizes[] = {{2, 8, 1, 2}, {1, 8, 7, 8}, {1, 12, 9, 2}, {2, 6, 12, 4}, {1, 6, 49, 3}, {1, 2, 16, 1},
        {1, 8, 196, 2}, {1, 4, 2500, 2}};
    const std::pair<int32_t, int32_t> kinds[] = {{SCCONV_SRU, SCCONV_FLOAT}, {SCCONV_SRU_SOFT, SCCONV_FLOAT},
        {SCCONV_SRU_NORM, SCCONV_HALF}, {SCCONV_SRU, SCCONV_BFLOAT16}};
    // every size with every algorithm and alignment; operator and type take turns, so that each meets all sizes, and
    // each algorithm at each alignment
    int calls = 0, alike = 0;
    emulation_device(132, kSharedBytes, 2);
    for (const Size& size : sizes)
        for (int32_t algorithm = SCCONV_ON_CHIP; algorithm <= SCCONV_GENERAL; ++algorithm)
            for (const size_t offset : {0, 1})
            {
                const auto& [op, type] = kinds[(&size - sizes + algorithm + 2 * offset) % 4];
                ++calls;
                alike += equal(size, op, type, algorithm, offset);
            }
    std::printf("%d of %d\n", alike, calls);
    return alike == calls ? EXIT_SUCCESS : EXIT_FAILURE;
}
