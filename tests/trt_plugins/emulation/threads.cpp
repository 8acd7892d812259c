// What threads of a kernel call: barriers, shuffles, memory of the cluster's blocks, bulk copies.
#include "cluster.h"
#include "intrinsics.cuh"

namespace emulation {

void Place::need_shared(const void* at, size_t bytes, const char* what) const
{
    const auto* begin = static_cast<const unsigned char*>(at);
    if (begin < memory(rank) || begin + bytes > memory(rank) + grid->shared_bytes)
        fail("%s: outside the shared memory of block %u", what, blockIdx.x);
}

Bulk* Place::find(const uint64_t* barrier)
{
    for (Bulk& bulk : block().bulks)
        if (bulk.barrier == barrier)
            return &bulk;
    return nullptr;
}

Bulk& Place::bulk(const uint64_t* barrier, uint64_t word, const char* what)
{
    Bulk* found = find(barrier);
    if (found == nullptr)
        fail("%s: the barrier was not initialised", what);
    if (word != kBarrier)
        fail("%s: the barrier was overwritten", what);
    return *found;
}

const races::Thread* Place::copier()
{
    if (copiers_taken_ == copiers_.size())
        copiers_.push_back(std::make_unique<races::Thread>());
    return copiers_[copiers_taken_++].get();
}

namespace {

void need_aligned(const void* at, size_t bytes, const char* what)
{
    if (reinterpret_cast<uintptr_t>(at) % bytes != 0)
        fail("%s: an address is no multiple of %zu bytes", what, bytes);
}

} // namespace

unsigned lane()
{
    return threadIdx.x % kWarp;
}

// No order of what the lanes write and read: CUDA promises none for a shuffle.
uint32_t exchange(unsigned mask, uint32_t value, unsigned from)
{
    if (mask != 0xffffffffu)
        fail("a shuffle of some lanes");
    Warp& warp = here->block().warps[threadIdx.x / kWarp];
    const unsigned lanes = std::min(kWarp, blockDim.x - threadIdx.x / kWarp * kWarp);
    warp.values[lane()] = value;
    warp.barrier.pass(lanes, "a shuffle");
    const uint32_t found = warp.values[from];
    warp.barrier.pass(lanes, "a shuffle");
    return found;
}

unsigned char* shared()
{
    return here->memory(here->rank);
}

bool has_clusters()
{
    return here->grid->image >= 90;
}

void cluster_barrier()
{
    if (!has_clusters())
        return __syncthreads();
    here->barrier.meet(blockDim.x * here->grid->cluster, "cluster_barrier");
}

void* remote(void* local, uint32_t rank, uint32_t bytes)
{
    need_aligned(local, bytes, "store_remote");
    here->need_shared(local, bytes, "store_remote");
    if (!has_clusters() || rank == here->rank)
        return local;
    if (rank >= here->grid->cluster)
        fail("store_remote: block %u of a cluster of %u", rank, here->grid->cluster);
    if (here->barrier.generation == 0)
        fail("store_remote: the cluster has not met, so that block %u may not have begun", rank);
    unsigned char* found = here->memory(rank) + (static_cast<unsigned char*>(local) - shared());
    if (here->blocks[rank].left == 0)
    {
        races::wrote(found, bytes); // where it is a race, that is told first
        fail("store_remote: block %u of the cluster has ended", rank);
    }
    return found;
}

void bulk_init(uint64_t* barrier)
{
    if (!has_clusters())
        fail("bulk_init: the kernel was compiled for sm_%d, which has no bulk copies", here->grid->image);
    need_aligned(barrier, sizeof(*barrier), "bulk_init");
    here->need_shared(barrier, sizeof(*barrier), "bulk_init");
    auto& bulks = here->block().bulks;
    if (here->find(barrier) != nullptr)
        fail("bulk_init: the barrier is initialised twice");
    if (bulks.size() == kMostBulks)
        fail("bulk_init: more than %zu barriers of a block", kMostBulks);
    bulks.push_back({barrier, here->copier()});
}

void bulk_expect(const uint64_t* barrier, uint64_t word, uint32_t bytes)
{
    Bulk& bulk = here->bulk(barrier, word, "bulk_expect");
    if (bulk.announced)
        fail("bulk_expect: the barrier is used twice");
    if (bytes > kMostBytes || bytes < bulk.came)
        fail("bulk_expect: %u bytes, of which %u came", bytes, bulk.came);
    bulk.announced = true;
    bulk.expected = bytes;
    bulk.complete = bulk.came == bytes;
}

void bulk_load(void* to, const void* from, uint32_t bytes, const uint64_t* barrier, uint64_t word)
{
    Bulk& bulk = here->bulk(barrier, word, "bulk_load");
    need_aligned(to, 16, "bulk_load");
    need_aligned(from, 16, "bulk_load");
    here->need_shared(to, bytes, "bulk_load");
    if (bytes % 16 != 0)
        fail("bulk_load: %u bytes are no multiple of 16", bytes);
    if (bulk.complete)
        fail("bulk_load: the barrier is used twice");
    auto& copies = here->block().copies;
    if (copies.size() == kMostCopies)
        fail("bulk_load: more than %zu copies of a block under way", kMostCopies);
    races::release(&bulk.issued);
    copies.push_back({to, from, bytes, &bulk});
}

void bulk_wait(const uint64_t* barrier, uint64_t word)
{
    Bulk& bulk = here->bulk(barrier, word, "bulk_wait");
    wait_while(bulk.complete, 0, "bulk_wait, for bytes that nobody loads or announces");
    bulk.awaited = true;
    races::acquire(&bulk.copied);
}

} // namespace emulation

void __syncthreads()
{
    emulation::here->block().barrier.meet(blockDim.x, "__syncthreads");
}

void __syncwarp(unsigned mask)
{
    if (mask != 0xffffffffu)
        emulation::fail("__syncwarp of some lanes");
    const unsigned first = threadIdx.x / emulation::kWarp * emulation::kWarp;
    emulation::Warp& warp = emulation::here->block().warps[threadIdx.x / emulation::kWarp];
    warp.barrier.meet(std::min(emulation::kWarp, blockDim.x - first), "__syncwarp");
}
