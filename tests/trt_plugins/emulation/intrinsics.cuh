// In the place of kernel/intrinsics.cuh: shared memory, clusters and bulk copies of the emulation (threads.cpp).
//
// What a kernel's own code touches (a barrier's word, another block's memory) is touched here, in code that is compiled
// with the kernel, so that the sanitizers see it.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace emulation {

// The block's, and where `local` of it lies in another block of the cluster.
unsigned char* shared();
void* remote(void* local, uint32_t rank, uint32_t bytes);

// Whether the kernels were compiled for sm_90 or later.
bool has_clusters();
void cluster_barrier();

// word: what the barrier holds, which is kBarrier from bulk_init on
constexpr uint64_t kBarrier = 0x5ca1ab1e0ddba11;
void bulk_init(uint64_t* barrier);
void bulk_expect(const uint64_t* barrier, uint64_t word, uint32_t bytes);
void bulk_load(void* to, const void* from, uint32_t bytes, const uint64_t* barrier, uint64_t word);
void bulk_wait(const uint64_t* barrier, uint64_t word);

} // namespace emulation

namespace scconv {

using BulkBarrier = uint64_t;

inline unsigned char* dynamic_shared()
{
    return emulation::shared();
}
inline bool bulk_copies()
{
    return emulation::has_clusters();
}
inline void cluster_barrier()
{
    emulation::cluster_barrier();
}
inline void cluster_start()
{
    emulation::cluster_barrier();
}
inline void store_remote(float4* local, uint32_t rank, float4 value)
{
    *static_cast<float4*>(emulation::remote(local, rank, sizeof(value))) = value;
}
inline void bulk_init(BulkBarrier* barrier)
{
    emulation::bulk_init(barrier);
    *barrier = emulation::kBarrier;
}
inline void bulk_expect(BulkBarrier* barrier, uint32_t bytes)
{
    emulation::bulk_expect(barrier, *barrier, bytes);
}
inline void bulk_load(void* to, const void* from, uint32_t bytes, BulkBarrier* barrier)
{
    emulation::bulk_load(to, from, bytes, barrier, *barrier);
}
inline void bulk_wait(BulkBarrier* barrier)
{
    emulation::bulk_wait(barrier, *barrier);
}

} // namespace scconv
