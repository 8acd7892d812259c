#include "fibers.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include <sys/mman.h>

#include "cuda_runtime.h"

namespace emulation {

namespace {

constexpr size_t kStackBytes = 256 << 10;
Fibers* active = nullptr;

} // namespace

void fail(const char* format, ...)
{
    std::va_list values;
    va_start(values, format);
    std::fputs("emulation: ", stderr);
    std::vfprintf(stderr, format, values);
    std::fputc('\n', stderr);
    va_end(values);
    std::abort();
}

size_t turn(int order, size_t i, size_t count)
{
    constexpr size_t kStep = 10007; // prime: every index has its turn unless this divides the count
    if (order == 1)
        return count - 1 - i;
    return order == 0 || count % kStep == 0 ? i : (i * kStep + 13) % count;
}

Fibers::Fiber::Fiber()
    : stack(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))
{
    if (stack == MAP_FAILED)
        fail("no memory for a thread's stack");
}

Fibers::Fiber::~Fiber()
{
    munmap(stack, kStackBytes);
}

// A fiber begins by swapcontext; later switches jump, which costs no system call (the sanitizers want the former).
#if defined(__SANITIZE_ADDRESS__) || defined(EMULATION_RACES)
void Fibers::pause()
{
    swapcontext(&fibers_[running_]->context, &scheduler_);
}

void Fibers::resume(Fiber& fiber)
{
    const races::Current before;
    fiber.thread.enter();
    swapcontext(&scheduler_, &fiber.context);
    before.enter();
}
#else
void Fibers::pause()
{
    if (_setjmp(fibers_[running_]->place) == 0)
        _longjmp(scheduler_place_, 1);
}

void Fibers::resume(Fiber& fiber)
{
    if (_setjmp(scheduler_place_) != 0)
        return;
    if (fiber.begun)
        _longjmp(fiber.place, 1);
    fiber.begun = true;
    swapcontext(&scheduler_, &fiber.context);
}
#endif

void Fibers::main()
{
    active->crew_->run(active->running_);
    active->fibers_[active->running_]->done = true;
    active->pause(); // and never again
}

void Fibers::run(Crew& crew, unsigned threads, int order)
{
    active = this;
    crew_ = &crew;
    while (fibers_.size() < threads)
        fibers_.push_back(std::make_unique<Fiber>());
    for (unsigned t = 0; t < threads; ++t)
    {
        Fiber& fiber = *fibers_[t];
        fiber.begun = fiber.done = false;
        fiber.counter = nullptr;
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack, 0, kStackBytes};
        makecontext(&fiber.context, main, 0);
    }
    for (unsigned left = threads; left > 0;)
    {
        bool idle = true;
        for (unsigned i = 0; i < threads; ++i)
        {
            running_ = static_cast<unsigned>(turn(order, i, threads));
            Fiber& fiber = *fibers_[running_];
            if (fiber.done || fiber.waits())
                continue;
            idle = false;
            crew.enter(running_);
            resume(fiber);
            left -= fiber.done;
            crew.deliver(false);
        }
        if (left == 0 || !idle || crew.deliver(true))
            continue;
        for (running_ = 0; fibers_[running_]->done;)
            ++running_;
        crew.enter(running_);
        fail("deadlock: thread %u of block %u waits for ever at %s", threadIdx.x, blockIdx.x,
            fibers_[running_]->where);
    }
}

void wait_while(const unsigned& counter, unsigned value, const char* where)
{
    if (counter != value)
        return;
    Fibers::Fiber& fiber = *active->fibers_[active->running_];
    fiber.counter = &counter;
    fiber.seen = value;
    fiber.where = where;
    active->pause();
    fiber.counter = nullptr;
}

} // namespace emulation
