// The kernels for float data.
#include "launch.cuh"

namespace scconv {

cudaError_t launch_float(Operator op, const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    return launch_operator<float>(op, p, plan, stream);
}

} // namespace scconv
