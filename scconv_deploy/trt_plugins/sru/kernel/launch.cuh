// From a plan to kernels: one instantiation for each operator and vector width of a data type.
#pragma once

#include <cuda_runtime.h>

#include "split.cuh"

namespace scconv {

// The launch's own status. Not cudaPeekAtLastError, which also tells of an earlier call's failure: after one refused
// launch every later one of the thread would be reported as failed. What a kernel does wrong shows at a later call, as
// always in CUDA.
template <typename Kernel>
cudaError_t launch(
    Kernel* kernel, int64_t blocks, int32_t threads, uint32_t shared_bytes, const KernelParams& p, cudaStream_t stream)
{
    void* arguments[] = {const_cast<KernelParams*>(&p)};
    return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
        arguments, shared_bytes, stream);
}

template <typename T, Operator op, int V, bool rows>
cudaError_t launch_on_chip(const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    const auto kernel = on_chip_kernel<T, op, V, rows>;
    // the device's limit, not what this launch needs: the attribute is the kernel's, and a call of another thread with
    // a smaller pair would lower it between here and the launch
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_limit_bytes));
    return status != cudaSuccess ? status : launch(kernel, plan.blocks, plan.threads, plan.shared_bytes, p, stream);
}

template <typename T, Operator op, int V, bool rows>
cudaError_t launch_split(const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    const int64_t groups = p.batch * p.num_groups;
    cudaError_t status = launch(statistics_kernel<T, V>, groups * plan.pieces, kStatisticsThreads, 0, p, stream);
    if (status != cudaSuccess)
        return status;
    if (plan.algorithm == Algorithm::kSplit)
        return launch(apply_kernel<T, op, V, rows>, plan.blocks, plan.threads, 0, p, stream);
    status = launch(merge_kernel<T>, ceil_divide(groups, kApplyThreads / 32), kApplyThreads, 0, p, stream);
    if (status != cudaSuccess)
        return status;
    return launch(apply_general_kernel<T, op, V>, plan.blocks, plan.threads, 0, p, stream);
}

template <typename T, Operator op, int V, bool rows>
cudaError_t launch_algorithm(const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    return plan.algorithm == Algorithm::kOnChip ? launch_on_chip<T, op, V, rows>(p, plan, stream)
                                                : launch_split<T, op, V, rows>(p, plan, stream);
}

// The widths that widest_vector() and make_plan() choose: 16 bytes, 4 elements, 1 element.
template <typename T, Operator op>
cudaError_t launch_width(const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    if constexpr (sizeof(T) == 2)
        if (plan.vector == 8)
            return plan.rows ? launch_algorithm<T, op, 8, true>(p, plan, stream)
                             : launch_algorithm<T, op, 8, false>(p, plan, stream);
    if (plan.vector == 4)
        return plan.rows ? launch_algorithm<T, op, 4, true>(p, plan, stream)
                         : launch_algorithm<T, op, 4, false>(p, plan, stream);
    return plan.vector == 1 ? launch_algorithm<T, op, 1, true>(p, plan, stream) : cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_operator(Operator op, const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    switch (op)
    {
    case Operator::kSru: return launch_width<T, Operator::kSru>(p, plan, stream);
    case Operator::kSruNorm: return launch_width<T, Operator::kSruNorm>(p, plan, stream);
    case Operator::kSruSoft: return launch_width<T, Operator::kSruSoft>(p, plan, stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace scconv
