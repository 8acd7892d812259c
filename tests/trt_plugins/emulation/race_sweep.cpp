// Every kernel under ThreadSanitizer: sizes x layouts x algorithms x GPUs. Sums have one order wherever they are added
// up, so that every call of a size gives the first one's bytes; prints how many did.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "sru.h"

extern "C" void emulation_device(int multiprocessors, int shared_bytes, int order);
extern "C" void emulation_architecture(int of_device, int of_kernels);

namespace {

struct Size
{
    int64_t batch, channels, pixels;
    int32_t num_groups;
};

struct Free
{
    void operator()(void* at) const
    {
        std::free(at);
    }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate(size_t bytes)
{
    return Memory(std::aligned_alloc(16, (bytes + 15) / 16 * 16));
}

void write(void* to, int32_t type, size_t i, float value)
{
    if (type == SCCONV_HALF)
        static_cast<__half*>(to)[i] = __float2half_rn(value);
    else if (type == SCCONV_BFLOAT16)
        static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(value);
    else
        static_cast<float*>(to)[i] = value;
}

Memory draw(size_t count, int32_t type, size_t period, float scale)
{
    Memory memory = allocate(count * 4);
    for (size_t i = 0; i < count; ++i)
        write(memory.get(), type, i, (static_cast<float>((i * 2654435761u >> 7) % period) - 0.4f * period) * scale);
    return memory;
}

// Calls that gave the first one's bytes, of `calls`.
int alike(const Size& size, int32_t op, int32_t type, int32_t layout, int& calls)
{
    const size_t elements = static_cast<size_t>(size.batch * size.channels * size.pixels);
    const size_t channels = static_cast<size_t>(size.channels), bytes = elements * (type == SCCONV_FLOAT ? 4 : 2);
    const Memory x = draw(elements, type, 1000, 1.0f / 250.0f), first_y = allocate(bytes), y = allocate(bytes);
    const Memory cut = draw(channels, SCCONV_FLOAT, 7, 1.0f / 7.0f), factor = draw(channels, SCCONV_FLOAT, 5, 0.5f);
    ScconvSruParams p{x.get(), first_y.get(), static_cast<float*>(cut.get()), static_cast<float*>(factor.get()),
        static_cast<float*>(factor.get()), static_cast<float*>(cut.get()), nullptr, 0, size.batch, size.channels,
        size.pixels, size.num_groups, 1, 0.0f, 1e-10f, op, type, layout, SCCONV_AUTO};
    p.workspace_bytes = scconv_sru_workspace_bytes(&p);
    const Memory workspace = allocate(p.workspace_bytes);
    p.workspace = workspace.get();
    int found = 0;
    // many multiprocessors: as large clusters as the pieces allow; one: a block by itself
    for (const int multiprocessors : {132, 1})
        for (const int capability : {90, 89})
            for (const int32_t algorithm : {SCCONV_ON_CHIP, SCCONV_SPLIT})
            {
                if ((capability == 89 || algorithm == SCCONV_SPLIT) && multiprocessors == 1)
                    continue; // as with 132
                emulation_device(multiprocessors, 99 << 10, calls % 3);
                emulation_architecture(capability, capability);
                p.algorithm = algorithm;
                const bool first = p.y == first_y.get();
                found += scconv_sru_enqueue(&p, nullptr) == cudaSuccess
                    && (first || std::memcmp(first_y.get(), y.get(), bytes) == 0);
                p.y = y.get();
                ++calls;
            }
    return found;
}

} // namespace

// type: of one data type alone, 0 to 2
int main(int count, char** arguments)
{
    // whole and ragged rows, one piece, several, one for each of eight blocks, groups without a partner or with borders
    // inside a channel
    const Size sizes[] = {{3, 8, 7, 4}, {1, 8, 256, 2}, {2, 6, 98, 3}, {1, 16, 196, 2}, {1, 4, 1254, 2}, {1, 4, 30, 3},
        {1, 4, 2048, 2}};
    int calls = 0, found = 0;
    for (const Size& size : sizes)
        for (const int32_t layout : {SCCONV_LINEAR, SCCONV_CHANNELS_LAST})
        {
            const int32_t kind = (static_cast<int32_t>(&size - sizes) + layout) % 3;
            const int32_t type = count > 1 ? std::atoi(arguments[1]) : kind, op = type;
            if (layout == SCCONV_LINEAR || size.channels % size.num_groups == 0)
                found += alike(size, op, type, layout, calls);
        }
    std::printf("%d of %d\n", found, calls);
    return found == calls ? EXIT_SUCCESS : EXIT_FAILURE;
}
