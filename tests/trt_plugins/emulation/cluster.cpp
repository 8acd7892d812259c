#include "cluster.h"

#include <array>
#include <memory>
#include <vector>

#include <sys/mman.h>

#include "fibers.h"
#include "intrinsics.cuh"
#include "poison.h"
#include "races.h"

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kRoom = 256 << 10, kShift = 128; // shared memory lies at no greater power of two than kernels may count on
constexpr uint32_t kMostBytes = (1 << 20) - 1;    // of one barrier
constexpr size_t kMostBulks = 128, kMostCopies = 256; // of a block: room is made before threads run, who share no heap

// Tokens by turns: who comes early to the next meeting is not seen by those who leave this one.
struct Barrier
{
    unsigned arrived = 0;
    unsigned generation = 0;
    uint64_t tokens[2] = {};

    void meet(unsigned count, const char* where)
    {
        const unsigned before = generation;
        races::release(&tokens[before % 2]);
        pass(count, where);
        races::acquire(&tokens[before % 2]);
    }
    // without order of what the threads write and read
    void pass(unsigned count, const char* where)
    {
        const unsigned before = generation;
        if (++arrived < count)
            return wait_while(generation, before, where);
        arrived = 0;
        ++generation;
    }
};

struct Warp
{
    Barrier barrier;
    uint32_t values[kWarp];
};

struct Bulk
{
    const uint64_t* barrier;
    const races::Thread* copier;
    bool announced = false;
    bool awaited = false;
    uint32_t expected = 0;
    uint32_t came = 0;
    unsigned complete = 0;
    uint64_t issued = 0, copied = 0; // tokens
};

struct Copy
{
    void* to;
    const void* from;
    uint32_t bytes;
    Bulk* bulk;
};

struct Block
{
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<Bulk> bulks;
    std::vector<Copy> copies; // under way
    unsigned left; // threads that are not done
    uint64_t end;  // token
};

// Clusters that follow each other in one place, in the same memory.
class Place : public Crew
{
public:
    Place();
    void run_cluster(const Grid& grid, unsigned first_block, unsigned row);
    void enter(unsigned thread) override;
    void run(unsigned thread) override;
    bool deliver(bool idle) override;

    Block& block()
    {
        return blocks_[rank_];
    }
    unsigned char* memory(unsigned rank) const
    {
        return memory_ + rank * kRoom + kShift;
    }
    void need_shared(const void* at, size_t bytes, const char* what) const;
    Bulk* find(const uint64_t* barrier);
    Bulk& bulk(const uint64_t* barrier, uint64_t word, const char* what);
    const races::Thread* copier();

    const Grid* grid = nullptr;
    unsigned rank_ = 0; // of the block that runs
    Barrier barrier;
    std::array<Block, kMaxCluster> blocks_;

private:
    void begin(unsigned rank);
    void end();

    unsigned char* memory_ = static_cast<unsigned char*>(
        mmap(nullptr, kMaxCluster * kRoom, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    Fibers fibers_;
    races::Thread keeper_; // fills the memory
    std::vector<std::unique_ptr<races::Thread>> copiers_;
    size_t copiers_taken_ = 0;
    unsigned first_block_ = 0, row_ = 0;
    uint64_t filled_ = 0, ended_ = 0; // tokens
};

Place* here = nullptr;
uint64_t launched, finished; // tokens

Place::Place()
{
    copiers_.reserve(kMaxCluster * kMostBulks);
    for (Block& block : blocks_)
    {
        block.bulks.reserve(kMostBulks);
        block.copies.reserve(kMostCopies);
    }
}

void Place::begin(unsigned rank)
{
    Block& block = blocks_[rank];
    block.barrier = {};
    block.warps.assign((grid->threads + kWarp - 1) / kWarp, {});
    block.bulks.clear();
    block.left = grid->threads;
    ASAN_UNPOISON_MEMORY_REGION(memory(rank), kRoom - kShift);
    std::memset(memory(rank), 0xff, grid->shared_bytes); // NaN: nobody may count on zeros
    ASAN_POISON_MEMORY_REGION(memory(rank) + grid->shared_bytes, kRoom - kShift - grid->shared_bytes);
}

void Place::run_cluster(const Grid& of, unsigned first_block, unsigned row)
{
    grid = &of;
    first_block_ = first_block;
    row_ = row;
    barrier = {};
    copiers_taken_ = 0;
    here = this;
    const races::Current before;
    keeper_.enter();
    races::acquire(&launched);
    races::acquire(&ended_);
    for (unsigned rank = 0; rank < grid->cluster; ++rank)
        begin(rank);
    races::release(&filled_);
    before.enter();
    fibers_.run(*this, grid->cluster * grid->threads, grid->order);
}

void Place::enter(unsigned thread)
{
    rank_ = thread / grid->threads;
    threadIdx = {thread % grid->threads, 0, 0};
    blockIdx = {first_block_ + rank_, row_, 0};
}

void Place::run(unsigned)
{
    races::acquire(&filled_);
    (*grid->thread)();
    races::release(&block().end);
    if (--block().left == 0)
        end();
    races::release(&ended_);
    races::release(&finished);
}

// By the last thread of a block: its memory is gone, which is a write for all who are not known to be done with it.
void Place::end()
{
    const bool under_way = !block().copies.empty();
    while (under_way && deliver(true)) // where it is a race, that is told first
        ;
    if (under_way)
        fail("block %u ends while a bulk copy into it is under way", blockIdx.x);
    for (const Bulk& bulk : block().bulks)
        if (bulk.came != bulk.expected || !bulk.awaited)
            fail("block %u ends: a barrier expects %u bytes, %u came, and %s waited", blockIdx.x, bulk.expected, bulk.came,
                bulk.awaited ? "a thread" : "nobody");
    races::acquire(&block().end);
    races::wrote(memory(rank_), grid->shared_bytes);
    ASAN_POISON_MEMORY_REGION(memory(rank_), grid->shared_bytes);
}

// order 0: as late as may be; 1: the last one first, too; 2: one after each thread's turn
bool Place::deliver(bool idle)
{
    if (!idle && grid->order != 2)
        return false;
    for (unsigned i = 0; i < grid->cluster; ++i)
    {
        auto& copies = blocks_[turn(grid->order, i, grid->cluster)].copies;
        if (copies.empty())
            continue;
        const auto next = grid->order == 1 ? copies.end() - 1 : copies.begin();
        const Copy copy = *next;
        copies.erase(next);
        Bulk& bulk = *copy.bulk;
        const races::Current before;
        bulk.copier->enter();
        races::acquire(&bulk.issued);
        std::memcpy(copy.to, copy.from, copy.bytes);
        races::release(&bulk.copied);
        before.enter();
        bulk.came += copy.bytes;
        if (bulk.announced && bulk.came > bulk.expected)
            fail("bulk_load: a barrier expects %u bytes, and %u came", bulk.expected, bulk.came);
        bulk.complete = bulk.announced && bulk.came == bulk.expected;
        return true;
    }
    return false;
}

void Place::need_shared(const void* at, size_t bytes, const char* what) const
{
    const auto* begin = static_cast<const unsigned char*>(at);
    if (begin < memory(rank_) || begin + bytes > memory(rank_) + grid->shared_bytes)
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

void need_aligned(const void* at, size_t bytes, const char* what)
{
    if (reinterpret_cast<uintptr_t>(at) % bytes != 0)
        fail("%s: an address is no multiple of %zu bytes", what, bytes);
}

} // namespace

void run(const Grid& grid)
{
    static std::array<std::unique_ptr<Place>, races::kStrangers> places;
    blockDim = {grid.threads, 1, 1};
    gridDim = {grid.blocks.x, grid.blocks.y, 1};
    const size_t columns = grid.blocks.x / grid.cluster, count = columns * grid.blocks.y;
    races::release(&launched);
    for (size_t i = 0; i < count; ++i)
    {
        const size_t cluster = turn(grid.order, i, count);
        auto& place = places[i % places.size()];
        if (place == nullptr)
            place = std::make_unique<Place>();
        place->run_cluster(
            grid, static_cast<unsigned>(cluster % columns) * grid.cluster, static_cast<unsigned>(cluster / columns));
    }
    races::acquire(&finished);
}

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
    return here->memory(here->rank_);
}

bool has_clusters()
{
    return here->grid->image >= 90;
}

uint32_t cluster_rank()
{
    return has_clusters() ? here->rank_ : 0;
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
    if (!has_clusters() || rank == here->rank_)
        return local;
    if (rank >= here->grid->cluster)
        fail("store_remote: block %u of a cluster of %u", rank, here->grid->cluster);
    if (here->barrier.generation == 0)
        fail("store_remote: the cluster has not met, so that block %u may not have begun", rank);
    unsigned char* found = here->memory(rank) + (static_cast<unsigned char*>(local) - shared());
    if (here->blocks_[rank].left == 0)
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
