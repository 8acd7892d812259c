// What is compiled once for each vector width: the loops over elements. Everything else is in sru.cpp.
//
// A width's file is compiled for instructions that the processor may lack. So it defines nothing that the linker could
// take for another file's: its code lies in a namespace of its own, and it includes no C++ library.
#pragma once

#include <cstddef>
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

// What the gates need of their group: its mean is mean + rest.
struct Group
{
    double s;
    float mean;
    double rest;
};

// [C] each.
struct Parameters
{
    const float* cut;
    const float* sign;
    const float* first;  // SRUNorm, SRUSoft
    const float* second; // SRUNorm, SRUSoft
};

// Two ranges of channels, half the channels apart, each in one group: the lower one's x, y, group and first channel, and
// the upper one's.
struct Pair
{
    const void* x[2];
    void* y[2];
    const Group* groups[2];
    int64_t channel[2];
    Parameters parameters;
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
