// What C++ has no word for: shared memory, barriers of a cluster, bulk copies.
//
// The one file that the emulation on the CPU replaces by its own (tests/trt_plugins/emulation/intrinsics.cuh). Clusters and
// bulk copies are of sm_90 and later; on older architectures a cluster is one block, and nobody copies in bulk.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace scconv {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SCCONV_HAS_CLUSTERS 1
#else
#define SCCONV_HAS_CLUSTERS 0
#endif

// The block's dynamic shared memory: kernels use no other, so that a block of the emulation has its own.
__device__ __forceinline__ unsigned char* dynamic_shared()
{
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

// --- clusters ---

// Every thread of every block of the cluster; what was written before is seen after, other blocks' shared memory included.
__device__ __forceinline__ void cluster_barrier()
{
#if SCCONV_HAS_CLUSTERS
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// The first meeting, with nothing to be seen yet: every block of the cluster runs, so its shared memory may be written.
__device__ __forceinline__ void cluster_start()
{
#if SCCONV_HAS_CLUSTERS
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// Write 16 bytes to where `local` lies in the shared memory of the cluster's block `rank`.
__device__ __forceinline__ void store_remote(float4* local, uint32_t rank, float4 value)
{
#if SCCONV_HAS_CLUSTERS
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "f"(value.x), "f"(value.y),
        "f"(value.z), "f"(value.w)
        : "memory");
#else
    *local = value;
#endif
}

// --- bulk copies: global to shared memory, counted by a barrier in shared memory ---

using BulkBarrier = uint64_t;

__device__ constexpr bool bulk_copies()
{
    return SCCONV_HAS_CLUSTERS;
}

// By one thread, before the block meets; one thread will announce the bytes.
__device__ __forceinline__ void bulk_init(BulkBarrier* barrier)
{
#if SCCONV_HAS_CLUSTERS
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(at) : "memory");
#endif
}

// By one thread: the barrier completes when so many bytes have come.
__device__ __forceinline__ void bulk_expect(BulkBarrier* barrier, uint32_t bytes)
{
#if SCCONV_HAS_CLUSTERS
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#endif
}

// By one thread: a multiple of 16 bytes, both ends aligned to 16.
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes, BulkBarrier* barrier)
{
#if SCCONV_HAS_CLUSTERS
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
        "l"(from), "r"(bytes), "r"(at)
        : "memory");
#endif
}

// By every thread that reads the bytes; the barrier is used once.
__device__ __forceinline__ void bulk_wait(BulkBarrier* barrier)
{
#if SCCONV_HAS_CLUSTERS
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    uint32_t done = 0;
    while (done == 0)
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(at)
                     : "memory");
#endif
}

} // namespace scconv
