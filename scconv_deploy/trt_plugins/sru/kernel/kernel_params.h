// What every kernel is given, and how the host calls them; no device code, so that the host side compiles by itself.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "../sru_math.h"
#include "plan.h"

namespace scconv {

struct KernelParams
{
    const void* x;
    void* y;
    const float* cut;
    const float* sign;
    const float* first;
    const float* second;
    Moments* pieces; // [N * G, pieces_per_group]
    Group* groups;   // [N * G]
    int64_t batch;
    uint32_t num_groups;
    uint32_t half_groups;   // G / 2, where groups have partners
    uint32_t length;        // L
    uint32_t pixels;        // H * W
    uint32_t half_elements; // C / 2 * H * W
    uint32_t half_channels;
    uint32_t group_channels; // C / G, where that is whole
    uint32_t pieces_per_group;
    uint32_t blocks_per_item; // split: blocks that write a sample
    uint32_t cluster;         // on chip: blocks that share what is reconstructed together
    uint32_t pieces_per_block;
    SharedLayout shared;
    Tile tile; // channels-last
    Divisor by_pixels;
    Divisor by_length;
    Divisor by_group_channels;
    float freedom; // L - ddof
    float eps_var;
    float eps_std;
    bool parameters_are_aligned; // to 16 bytes
};

// One for each data type, compiled in sru_float.cu, sru_half.cu and sru_bfloat16.cu so that a build does them side by
// side.
cudaError_t launch_float(Operator op, const KernelParams& p, const Plan& plan, cudaStream_t stream);
cudaError_t launch_half(Operator op, const KernelParams& p, const Plan& plan, cudaStream_t stream);
cudaError_t launch_bfloat16(Operator op, const KernelParams& p, const Plan& plan, cudaStream_t stream);

// The architecture whose PTX became the current device's code, 90 for compute_90. All types have the same.
cudaError_t compiled_architecture(int& found);

} // namespace scconv
