// Clusters of a grid, one after the other: shared memory, barriers, bulk copies.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <vector>

#include "cuda_runtime.h"
#include "fibers.h"
#include "races.h"

namespace emulation {

constexpr unsigned kMaxThreads = 1024, kMaxCluster = 8;
constexpr unsigned kWarp = 32;
constexpr size_t kRoom = 256 << 10, kShift = 128; // aligned to no more than kernels may count on
constexpr uint32_t kMostBytes = (1 << 20) - 1;    // of one barrier
constexpr size_t kMostBulks = 128, kMostCopies = 256; // of a block: room is made before threads run, who share no heap

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
        return blocks[rank];
    }
    // Shared memory of a block.
    unsigned char* memory(unsigned which) const
    {
        return memory_ + which * kRoom + kShift;
    }
    void need_shared(const void* at, size_t bytes, const char* what) const;
    Bulk* find(const uint64_t* barrier);
    Bulk& bulk(const uint64_t* barrier, uint64_t word, const char* what);
    const races::Thread* copier();

    const Grid* grid = nullptr;
    unsigned rank = 0; // of the block that runs
    Barrier barrier;
    std::array<Block, kMaxCluster> blocks;

private:
    void begin(unsigned which);
    void end();

    unsigned char* memory_;
    Fibers fibers_;
    races::Thread keeper_; // fills the memory
    std::vector<std::unique_ptr<races::Thread>> copiers_;
    size_t copiers_taken_ = 0;
    unsigned first_block_ = 0, row_ = 0;
    uint64_t filled_ = 0, ended_ = 0; // tokens
};

// Where the thread that runs has its cluster.
extern Place* here;

void run(const Grid& grid);

} // namespace emulation
