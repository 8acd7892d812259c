// A grid's blocks, cluster by cluster: shared memory, barriers, bulk copies.
#pragma once

#include <functional>

#include "cuda_runtime.h"

namespace emulation {

constexpr unsigned kMaxThreads = 1024, kMaxCluster = 8;

struct Grid
{
    dim3 blocks;
    unsigned threads;
    unsigned cluster;      // blocks, along x
    unsigned shared_bytes; // of a block
    int order;             // of threads, and of clusters: turn()
    int image;             // the architecture that the kernel was compiled for, e.g. 90
    const std::function<void()>* thread;
};

void run(const Grid& grid);

} // namespace emulation
