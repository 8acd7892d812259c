// What is compiled once for each vector width: the loops over elements. Everything else is in sru.cpp.
//
// A width's file is compiled for instructions that the processor may lack. So it defines nothing that the linker could
// take for another file's: its code lies in a namespace of its own, and it includes no C++ library.
#pragma once

#include <cstdint>

namespace scconv::cpu {

constexpr int64_t kBlock = 2048; // elements whose moments are sums in float
constexpr int kLanes = 32;       // partial sums of a block, whatever the width: so every width adds up in one order
constexpr int kTypes = 3;
constexpr int kOperators = 3;

// Moments of a block: mean, and the sum of squares about it.
struct Moments
{
    double mean;
    double squares;
};

// A channel's gate: sign * (x - mean) >= threshold. SRUNorm, SRUSoft: n * first + second == (x - mean) * factor + offset.
struct Gate
{
    float sign;
    float mean;
    float threshold;
    float factor;
    float offset;
};

// Two ranges of channels, half the channels apart: one half's x and y, the other's, each channel's gates.
struct Pair
{
    const void* x[2];
    void* y[2];
    const Gate* gates[2];
    int64_t channels;
    int64_t pixels; // of a channel, one channel behind the other
};

struct Kernels
{
    int32_t lanes;
    void (*measure[kTypes])(const void* x, int64_t count, Moments* blocks);
    void (*reconstruct[kOperators][kTypes])(const Pair& pair);
};

extern const Kernels kKernels4;
extern const Kernels kKernels8;
extern const Kernels kKernels16;

} // namespace scconv::cpu
