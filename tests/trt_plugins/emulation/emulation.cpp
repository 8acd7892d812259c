// A GPU on the CPU, for the kernels' own sources: every thread of a cluster is a fiber, clusters follow each other.
//
// What it shows: indices, tails, alignment (with -fsanitize=alignment), memory outside (with -fsanitize=address; shared
// memory beyond what was asked for, or of a block that has ended, is poisoned), barriers that not every thread reaches,
// copies that nobody waits for, launches that a device refuses; by running the threads in several orders, values read
// before another thread wrote them; and with -fsanitize=thread, what no barrier puts in order, however it ran.
// What it cannot: speed, the caches, how a GPU's compiler schedules, and fences between generic and bulk accesses.
#include <map>
#include <vector>

#include "cluster.h"

namespace {

constexpr int kDefaultSharedBytes = 48 << 10, kReservedBytes = 1 << 10; // of each block, by CUDA

int device = 0, multiprocessors = 132, shared_limit = 227 << 10, order = 0, capability = 90, image = 90;
unsigned widest = emulation::kMaxCluster; // cluster that the GPU has room for
std::map<const void*, int> permitted;
std::vector<int> permits;
cudaError_t last = cudaSuccess;

cudaError_t told(cudaError_t status)
{
    if (status != cudaSuccess)
        last = status;
    return status;
}

cudaError_t refusal(const cudaLaunchConfig_t& config, dim3 cluster, const void* kernel)
{
    const dim3 blocks = config.gridDim, threads = config.blockDim;
    const auto found = permitted.find(kernel);
    const int most = found == permitted.end() ? kDefaultSharedBytes : found->second;
    if (image == 0)
        return cudaErrorNoKernelImageForDevice;
    if (blocks.x == 0 || blocks.x > 0x7fffffffu || blocks.y == 0 || blocks.y > 0xffff || blocks.z != 1)
        return cudaErrorInvalidConfiguration;
    if (threads.x == 0 || threads.x > emulation::kMaxThreads || threads.y != 1 || threads.z != 1)
        return cudaErrorInvalidConfiguration;
    if (config.dynamicSmemBytes > static_cast<size_t>(most))
        return cudaErrorInvalidValue;
    // clusters of a row of blocks alone, and of as many as every GPU that has clusters takes
    if (cluster.x == 0 || cluster.x > widest || cluster.y != 1 || cluster.z != 1)
        return cudaErrorInvalidClusterSize;
    return blocks.x % cluster.x != 0 || (cluster.x > 1 && capability < 90) ? cudaErrorInvalidClusterSize : cudaSuccess;
}

} // namespace

cudaError_t cudaGetLastError()
{
    const cudaError_t found = last;
    last = cudaSuccess;
    return found;
}

cudaError_t cudaGetDevice(int* found)
{
    *found = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int)
{
    switch (attribute)
    {
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_limit + kReservedBytes; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_limit; return cudaSuccess;
    }
    return cudaErrorInvalidValue;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes)
{
    if (image == 0)
        return told(cudaErrorNoKernelImageForDevice);
    if (bytes > shared_limit)
        return told(cudaErrorInvalidValue);
    permitted[kernel] = bytes;
    permits.push_back(bytes);
    return cudaSuccess;
}

// Machine code runs on later GPUs of its generation; on others it was made from PTX, for this GPU.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*)
{
    if (image == 0)
        return told(cudaErrorNoKernelImageForDevice);
    attributes->ptxVersion = image;
    attributes->binaryVersion = image / 10 == capability / 10 ? image : capability;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t* config)
{
    *count = config->attrs[0].val.clusterDim.x <= widest ? 1 : 0;
    return cudaSuccess;
}

namespace emulation {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread)
{
    dim3 cluster;
    for (unsigned i = 0; i < config.numAttrs; ++i)
    {
        const auto& given = config.attrs[i].val.clusterDim;
        cluster = {given.x, given.y, given.z};
    }
    const cudaError_t status = told(refusal(config, cluster, kernel));
    if (status != cudaSuccess)
        return status;
    run({config.gridDim, config.blockDim.x, cluster.x, static_cast<unsigned>(config.dynamicSmemBytes), order, image,
        &thread});
    return cudaSuccess;
}

} // namespace emulation

extern "C" {

// Another GPU, of another number and of compute capability 9.0, and the order of threads, blocks and copies: 0, 1 or 2.
__attribute__((visibility("default"))) void emulation_device(int multiprocessor_count, int shared_bytes, int fiber_order)
{
    ++device;
    multiprocessors = multiprocessor_count;
    shared_limit = shared_bytes;
    order = fiber_order;
    capability = image = 90;
    widest = emulation::kMaxCluster;
    permitted.clear();
    permits.clear();
}

// Its compute capability, e.g. 90, and the architecture that the kernels were compiled for; 0: none that it can run.
__attribute__((visibility("default"))) void emulation_architecture(int of_device, int of_kernels)
{
    capability = of_device;
    image = of_kernels;
}

// A GPU, or a part of one, with too few multiprocessors side by side for larger clusters.
__attribute__((visibility("default"))) void emulation_widest_cluster(unsigned blocks)
{
    widest = blocks;
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
