// The kernels for half data.
#include "launch.cuh"

namespace scconv {

cudaError_t launch_half(Operator op, const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    return launch_operator<__half>(op, p, plan, stream);
}

} // namespace scconv
