// One operator through enqueue on a GPU: inputs and output as files of raw values, memory around the output watched.

#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>

#include <cuda_runtime_api.h>

#include "host.h"

namespace harness {

namespace {

constexpr size_t kGuard = 4096;
constexpr unsigned char kPattern = 0xa5;

size_t bytes_of(const PluginTensorDesc& desc)
{
    size_t count = desc.type == DataType::kFLOAT ? 4 : 2;
    for (int32_t i = 0; i < desc.dims.nbDims; ++i)
        count *= static_cast<size_t>(desc.dims.d[i]);
    return count;
}

// Device memory between two guards.
class Buffer
{
public:
    explicit Buffer(size_t bytes)
        : bytes_(bytes)
    {
        if (cudaMalloc(&base_, bytes + 2 * kGuard) != cudaSuccess)
            base_ = nullptr;
        else
            fill();
    }
    ~Buffer()
    {
        cudaFree(base_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    void fill()
    {
        cudaMemset(base_, kPattern, bytes_ + 2 * kGuard);
    }
    void* data() const
    {
        return base_ == nullptr ? nullptr : static_cast<char*>(base_) + kGuard;
    }
    bool write(const std::vector<char>& values)
    {
        return data() != nullptr && values.size() == bytes_
            && cudaMemcpy(data(), values.data(), bytes_, cudaMemcpyHostToDevice) == cudaSuccess;
    }
    std::vector<char> read() const
    {
        std::vector<char> values(bytes_);
        return cudaMemcpy(values.data(), data(), bytes_, cudaMemcpyDeviceToHost) == cudaSuccess ? values
                                                                                               : std::vector<char>{};
    }
    bool guards_untouched() const
    {
        std::vector<unsigned char> guard(kGuard);
        for (const size_t at : {size_t{0}, kGuard + bytes_})
        {
            if (cudaMemcpy(guard.data(), static_cast<char*>(base_) + at, kGuard, cudaMemcpyDeviceToHost) != cudaSuccess)
                return false;
            for (const unsigned char each : guard)
                if (each != kPattern)
                    return false;
        }
        return true;
    }

private:
    void* base_ = nullptr;
    size_t bytes_;
};

std::vector<char> file(const std::string& path)
{
    std::ifstream stream(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
}

// Enqueue on a stream of its own, or capture that in a graph and replay it.
template <typename Enqueue>
void run_on_stream(Enqueue enqueue, bool captured, Buffer& output, Report& report)
{
    cudaStream_t stream = nullptr;
    report.check("stream", cudaStreamCreate(&stream) == cudaSuccess);
    if (captured)
    {
        // once before, as TensorRT asks of its users: CUDA may load the kernels now; the output is then forgotten
        report.check("enqueue before capture", enqueue(stream) == 0 && cudaStreamSynchronize(stream) == cudaSuccess);
        output.fill();
        report.check("begin capture", cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    }
    report.check("enqueue", enqueue(stream) == 0);
    if (captured)
    {
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t executable = nullptr;
        report.check("capture", cudaStreamEndCapture(stream, &graph) == cudaSuccess);
        report.check("instantiate", cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess);
        report.check("replay", cudaGraphLaunch(executable, stream) == cudaSuccess);
    }
    report.check("kernels", cudaStreamSynchronize(stream) == cudaSuccess);
    cudaStreamDestroy(stream);
}

} // namespace

int run_case(const char* path, const Case& one, int32_t tactic, bool captured, const std::string& folder, Report& report)
{
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
    {
        std::printf("not run: there is no GPU\n");
        return 3;
    }
    const Library library(path, report);
    IPluginCreatorV3One* const creator = library.creator(one.op);
    const std::unique_ptr<IPluginV3> built(creator ? create(*creator, one, TensorRTPhase::kBUILD) : nullptr);
    report.check("created", built != nullptr);
    if (built == nullptr)
        return report.status();
    const auto tensors = one.descriptions();
    const auto ranges = one.dynamic_descriptions();
    const int32_t inputs = 1 + one.parameters();
    IPluginV3OneBuild& build = *Capabilities(*built).build;
    report.check("configured", build.configurePlugin(ranges.data(), inputs, ranges.data() + inputs, 1) == 0);
    const size_t workspace_bytes = build.getWorkspaceSize(ranges.data(), inputs, ranges.data() + inputs, 1);
    const PluginFieldCollection* fields = Capabilities(*built).runtime->getFieldsToSerialize();
    const std::unique_ptr<IPluginV3> loaded(creator->createPlugin(one.op.c_str(), fields, TensorRTPhase::kRUNTIME));
    const std::unique_ptr<IPluginV3> attached(Capabilities(*loaded).runtime->attachToContext(nullptr));
    IPluginV3OneRuntime& runtime = *Capabilities(*attached).runtime;
    report.check("tactic", runtime.setTactic(tactic) == 0);
    report.check("shapes", runtime.onShapeChange(tensors.data(), inputs, tensors.data() + inputs, 1) == 0);

    const char* const names[] = {"x", "cut", "sign", "first", "second"};
    std::vector<std::unique_ptr<Buffer>> buffers;
    std::vector<const void*> pointers;
    for (int32_t i = 0; i < inputs; ++i)
    {
        buffers.push_back(std::make_unique<Buffer>(bytes_of(tensors[i])));
        report.check(std::string("input ") + names[i], buffers[i]->write(file(folder + "/" + names[i] + ".bin")));
        pointers.push_back(buffers[i]->data());
    }
    Buffer output(bytes_of(tensors[inputs])), workspace(workspace_bytes);
    void* const outputs[] = {output.data()};
    const auto enqueue = [&](cudaStream_t stream) {
        return runtime.enqueue(
            tensors.data(), tensors.data() + inputs, pointers.data(), outputs, workspace.data(), stream);
    };
    run_on_stream(enqueue, captured, output, report);
    report.check("memory around the output is untouched", output.guards_untouched());
    report.check("memory around the workspace is untouched", workspace.guards_untouched());
    bool inputs_untouched = true;
    for (int32_t i = 0; i < inputs; ++i)
        inputs_untouched = inputs_untouched && buffers[i]->guards_untouched()
            && buffers[i]->read() == file(folder + "/" + names[i] + ".bin");
    report.check("inputs are untouched", inputs_untouched);
    const std::vector<char> y = output.read();
    std::ofstream file_of_y(folder + "/y.bin", std::ios::binary);
    file_of_y.write(y.data(), static_cast<std::streamsize>(y.size()));
    report.check("y is written", file_of_y.good());
    return report.status();
}

} // namespace harness
