// The fused SRU's C interface: raw pointers, a struct of parameters, a stream. No framework and no TensorRT in it.
//
// Nothing is allocated and nothing is synchronised; what is kept between calls is a device's limits: calls can be captured
// in a CUDA graph and made from several threads. scconv_deploy/trt_plugins/library.py mirrors the struct; a change of it changes
// SCCONV_SRU_ABI_VERSION.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#define SCCONV_SRU_ABI_VERSION 2
#define SCCONV_SRU_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum ScconvOperator { SCCONV_SRU = 0, SCCONV_SRU_NORM = 1, SCCONV_SRU_SOFT = 2 };
enum ScconvType { SCCONV_FLOAT = 0, SCCONV_HALF = 1, SCCONV_BFLOAT16 = 2 };
enum ScconvLayout {
    SCCONV_LINEAR = 0,        // [N, C, H, W]
    SCCONV_CHANNELS_LAST = 1, // [N, H, W, C]: TensorRT's kHWC, and kHWC8 where 8 divides C; no group may straddle channels
};
enum ScconvAlgorithm {
    SCCONV_AUTO = 0,
    SCCONV_ON_CHIP = 1, // one read, one write: a block, or a cluster of blocks, holds what it reconstructs
    SCCONV_SPLIT = 2,   // statistics, merge, apply: two reads, one write, a workspace
};

typedef struct ScconvSruParams {
    const void* x;      // [N, C, H, W] of type `type`, contiguous in `layout`, aligned to 16 bytes
    void* y;            // like x; must not overlap it
    const float* cut;    // [C], as the other parameters; float32 whatever x is: in 16 bits a cut is another cut
    const float* sign;   // [C]
    const float* first;  // [C]; SRUNorm: gamma, SRUSoft: scale, SRU: null
    const float* second; // [C]; SRUNorm: beta, SRUSoft: shift, SRU: null
    void* workspace;    // scconv_sru_workspace_bytes(), aligned to 16 bytes; null where that is 0
    uint64_t workspace_bytes;
    int64_t batch;    // N; 0: nothing is done
    int64_t channels; // C, even
    int64_t pixels;   // H * W
    int32_t num_groups;
    int32_t ddof; // 0 or 1
    float eps_var;
    float eps_std;
    int32_t op;        // ScconvOperator
    int32_t type;      // ScconvType
    int32_t layout;    // ScconvLayout
    int32_t algorithm; // ScconvAlgorithm; one that the sizes do not allow is replaced by one that they do
} ScconvSruParams;

// SCCONV_SRU_ABI_VERSION of the library.
SCCONV_SRU_EXPORT int32_t scconv_sru_abi_version(void);

// Why these sizes and types are refused, or null; pointers are not looked at. Needs no GPU.
SCCONV_SRU_EXPORT const char* scconv_sru_refusal(const ScconvSruParams* params);

// Bytes of workspace that suffice for these sizes, or smaller ones, with any algorithm. Needs no GPU.
SCCONV_SRU_EXPORT uint64_t scconv_sru_workspace_bytes(const ScconvSruParams* params);

// The algorithm that the current device would run, in *algorithm. cudaErrorNoKernelImageForDevice: the library holds
// neither machine code nor PTX for the device; cudaErrorNoDevice, cudaErrorInsufficientDriver: there is no device.
SCCONV_SRU_EXPORT cudaError_t scconv_sru_choose(const ScconvSruParams* params, int32_t* algorithm);

// Enqueue on the current device. cudaErrorInvalidValue: refused, a null or misaligned pointer, or too small a workspace.
SCCONV_SRU_EXPORT cudaError_t scconv_sru_enqueue(const ScconvSruParams* params, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
