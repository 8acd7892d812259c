// The kernels' launchers without kernels, so that everything around them is compiled and run in seconds.
#include <cstdlib>

#include "../../scconv_deploy/trt_plugins/sru/kernel/kernel_params.h"

namespace scconv {

cudaError_t launch_float(Operator, const KernelParams&, const Plan&, cudaStream_t)
{
    return cudaErrorNoKernelImageForDevice;
}
cudaError_t launch_half(Operator, const KernelParams&, const Plan&, cudaStream_t)
{
    return cudaErrorNoKernelImageForDevice;
}
cudaError_t launch_bfloat16(Operator, const KernelParams&, const Plan&, cudaStream_t)
{
    return cudaErrorNoKernelImageForDevice;
}

// A status that a test asks for; 0: there is code.
cudaError_t compiled_architecture(int& found)
{
    const char* const status = std::getenv("SCCONV_TEST_STATUS");
    found = 90;
    return status == nullptr ? cudaErrorNoKernelImageForDevice : static_cast<cudaError_t>(std::atoi(status));
}

} // namespace scconv
