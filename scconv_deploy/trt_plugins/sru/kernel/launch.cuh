// From a plan to kernels: one instantiation for each operator and vector of a data type.
#pragma once

#include <atomic>

#include "channels_last.cuh"
#include "linear.cuh"

namespace scconv {

inline cudaLaunchConfig_t configuration(int64_t blocks, const Plan& plan, cudaLaunchAttribute& cluster, cudaStream_t stream)
{
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = plan.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(plan.threads));
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = plan.cluster > 1 ? 1 : 0;
    return config;
}

// The launch's own status. Not cudaPeekAtLastError, which also tells of an earlier call's failure: after one refused
// launch every later one of the thread would be reported as failed. What a kernel does wrong shows at a later call, as
// always in CUDA.
inline cudaError_t launch(const void* kernel, int64_t blocks, const Plan& plan, const KernelParams& p, cudaStream_t stream)
{
    void* arguments[] = {const_cast<KernelParams*>(&p)};
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = configuration(blocks, plan, cluster, stream);
    return cudaLaunchKernelExC(&config, kernel, arguments);
}

// What is known of a kernel, for the first 64 devices; zero where nothing is.
struct Known
{
    std::atomic<uint64_t> permitted{0}; // a bit a device
    std::atomic<uint64_t> clusters{0};  // the device and plan that were asked for last, and fit
};

// Permit a kernel what the device gives a block, once a device: not what one launch needs, for the attribute is the
// kernel's, and a smaller call of another thread would lower it between here and the launch.
inline cudaError_t permit(const void* kernel, int device, Known& known)
{
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if ((known.permitted.load(std::memory_order_relaxed) & bit) != 0)
        return cudaSuccess;
    int bytes = 0;
    cudaError_t status = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status == cudaSuccess)
        known.permitted.fetch_or(bit, std::memory_order_relaxed);
    return status;
}

// Whether the device can run such a cluster: a part of it, or a small one, may have too few multiprocessors side by side.
inline cudaError_t check_cluster(const void* kernel, int device, const Plan& plan, Known& known, cudaStream_t stream)
{
    const uint64_t asked = (uint64_t{1} << 63) | static_cast<uint64_t>(device) << 52
        | static_cast<uint64_t>(plan.cluster) << 44 | static_cast<uint64_t>(plan.threads) << 32 | plan.shared_bytes;
    if (known.clusters.load(std::memory_order_relaxed) == asked)
        return cudaSuccess;
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = configuration(plan.cluster, plan, cluster, stream);
    int most = 0;
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&most, kernel, &config);
    if (status != cudaSuccess)
        return status;
    if (most == 0)
        return cudaErrorInvalidClusterSize;
    known.clusters.store(asked, std::memory_order_relaxed);
    return cudaSuccess;
}

template <auto kernel>
cudaError_t launch_fused(const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    static Known known;
    const void* function = reinterpret_cast<const void*>(kernel);
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess && plan.shared_bytes > kDefaultSharedBytes)
        status = permit(function, device, known);
    if (status == cudaSuccess && plan.cluster > 1)
        status = check_cluster(function, device, plan, known, stream);
    if (status == cudaSuccess)
        status = launch(function, plan.blocks, plan, p, stream);
    if (status != cudaErrorInvalidValue || plan.shared_bytes <= kDefaultSharedBytes)
        return status;
    known.permitted.store(0, std::memory_order_relaxed); // another context, which has seen no permission
    status = permit(function, device, known);
    return status == cudaSuccess ? launch(function, plan.blocks, plan, p, stream) : status;
}

template <auto statistics, auto merge, auto apply>
cudaError_t launch_split(const KernelParams& p, Plan plan, int64_t statistics_blocks, cudaStream_t stream)
{
    cudaError_t status = launch(reinterpret_cast<const void*>(statistics), statistics_blocks, plan, p, stream);
    if (status != cudaSuccess)
        return status;
    const int32_t threads = plan.threads;
    plan.threads = kSplitThreads;
    plan.shared_bytes = 0; // which only the statistics of tiles need
    const int64_t groups = p.batch * p.num_groups;
    status = launch(reinterpret_cast<const void*>(merge), ceil_divide(groups, kSplitThreads / kWarp), plan, p, stream);
    if (status != cudaSuccess)
        return status;
    plan.threads = threads;
    return launch(reinterpret_cast<const void*>(apply), plan.blocks, plan, p, stream);
}

template <typename T, Operator op, int V, int run>
cudaError_t launch_linear(const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    if (plan.algorithm == Algorithm::kOnChip)
        return launch_fused<fused_kernel<T, op, V, run>>(p, plan, stream);
    const int64_t pairs = (p.batch * p.num_groups + 1) / 2;
    const int64_t blocks = ceil_divide(pairs * p.pieces_per_group, kSplitThreads / kWarp);
    return launch_split<statistics_kernel<T, V>, merge_kernel<T>, apply_kernel<T, op, V, run>>(p, plan, blocks, stream);
}

template <typename T, Operator op, int V, int run>
cudaError_t launch_channels_last(const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    if (plan.algorithm == Algorithm::kOnChip)
        return launch_fused<tile_fused_kernel<T, op, V, run>>(p, plan, stream);
    return launch_split<tile_statistics_kernel<T, V, run>, merge_kernel<T>, tile_apply_kernel<T, op, V, run>>(
        p, plan, plan.blocks, stream);
}

// The vectors that make_sums() chooses.
template <typename T, Operator op>
cudaError_t launch_vector(const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    constexpr int kWidest = 16 / sizeof(T);
    const bool whole = plan.run == plan.vector;
    if (p.tile.channels != 0)
    {
        if (plan.vector == kWidest)
            return whole ? launch_channels_last<T, op, kWidest, kWidest>(p, plan, stream)
                         : launch_channels_last<T, op, kWidest, 1>(p, plan, stream);
        return launch_channels_last<T, op, 1, 1>(p, plan, stream);
    }
    if (plan.vector == kWidest)
        return whole ? launch_linear<T, op, kWidest, kWidest>(p, plan, stream)
                     : launch_linear<T, op, kWidest, 1>(p, plan, stream);
    if constexpr (kWidest > 4)
        if (plan.vector == 4)
            return launch_linear<T, op, 4, 1>(p, plan, stream);
    return launch_linear<T, op, 1, 1>(p, plan, stream);
}

template <typename T>
cudaError_t launch_operator(Operator op, const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    switch (op)
    {
    case Operator::kSru: return launch_vector<T, Operator::kSru>(p, plan, stream);
    case Operator::kSruNorm: return launch_vector<T, Operator::kSruNorm>(p, plan, stream);
    case Operator::kSruSoft: return launch_vector<T, Operator::kSruSoft>(p, plan, stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace scconv
