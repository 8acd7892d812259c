// The operator, apart from who calls it: sizes, refusals, and a run whose parts a host may spread over its threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sru_cpu.h"

namespace scconv::cpu {

// Runs task(data, 0) to task(data, count - 1), each once, in any order, on any threads, and returns when all are done.
// False: it could not, and has an error to tell.
class Executor
{
public:
    typedef void (*Task)(void* data, size_t index);
    virtual bool run(Task task, void* data, size_t count) = 0;

protected:
    ~Executor() = default;
};

// Why these sizes and types are refused, or null; pointers are not looked at.
const char* refusal(const ScconvSruCpuParams& params) noexcept;

// Run what refusal() lets pass. False: the executor failed. std::bad_alloc may leave it, from the caller's thread alone.
bool run(const ScconvSruCpuParams& params, Executor& executor);

} // namespace scconv::cpu
