// What ThreadSanitizer is told of fibers. The emulation's own files are compiled without it (their counters would be
// races), with EMULATION_RACES for these calls; without that there is nobody to tell.
#pragma once

#include <cstddef>

#ifdef EMULATION_RACES
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_write_range(void* at, unsigned long bytes);
#endif

namespace emulation::races {

#ifdef EMULATION_RACES
// Two clusters that follow each other are strangers: neither sees what the other wrote.
constexpr unsigned kStrangers = 2;

// A thread in the sanitizer's eyes; knows what its maker has seen.
class Thread
{
public:
    Thread()
        : state_(__tsan_create_fiber(0))
    {
    }
    ~Thread()
    {
        __tsan_destroy_fiber(state_);
    }
    Thread(const Thread&) = delete;
    Thread& operator=(const Thread&) = delete;
    // What follows is this thread's doing. Order comes from acquire and release alone.
    void enter() const
    {
        __tsan_switch_to_fiber(state_, __tsan_switch_to_fiber_no_sync);
    }

private:
    void* state_;
};

// Whoever runs, to be entered again.
class Current
{
public:
    void enter() const
    {
        __tsan_switch_to_fiber(state_, __tsan_switch_to_fiber_no_sync);
    }

private:
    void* state_ = __tsan_get_current_fiber();
};

inline void release(void* token)
{
    __tsan_release(token);
}
inline void acquire(void* token)
{
    __tsan_acquire(token);
}
inline void wrote(void* at, size_t bytes)
{
    __tsan_write_range(at, bytes);
}
#else
constexpr unsigned kStrangers = 1;

struct Thread
{
    void enter() const {}
};
using Current = Thread;

inline void release(void*) {}
inline void acquire(void*) {}
inline void wrote(void*, size_t) {}
#endif

} // namespace emulation::races
