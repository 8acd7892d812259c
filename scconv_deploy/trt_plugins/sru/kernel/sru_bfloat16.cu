// The kernels for bfloat16 data.
#include "launch.cuh"

namespace scconv {

cudaError_t launch_bfloat16(Operator op, const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    return launch_operator<__nv_bfloat16>(op, p, plan, stream);
}

} // namespace scconv
