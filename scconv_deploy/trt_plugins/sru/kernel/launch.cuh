// From a plan to kernels: one instantiation for each operator and vector width of a data type.
#pragma once

#include <cuda_runtime.h>

#include "split.cuh"

namespace scconv {

// A launch reports a wrong configuration at once; what a kernel does wrong shows at a later call, as always in CUDA.
inline cudaError_t launched()
{
    return cudaPeekAtLastError();
}

template <typename T, Operator op, int V, bool rows>
cudaError_t launch_on_chip(const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    const auto kernel = on_chip_kernel<T, op, V, rows>;
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
    if (status != cudaSuccess)
        return status;
    kernel<<<static_cast<unsigned>(plan.blocks), plan.threads, plan.shared_bytes, stream>>>(p);
    return launched();
}

template <typename T, Operator op, int V, bool rows>
cudaError_t launch_split(const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    const int64_t groups = p.batch * p.num_groups;
    const unsigned pieces = static_cast<unsigned>(groups * plan.pieces);
    statistics_kernel<T, V><<<pieces, kStatisticsThreads, 0, stream>>>(p);
    cudaError_t status = launched();
    if (status != cudaSuccess)
        return status;
    if (plan.algorithm == Algorithm::kSplit)
    {
        apply_kernel<T, op, V, rows><<<static_cast<unsigned>(plan.blocks), kApplyThreads, 0, stream>>>(p);
        return launched();
    }
    const unsigned merges = static_cast<unsigned>(ceil_divide(groups, kApplyThreads / 32));
    merge_kernel<T><<<merges, kApplyThreads, 0, stream>>>(p);
    status = launched();
    if (status != cudaSuccess)
        return status;
    apply_general_kernel<T, op, V><<<static_cast<unsigned>(plan.blocks), kApplyThreads, 0, stream>>>(p);
    return launched();
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
