#include "cluster.h"

#include <sys/mman.h>

#include "poison.h"

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

Place* here = nullptr;

namespace {

uint64_t launched, finished; // tokens

} // namespace

Place::Place()
{
    void* found = mmap(nullptr, kMaxCluster * kRoom, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED)
        fail("no memory for blocks");
    memory_ = static_cast<unsigned char*>(found);
    copiers_.reserve(kMaxCluster * kMostBulks);
    for (Block& block : blocks)
    {
        block.bulks.reserve(kMostBulks);
        block.copies.reserve(kMostCopies);
    }
}

void Place::begin(unsigned which)
{
    Block& block = blocks[which];
    block.barrier = {};
    block.warps.assign((grid->threads + kWarp - 1) / kWarp, {});
    block.bulks.clear();
    block.left = grid->threads;
    ASAN_UNPOISON_MEMORY_REGION(memory(which), kRoom - kShift);
    std::memset(memory(which), 0xff, grid->shared_bytes); // NaN: nobody may count on zeros
    ASAN_POISON_MEMORY_REGION(memory(which) + grid->shared_bytes, kRoom - kShift - grid->shared_bytes);
}

void Place::run_cluster(const Grid& of, unsigned first_block, unsigned row)
{
    grid = &of;
    first_block_ = first_block;
    row_ = row;
    barrier = {};
    copiers_taken_ = 0;
    here = this;
    races::release(&launched);
    const races::Current before;
    keeper_.enter();
    races::acquire(&launched);
    races::acquire(&ended_);
    for (unsigned which = 0; which < grid->cluster; ++which)
        begin(which);
    races::release(&filled_);
    before.enter();
    fibers_.run(*this, grid->cluster * grid->threads, grid->order);
}

void Place::enter(unsigned thread)
{
    rank = thread / grid->threads;
    threadIdx = {thread % grid->threads, 0, 0};
    blockIdx = {first_block_ + rank, row_, 0};
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
            fail("block %u ends: a barrier expects %u bytes, %u came, and %s waited", blockIdx.x, bulk.expected,
                bulk.came, bulk.awaited ? "a thread" : "nobody");
    races::acquire(&block().end);
    races::wrote(memory(rank), grid->shared_bytes);
    ASAN_POISON_MEMORY_REGION(memory(rank), grid->shared_bytes);
}

// order 0: as late as may be; 1: the last one first, too; 2: one after each thread's turn
bool Place::deliver(bool idle)
{
    if (!idle && grid->order != 2)
        return false;
    for (unsigned i = 0; i < grid->cluster; ++i)
    {
        auto& copies = blocks[turn(grid->order, i, grid->cluster)].copies;
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

void run(const Grid& grid)
{
    static std::array<std::unique_ptr<Place>, races::kStrangers> places;
    blockDim = {grid.threads, 1, 1};
    gridDim = {grid.blocks.x, grid.blocks.y, 1};
    const size_t columns = grid.blocks.x / grid.cluster, count = columns * grid.blocks.y;
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

} // namespace emulation
