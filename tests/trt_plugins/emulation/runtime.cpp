// The rest of the runtime, for the harness and the plugin: memory is the CPU's, streams run at once. Compiled with
// NVIDIA's own header, which holds the signatures right; a captured call has run when the capture ends.
#include <cstdlib>
#include <cstring>

#include <cuda_runtime_api.h>

namespace {

bool capturing = false;

} // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count)
{
    *count = 1;
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t)
{
    return "an error of the emulation";
}
cudaError_t cudaMalloc(void** at, size_t bytes)
{
    *at = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    return cudaSuccess;
}
cudaError_t cudaFree(void* at)
{
    std::free(at);
    return cudaSuccess;
}
cudaError_t cudaMemset(void* at, int value, size_t bytes)
{
    std::memset(at, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind)
{
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t*)
{
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t)
{
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    return capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode)
{
    capturing = true;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*)
{
    capturing = false;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long)
{
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t)
{
    return cudaSuccess;
}

} // extern "C"
