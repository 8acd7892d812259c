// Threads as fibers: one runs until it waits, then the next one.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#include "races.h"

namespace emulation {

// One line on stderr, and the end of the program.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The i-th of `count` that has its turn. order 0: ascending, 1: descending, 2: in odd steps.
size_t turn(int order, size_t i, size_t count);

// What runs as fibers.
class Crew
{
public:
    virtual ~Crew() = default;
    // A thread goes on.
    virtual void enter(unsigned thread) = 0;
    virtual void run(unsigned thread) = 0;
    // Let something happen that is under way by itself; false: there was nothing. idle: all threads wait.
    virtual bool deliver(bool idle) = 0;
};

class Fibers
{
public:
    // Until every thread is done; fails where all wait for ever.
    void run(Crew& crew, unsigned threads, int order);

private:
    struct Fiber
    {
        Fiber();
        ~Fiber();
        Fiber(const Fiber&) = delete;
        Fiber& operator=(const Fiber&) = delete;
        bool waits() const
        {
            return counter != nullptr && *counter == seen;
        }
        ucontext_t context;
        jmp_buf place;
        void* stack;
        races::Thread thread;
        bool begun;
        bool done;
        const unsigned* counter; // waits while this has the value `seen`
        unsigned seen;
        const char* where;
    };
    friend void wait_while(const unsigned& counter, unsigned value, const char* where);
    void resume(Fiber& fiber);
    void pause();
    static void main();

    std::vector<std::unique_ptr<Fiber>> fibers_;
    Crew* crew_ = nullptr;
    unsigned running_ = 0;
    ucontext_t scheduler_;
    [[maybe_unused]] jmp_buf scheduler_place_;
};

// By a thread: others run until counter changes. where: the barrier, for who waits there for ever.
void wait_while(const unsigned& counter, unsigned value, const char* where);

} // namespace emulation
