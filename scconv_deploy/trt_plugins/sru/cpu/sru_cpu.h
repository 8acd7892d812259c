// The fused SRU on the CPU: its C interface. Raw pointers and a struct of parameters; no framework in it.
//
// scconv_deploy/trt_plugins/cpu/library.py mirrors the struct; a change of it changes SCCONV_SRU_CPU_ABI_VERSION. The
// library also exports RegisterCustomOps, ONNX Runtime's entry point (ort_operators.cpp).
#pragma once

#include <stdint.h>

#define SCCONV_SRU_CPU_ABI_VERSION 1
#define SCCONV_SRU_CPU_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ScconvSruCpuParams {
    const void* x;       // [N, C, H, W] of type `type`, contiguous; of any alignment that the type allows
    void* y;             // like x; must not overlap it
    const float* cut;    // [C], as the other parameters; float32 whatever x is
    const float* sign;   // [C]
    const float* first;  // [C]; SRUNorm: gamma, SRUSoft: scale, SRU: null
    const float* second; // [C]; SRUNorm: beta, SRUSoft: shift, SRU: null
    int64_t batch;       // N; 0: nothing is done
    int64_t channels;    // C, even
    int64_t pixels;      // H * W
    int32_t num_groups;  // divides C * H * W
    int32_t ddof;
    float eps_var;
    float eps_std;
    int32_t op;          // 0 SRU, 1 SRUNorm, 2 SRUSoft
    int32_t type;        // 0 float, 1 float16, 2 bfloat16
    int32_t threads;     // at most so many; 0 and 1: the caller's alone
    int32_t lanes;       // floats in a vector: 0 the most that the processor has, else 4, 8 or 16
} ScconvSruCpuParams;

SCCONV_SRU_CPU_EXPORT int32_t scconv_sru_cpu_abi_version(void);

// Floats in the widest vector that this library has code for and the processor has registers for: 4, 8 or 16.
SCCONV_SRU_CPU_EXPORT int32_t scconv_sru_cpu_lanes(void);

// Run the operator; null, or the reason for a refusal (a string that lives as long as the library).
//
// The bytes of y are the same for any number of threads, any number of lanes and any place in a batch.
SCCONV_SRU_CPU_EXPORT const char* scconv_sru_cpu_run(const ScconvSruCpuParams* params);

#ifdef __cplusplus
}
#endif
