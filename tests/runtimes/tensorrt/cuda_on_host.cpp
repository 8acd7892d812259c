// The CUDA runtime's functions on host memory, stricter than the real ones: work on a stream runs when somebody waits for
// it and not before, allocations are checked and start as garbage, and any call can be made to fail.
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace {

using Work = std::function<int()>;

constexpr int kInvalidValue = 1;
constexpr int kNotReady = 600;
constexpr int kCaptureUnsupported = 900;

struct Stream {
    std::deque<Work> queue;
    std::vector<Work>* captured = nullptr;
};
struct Event {
    bool recorded = false;
    bool reached = false;
    double time_ms = 0;
};

std::map<char*, size_t> memory;
std::map<std::string, int> live;
std::string calls;
std::string failing;
int failing_code = 0;
int capturing = 0;
double clock_ms = 0;

int enter(const char* name)
{
    calls += calls.empty() ? name : std::string(" ") + name;
    return failing == name ? failing_code : 0;
}

bool inside(const void* address, size_t bytes)
{
    auto found = memory.upper_bound(const_cast<char*>(static_cast<const char*>(address)));
    if (found == memory.begin()) {
        return false;
    }
    --found;
    return static_cast<const char*>(address) + bytes <= found->first + found->second;
}

int put(Stream* stream, Work work)
{
    if (stream->captured != nullptr) {
        stream->captured->push_back(std::move(work));
    } else {
        stream->queue.push_back(std::move(work));
    }
    return 0;
}

template <typename T>
int make(void** out, const char* kind)
{
    *out = new T();
    ++live[kind];
    return 0;
}

template <typename T>
int destroy(void* object, const char* kind)
{
    if (object == nullptr) {
        return kInvalidValue;
    }
    delete static_cast<T*>(object);
    --live[kind];
    return 0;
}

} // namespace

#define ENTER                                                                                                          \
    if (int code = enter(__func__)) {                                                                                  \
        return code;                                                                                                   \
    }

extern "C" {

int cudaMalloc(void** out, size_t bytes)
{
    ENTER
    if (capturing > 0) {
        return kCaptureUnsupported;
    }
    char* block = new char[bytes];
    std::memset(block, 0xCD, bytes);
    memory[block] = bytes;
    *out = block;
    return 0;
}

int cudaFree(void* pointer)
{
    ENTER
    auto found = memory.find(static_cast<char*>(pointer));
    if (found == memory.end()) {
        return kInvalidValue;
    }
    delete[] found->first;
    memory.erase(found);
    return 0;
}

int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream)
{
    ENTER
    if ((kind != 1 && kind != 2) || !inside(kind == 1 ? to : from, bytes)) {
        return kInvalidValue;
    }
    return put(static_cast<Stream*>(stream), [=] {
        std::memcpy(to, from, bytes);
        return 0;
    });
}

int cudaMemGetInfo(size_t* free, size_t* total)
{
    ENTER
    *free = 3000;
    *total = 4000;
    return 0;
}

int cudaStreamCreateWithFlags(void** out, unsigned flags)
{
    ENTER
    return flags == 1 ? make<Stream>(out, "stream") : kInvalidValue;
}

int cudaStreamSynchronize(void* pointer)
{
    ENTER
    auto* stream = static_cast<Stream*>(pointer);
    if (stream->captured != nullptr) {
        return kCaptureUnsupported;
    }
    while (!stream->queue.empty()) {
        Work work = stream->queue.front();
        stream->queue.pop_front();
        clock_ms += 1;
        if (int code = work()) {
            return code;
        }
    }
    return 0;
}

int cudaStreamDestroy(void* stream)
{
    ENTER
    return destroy<Stream>(stream, "stream");
}

int cudaStreamBeginCapture(void* pointer, int mode)
{
    ENTER
    auto* stream = static_cast<Stream*>(pointer);
    if (mode != 1 || stream->captured != nullptr) {
        return kInvalidValue;
    }
    stream->captured = new std::vector<Work>();
    ++capturing;
    return 0;
}

int cudaStreamEndCapture(void* pointer, void** graph)
{
    ENTER
    auto* stream = static_cast<Stream*>(pointer);
    if (stream->captured == nullptr) {
        return kInvalidValue;
    }
    *graph = stream->captured;
    stream->captured = nullptr;
    --capturing;
    ++live["graph"];
    return 0;
}

int cudaGraphInstantiateWithFlags(void** out, void* graph, unsigned long long flags)
{
    ENTER
    *out = new std::vector<Work>(*static_cast<std::vector<Work>*>(graph));
    ++live["exec"];
    return flags == 0 ? 0 : kInvalidValue;
}

int cudaGraphLaunch(void* graph, void* stream)
{
    ENTER
    for (const Work& work : *static_cast<std::vector<Work>*>(graph)) {
        put(static_cast<Stream*>(stream), work);
    }
    return 0;
}

int cudaGraphExecDestroy(void* graph)
{
    ENTER
    return destroy<std::vector<Work>>(graph, "exec");
}

int cudaGraphDestroy(void* graph)
{
    ENTER
    return destroy<std::vector<Work>>(graph, "graph");
}

int cudaEventCreate(void** out)
{
    ENTER
    return make<Event>(out, "event");
}

int cudaEventRecord(void* pointer, void* stream)
{
    ENTER
    auto* event = static_cast<Event*>(pointer);
    event->recorded = true;
    return put(static_cast<Stream*>(stream), [=] {
        event->reached = true;
        event->time_ms = clock_ms;
        return 0;
    });
}

int cudaEventElapsedTime(float* out, void* from, void* to)
{
    ENTER
    auto *first = static_cast<Event*>(from), *last = static_cast<Event*>(to);
    if (!first->recorded || !last->recorded) {
        return kInvalidValue;
    }
    if (!first->reached || !last->reached) {
        return kNotReady;
    }
    *out = static_cast<float>(last->time_ms - first->time_ms);
    return 0;
}

int cudaEventDestroy(void* event)
{
    ENTER
    return destroy<Event>(event, "event");
}

int cudaRuntimeGetVersion(int* version)
{
    ENTER
    *version = 12060;
    return 0;
}

const char* cudaGetErrorString(int code) { return code == 2 ? "out of memory" : code == 100 ? "no CUDA-capable device is detected" : "some error"; }

// --- for the tests ---

// A kernel: runs on the stream, in its turn.
int host_launch(void* stream, int (*kernel)())
{
    return put(static_cast<Stream*>(stream), kernel);
}
void host_fail(const char* name, int code)
{
    failing = name;
    failing_code = code;
}
const char* host_calls()
{
    static std::string copy;
    copy.swap(calls);
    calls.clear();
    return copy.c_str();
}
int host_live()
{
    int total = static_cast<int>(memory.size());
    for (const auto& kind : live) {
        total += kind.second;
    }
    return total;
}
}
