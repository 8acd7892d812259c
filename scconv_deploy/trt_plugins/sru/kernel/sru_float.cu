// The kernels for float data.
#include "launch.cuh"

namespace scconv {

cudaError_t launch_float(Operator op, const KernelParams& p, const Plan& plan, cudaStream_t stream)
{
    return launch_operator<float>(op, p, plan, stream);
}

cudaError_t compiled_architecture(int& found)
{
    cudaFuncAttributes attributes{};
    const cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(merge_kernel<float>));
    found = attributes.ptxVersion;
    return status;
}

} // namespace scconv
