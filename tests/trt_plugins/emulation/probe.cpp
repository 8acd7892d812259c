// A kernel that does right, or one thing wrong, to test the emulation itself: probe MISTAKE ORDER CLUSTER.
//
// A block takes a slice of x in two bulk copies, the blocks of a cluster tell each other their sums: y = x - mean.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "intrinsics.cuh"

extern "C" void emulation_device(int multiprocessors, int shared_bytes, int order);
extern "C" void emulation_architecture(int of_device, int of_kernels);

namespace scconv {

constexpr uint32_t kThreads = 64, kSlice = 256, kChunk = kSlice / 2, kChunkBytes = kChunk * 4, kClusters = 3;

struct KernelParams
{
    const float* x;
    float* y;
    uint32_t cluster;
    const std::string* mistake;

    bool wrong(const char* name) const
    {
        return *mistake == name;
    }
};

struct Memory
{
    BulkBarrier barriers[2];
    float sums[2]; // of warps
    float unused;
    alignas(16) float4 totals[8]; // of blocks
    alignas(16) float data[kSlice];
};

void load(const KernelParams& p, Memory& memory, const float* x)
{
    for (uint32_t chunk = 0; chunk < 2; ++chunk)
    {
        BulkBarrier* barrier = &memory.barriers[chunk];
        if (!p.wrong("uninitialised"))
            bulk_init(barrier);
        if (p.wrong("initialised twice"))
            bulk_init(barrier);
        if (!p.wrong("unannounced"))
            bulk_expect(barrier, kChunkBytes + (p.wrong("too few bytes") ? 16 : p.wrong("too many bytes") ? -16 : 0));
        if (p.wrong("announced twice"))
            bulk_expect(barrier, kChunkBytes);
        const uint32_t at = chunk * kChunk + p.wrong("misaligned");
        const uint32_t bytes = kChunkBytes - (p.wrong("ragged") ? 4 : 0);
        bulk_load(memory.data + at + (p.wrong("copied outside") ? kSlice : 0), x + at, bytes, barrier);
    }
}

float sum_of_block(const KernelParams& p, Memory& memory)
{
    float sum = p.wrong("unwritten") ? memory.unused : 0.0f;
    for (uint32_t i = threadIdx.x; i < kSlice; i += kThreads)
        sum += memory.data[i];
    for (int offset = 16; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    sum = __shfl_sync(0xffffffffu, sum, 5);
    if (threadIdx.x % 32 == 0)
        memory.sums[threadIdx.x / 32] = sum;
    if (!p.wrong("no barrier"))
        __syncthreads();
    return memory.sums[0] + memory.sums[1];
}

__global__ void probe(const __grid_constant__ KernelParams p)
{
    if (p.wrong("launch"))
        return;
    Memory& memory = *reinterpret_cast<Memory*>(dynamic_shared());
    const uint32_t rank = blockIdx.x % p.cluster;
    if (threadIdx.x == 0)
        load(p, memory, p.x + blockIdx.x * kSlice);
    if (p.wrong("deadlock") && threadIdx.x == 7)
        return;
    if (p.wrong("warp deadlock") && threadIdx.x != 7)
        __shfl_sync(0xffffffffu, 0.0f, 0);
    if (!p.wrong("no barrier"))
        __syncthreads();
    if (!p.wrong("stored too early"))
        cluster_barrier();
    if (p.wrong("overwritten"))
        memory.barriers[0] = 0;
    if (!p.wrong("no wait"))
        bulk_wait(&memory.barriers[0]);
    if (!p.wrong("no wait"))
        bulk_wait(&memory.barriers[p.wrong("one wait") ? 0 : 1]);
    if (p.wrong("used twice"))
        bulk_load(memory.data, p.x, 16, &memory.barriers[0]);
    const float sum = sum_of_block(p, memory);
    if (threadIdx.x < p.cluster)
        store_remote(&memory.totals[rank], threadIdx.x + (p.wrong("no such block") ? 1 : 0), {sum, 0, 0, 0});
    if (p.wrong("cluster deadlock") && threadIdx.x == 63)
        return;
    if (!p.wrong("no cluster barrier"))
        cluster_barrier();
    float total = 0.0f;
    for (uint32_t i = 0; i < p.cluster; ++i)
        total += memory.totals[i].x;
    if (p.wrong("warp"))
    {
        memory.data[threadIdx.x] = 1.0f;
        total += __shfl_xor_sync(0xffffffffu, 0.0f, 1) + memory.data[threadIdx.x ^ 1];
    }
    if (p.wrong("ended") && rank == 0)
        store_remote(&memory.totals[7], 1, {});
    if (p.wrong("outside"))
        total += reinterpret_cast<const float*>(&memory + 1)[0];
    float* y = p.y + blockIdx.x * kSlice;
    for (uint32_t i = threadIdx.x; i < kSlice; i += kThreads)
        y[i] = memory.data[i] - total / static_cast<float>(p.cluster * kSlice);
    if (p.wrong("two blocks") && threadIdx.x == kThreads - 1 && blockIdx.x + 1 < gridDim.x)
        y[kSlice] = p.x[0];
}

} // namespace scconv

namespace {

using namespace scconv;

cudaError_t launch(const KernelParams& p, uint32_t blocks, uint32_t cluster, uint32_t shared_bytes)
{
    void* values[] = {const_cast<KernelParams*>(&p)};
    cudaLaunchAttribute attribute{cudaLaunchAttributeClusterDimension, {}};
    attribute.val.clusterDim = {cluster, 1, 1};
    const cudaLaunchConfig_t config{blocks, kThreads, shared_bytes, nullptr, &attribute, 1};
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(probe), values);
}

const char* compute(const std::string& mistake, int order, uint32_t cluster)
{
    const uint32_t elements = cluster * kSlice;
    std::vector<float> data(kClusters * elements + 4), y(kClusters * elements);
    float* x = data.data() + (16 - reinterpret_cast<uintptr_t>(data.data()) % 16) % 16 / 4;
    for (uint32_t i = 0; i < kClusters * elements; ++i)
        x[i] = static_cast<float>(i * 37 % 101 + i / elements);
    emulation_device(132, 227 << 10, order);
    if (launch({x, y.data(), cluster, &mistake}, kClusters * cluster, cluster, sizeof(Memory)) != cudaSuccess)
        return "refused";
    for (uint32_t first = 0; first < kClusters * elements; first += elements)
    {
        float total = 0.0f; // whole numbers: exact in any order
        for (uint32_t i = first; i < first + elements; ++i)
            total += x[i];
        for (uint32_t i = first; i < first + elements; ++i)
            if (y[i] != x[i] - total / static_cast<float>(elements))
                return "wrong";
    }
    return "right";
}

} // namespace

// MISTAKE ORDER CLUSTER, launch CAPABILITY COMPILED_FOR BLOCKS CLUSTER SHARED_BYTES, device CAPABILITY SHARED_BYTES
int main(int count, char** arguments)
{
    const std::string what = arguments[1];
    std::vector<int> numbers;
    for (int i = 2; i < count; ++i)
        numbers.push_back(std::atoi(arguments[i]));
    if (what == "launch")
    {
        emulation_device(132, 227 << 10, 0);
        emulation_architecture(numbers[0], numbers[1]);
        cudaFuncAttributes attributes{};
        const cudaError_t status = cudaFuncGetAttributes(&attributes, probe);
        const cudaError_t launched = launch({nullptr, nullptr, 0, &what}, numbers[2], numbers[3], numbers[4]);
        const cudaError_t last = cudaGetLastError();
        std::printf("%d: %d %d\n", last, attributes.ptxVersion, attributes.binaryVersion);
        if (last != (status == cudaSuccess ? launched : status) || cudaGetLastError() != cudaSuccess)
            std::puts("an error is not the last one, once");
    }
    else if (what == "device")
    {
        emulation_device(132, numbers[1], 0);
        emulation_architecture(numbers[0], numbers[0]);
        int values[5];
        const cudaDeviceAttr attributes[] = {cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor,
            cudaDevAttrComputeCapabilityMinor, cudaDevAttrMaxSharedMemoryPerBlockOptin,
            cudaDevAttrMaxSharedMemoryPerMultiprocessor};
        for (int i = 0; i < 5; ++i)
            cudaDeviceGetAttribute(&values[i], attributes[i], 0);
        std::printf("%d %d %d %d %d\n", values[0], values[1], values[2], values[3], values[4]);
    }
    else
    {
        std::puts(compute(what, numbers[0], static_cast<uint32_t>(numbers[1])));
    }
}
