// A GPU on the CPU, for the kernels' own sources: every thread of a block is a fiber, blocks follow each other.
//
// What it shows: indices, tails, alignment (with -fsanitize=alignment), memory outside (with -fsanitize=address; shared
// memory beyond what was asked for is poisoned), barriers that not every thread reaches, launches that a device refuses,
// and, by running the fibers in several orders, values read before another thread wrote them. What it cannot: speed, the
// caches, and how a GPU's compiler schedules.
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include <ucontext.h>

#include "cuda_runtime.h"
#include "poison.h"

Index threadIdx, blockIdx, blockDim;

namespace scconv {
constexpr size_t kSharedBytes = 256 << 10;
alignas(16) unsigned char shared[kSharedBytes]; // what the kernels declare as extern __shared__
} // namespace scconv

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kWarp = 32, kDefaultSharedBytes = 48 << 10, kMaxThreads = 1024;

struct Barrier
{
    unsigned arrived = 0;
    unsigned generation = 0;
};
struct Warp
{
    Barrier barrier;
    float values[kWarp];
};
struct Fiber
{
    ucontext_t context;
    jmp_buf place;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool begun;
    bool done;
};

int multiprocessors = 132, shared_limit = 227 << 10, order = 0;
std::map<const void*, int> permitted;
std::vector<int> permits;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Barrier block;
ucontext_t scheduler;
[[maybe_unused]] jmp_buf scheduler_place;
unsigned running = 0;
bool progress = false;
const std::function<void()>* body = nullptr;

// A fiber begins by swapcontext; later switches jump, which costs no system call (AddressSanitizer wants the former).
void yield()
{
    Fiber& fiber = *fibers[running];
#ifdef __SANITIZE_ADDRESS__
    swapcontext(&fiber.context, &scheduler);
#else
    if (_setjmp(fiber.place) == 0)
        _longjmp(scheduler_place, 1);
#endif
}

void resume(Fiber& fiber)
{
#ifndef __SANITIZE_ADDRESS__
    if (_setjmp(scheduler_place) != 0)
        return;
    if (fiber.begun)
        _longjmp(fiber.place, 1);
#endif
    fiber.begun = true;
    swapcontext(&scheduler, &fiber.context);
}

void wait(Barrier& barrier, unsigned count)
{
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == count)
    {
        barrier.arrived = 0;
        ++barrier.generation;
        progress = true;
        return;
    }
    while (barrier.generation == generation)
        yield();
}

void thread_main()
{
    (*body)();
    Fiber& fiber = *fibers[running];
    fiber.done = true;
    progress = true;
    yield(); // and never again
}

// order 0: ascending, 1: descending, 2: odd steps through the block
unsigned chosen(unsigned i, unsigned threads)
{
    return order == 0 ? i : order == 1 ? threads - 1 - i : (i * 77 + 13) % threads;
}

void run_block(unsigned threads)
{
    block = {};
    warps.assign(threads / kWarp, {});
    for (unsigned t = 0; t < threads; ++t)
    {
        Fiber& fiber = *fibers[t];
        fiber.begun = fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
        makecontext(&fiber.context, thread_main, 0);
    }
    for (bool left = true; left;)
    {
        left = progress = false;
        for (unsigned i = 0; i < threads; ++i)
        {
            running = chosen(i, threads);
            if (fibers[running]->done)
                continue;
            threadIdx.x = running;
            resume(*fibers[running]);
            left = left || !fibers[running]->done;
        }
        if (left && !progress)
        {
            std::fprintf(stderr, "deadlock: some threads of a block wait at a barrier that others never reach\n");
            std::abort();
        }
    }
}

} // namespace

void __syncthreads()
{
    wait(block, blockDim.x);
}

float __shfl_xor_sync(unsigned, float value, int offset)
{
    const unsigned lane = threadIdx.x % kWarp;
    Warp& warp = warps[threadIdx.x / kWarp];
    warp.values[lane] = value;
    wait(warp.barrier, kWarp);
    const float found = warp.values[lane ^ static_cast<unsigned>(offset)];
    wait(warp.barrier, kWarp);
    return found;
}

cudaError_t cudaGetDevice(int* device)
{
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int)
{
    *value = attribute == cudaDevAttrMultiProcessorCount ? multiprocessors : shared_limit;
    return cudaSuccess;
}

namespace emulation {

cudaError_t permit_shared(const void* kernel, int bytes)
{
    if (bytes > shared_limit)
        return cudaErrorInvalidValue;
    permitted[kernel] = bytes;
    permits.push_back(bytes);
    return cudaSuccess;
}

cudaError_t launch(
    const void* kernel, unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& thread)
{
    const auto found = permitted.find(kernel);
    const int most = found == permitted.end() ? kDefaultSharedBytes : found->second;
    if (blocks == 0 || blocks > 0x7fffffffu || threads == 0 || threads > kMaxThreads)
        return cudaErrorInvalidConfiguration;
    if (shared_bytes > static_cast<size_t>(most))
        return cudaErrorInvalidValue;
    while (fibers.size() < threads)
        fibers.push_back(std::make_unique<Fiber>());
    body = &thread;
    blockDim.x = threads;
    for (unsigned b = 0; b < blocks; ++b)
    {
        blockIdx.x = b;
        ASAN_UNPOISON_MEMORY_REGION(scconv::shared, scconv::kSharedBytes);
        std::memset(scconv::shared, 0xff, scconv::kSharedBytes); // NaN: nobody may count on zeros
        ASAN_POISON_MEMORY_REGION(scconv::shared + shared_bytes, scconv::kSharedBytes - shared_bytes);
        run_block(threads);
    }
    return cudaSuccess;
}

} // namespace emulation

extern "C" {

__attribute__((visibility("default"))) void emulation_device(int multiprocessor_count, int shared_bytes, int fiber_order)
{
    multiprocessors = multiprocessor_count;
    shared_limit = shared_bytes;
    order = fiber_order;
    permitted.clear();
    permits.clear();
}

// How much shared memory kernels were permitted since emulation_device, least and most; the number of calls.
__attribute__((visibility("default"))) int emulation_permits(int* least, int* most)
{
    for (const int each : permits)
    {
        *least = std::min(*least, each);
        *most = std::max(*most, each);
    }
    return static_cast<int>(permits.size());
}

} // extern "C"
