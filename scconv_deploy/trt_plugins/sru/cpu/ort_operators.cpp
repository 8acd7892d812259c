// The operators of the domain scconv for ONNX Runtime: what SessionOptions::RegisterCustomOpsLibrary loads.
//
// A node takes its meaning from a registered operator before a function that its file carries. So a session with this
// library runs these kernels, and one without it the function. There is no way back for a single node: everything that the
// functions compute is computed here, in each of their types. Outputs have x's shape (without shapes ONNX Runtime leaves
// out the fusions behind an SRU).
//
// No exception leaves a callback: the runtime would not catch it.
#include <array>
#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels.h"
#include "ort_interface.h"
#include "sru.h"

namespace {

using namespace scconv;
using ort::get;

constexpr const char* kNames[] = {"SRU", "SRUNorm", "SRUSoft"};
constexpr const char* kParameters[] = {"cut", "sign", "first", "second"};
constexpr ort::ElementType kTypes[] = {ort::kFloat, ort::kFloat16, ort::kBfloat16};

OrtStatus* refuse(const OrtApi* api, ort::ErrorCode code, const char* message) noexcept
{
    return get<ort::CreateStatus>(api)(code, message);
}

// A callback's body; what it throws becomes a status.
template <typename Body>
OrtStatus* guarded(const OrtApi* api, Body body) noexcept
{
    try
    {
        return body();
    }
    catch (const std::exception& error)
    {
        return refuse(api, ort::kFail, error.what());
    }
    catch (...)
    {
        return refuse(api, ort::kFail, "an unknown exception");
    }
}

// An operator for one type: what the runtime reads, which one it is, and whose.
struct Operator : ort::CustomOp
{
    const OrtApi* api;
    int32_t op;
    int32_t type;
};

const Operator& self(const ort::CustomOp* op) noexcept { return *static_cast<const Operator*>(op); }

// --- a node ---

struct Kernel
{
    const OrtApi* api;
    const char* name;
    ScconvSruCpuParams params; // op, type and attributes; sizes and pointers come with each call
    size_t inputs;
};

OrtStatus* read_attributes(const OrtApi* api, const OrtKernelInfo* info, ScconvSruCpuParams& params) noexcept
{
    int64_t groups = 0, ddof = 0;
    if (OrtStatus* status = get<ort::GetAttributeInt>(api)(info, "num_groups", &groups))
        return status;
    if (OrtStatus* status = get<ort::GetAttributeInt>(api)(info, "ddof", &ddof))
        return status;
    if (OrtStatus* status = get<ort::GetAttributeFloat>(api)(info, "eps_var", &params.eps_var))
        return status;
    if (OrtStatus* status = get<ort::GetAttributeFloat>(api)(info, "eps_std", &params.eps_std))
        return status;
    if (groups < 1 || groups > INT32_MAX)
        return refuse(api, ort::kInvalidArgument, "scconv: num_groups is not between 1 and 2^31 - 1");
    if (ddof < 0 || ddof > 1)
        return refuse(api, ort::kInvalidArgument, "scconv: ddof is not 0 or 1");
    params.num_groups = static_cast<int32_t>(groups);
    params.ddof = static_cast<int32_t>(ddof);
    return nullptr;
}

OrtStatus* create_kernel(
    const ort::CustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) noexcept
{
    return guarded(api, [&]() -> OrtStatus* {
        Kernel made{api, kNames[self(op).op], {}, op->input_count(op)};
        made.params.op = self(op).op;
        made.params.type = self(op).type;
        if (OrtStatus* status = read_attributes(api, info, made.params))
            return status;
        *kernel = new Kernel(made);
        return nullptr;
    });
}

void destroy_kernel(void* kernel) noexcept { delete static_cast<Kernel*>(kernel); }

// --- a call ---

// Sizes of a tensor; of at most four dimensions are kept.
struct Shape
{
    size_t rank;
    int64_t sizes[4];
};

OrtStatus* shape_of(const OrtApi* api, const OrtValue* value, Shape& shape) noexcept
{
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (OrtStatus* status = get<ort::GetTensorTypeAndShape>(api)(value, &info))
        return status;
    OrtStatus* status = get<ort::GetDimensionsCount>(api)(info, &shape.rank);
    if (!status && shape.rank <= 4)
        status = get<ort::GetDimensions>(api)(info, shape.sizes, shape.rank);
    get<ort::ReleaseTensorTypeAndShapeInfo>(api)(info);
    return status;
}

// Shape and data of a node's input. The data are read only.
OrtStatus* read_input(const OrtApi* api, OrtKernelContext* context, size_t index, Shape& shape, void** data) noexcept
{
    const OrtValue* value = nullptr;
    if (OrtStatus* status = get<ort::GetInput>(api)(context, index, &value))
        return status;
    if (OrtStatus* status = shape_of(api, value, shape))
        return status;
    return get<ort::GetTensorMutableData>(api)(const_cast<OrtValue*>(value), data);
}

// ONNX Runtime's own threads.
class RuntimeThreads final : public cpu::Executor
{
public:
    RuntimeThreads(const OrtApi* api, const OrtKernelContext* context) : api_(api), context_(context) {}

    bool run(Task task, void* data, size_t count) override
    {
        status = get<ort::ParallelFor>(api_)(context_, task, count, 0, data);
        return !status;
    }

    OrtStatus* status = nullptr;

private:
    const OrtApi* api_;
    const OrtKernelContext* context_;
};

OrtStatus* compute(void* data, OrtKernelContext* context) noexcept
{
    const Kernel& kernel = *static_cast<const Kernel*>(data);
    const OrtApi* api = kernel.api;
    return guarded(api, [&]() -> OrtStatus* {
        char message[160];
        const auto refused = [&](const char* what) {
            std::snprintf(message, sizeof(message), "scconv::%s: %s", kernel.name, what);
            return refuse(api, ort::kInvalidArgument, message);
        };
        ScconvSruCpuParams params = kernel.params;
        Shape x;
        void* pointers[5] = {};
        if (OrtStatus* status = read_input(api, context, 0, x, &pointers[0]))
            return status;
        if (x.rank != 4)
            return refused("x is not [N, C, H, W]");
        for (size_t i = 1; i < kernel.inputs; ++i)
        {
            Shape parameter;
            if (OrtStatus* status = read_input(api, context, i, parameter, &pointers[i]))
                return status;
            if (parameter.rank == 1 && parameter.sizes[0] == x.sizes[1])
                continue;
            char what[64];
            std::snprintf(what, sizeof(what), "%s is not [C] of x, [N, C, H, W]", kParameters[i - 1]);
            return refused(what);
        }
        params.batch = x.sizes[0];
        params.channels = x.sizes[1];
        params.pixels = x.sizes[2] * x.sizes[3];
        if (const char* reason = cpu::refusal(params))
            return refused(reason);
        OrtValue* output = nullptr;
        if (OrtStatus* status = get<ort::GetOutput>(api)(context, 0, x.sizes, x.rank, &output))
            return status;
        if (OrtStatus* status = get<ort::GetTensorMutableData>(api)(output, &params.y))
            return status;
        params.x = pointers[0];
        params.cut = static_cast<const float*>(pointers[1]);
        params.sign = static_cast<const float*>(pointers[2]);
        params.first = static_cast<const float*>(pointers[3]);
        params.second = static_cast<const float*>(pointers[4]);
        RuntimeThreads threads(api, context);
        cpu::run(params, threads);
        return threads.status;
    });
}

// --- registration ---

OrtStatus* infer_output_shape(const ort::CustomOp* op, OrtShapeInferContext* context) noexcept
{
    const OrtApi* api = self(op).api;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (OrtStatus* status = get<ort::GetInputTypeShape>(api)(context, 0, &info))
        return status;
    return get<ort::SetOutputTypeShape>(api)(context, 0, info);
}

Operator make_operator(const OrtApi* api, int32_t op, int32_t type) noexcept
{
    typedef const ort::CustomOp* Op;
    Operator made{};
    made.version = ort::kVersion;
    made.name = [](Op o) { return kNames[self(o).op]; };
    made.execution_provider = [](Op) { return "CPUExecutionProvider"; };
    made.input_type = [](Op o, size_t i) -> int32_t { return i == 0 ? kTypes[self(o).type] : ort::kFloat; };
    made.input_count = [](Op o) -> size_t { return self(o).op == 0 ? 3 : 5; };
    made.output_type = [](Op o, size_t) -> int32_t { return kTypes[self(o).type]; };
    made.output_count = [](Op) -> size_t { return 1; };
    made.destroy_kernel = destroy_kernel;
    made.input_characteristic = made.output_characteristic = [](Op, size_t) -> int32_t { return 0; };
    made.input_memory = [](Op, size_t) -> int32_t { return 0; };
    made.variadic_input_minimum = made.variadic_output_minimum = [](Op) { return 0; };
    made.variadic_input_homogeneous = made.variadic_output_homogeneous = [](Op) { return 0; };
    made.create_kernel_v2 = create_kernel;
    made.compute_v2 = compute;
    made.infer_output_shape = infer_output_shape;
    made.start_version = [](Op) { return 1; };
    made.end_version = [](Op) { return 1; };
    made.api = api;
    made.op = op;
    made.type = type;
    return made;
}

// The domain with its operators, one for each runtime in the process. Kept for good, as sessions read it until they end.
struct Registration
{
    const OrtApi* api;
    OrtCustomOpDomain* domain = nullptr;
    std::array<Operator, cpu::kOperators * cpu::kTypes> operators;

    explicit Registration(const OrtApi* of) : api(of)
    {
        for (size_t i = 0; i < operators.size(); ++i)
            operators[i] = make_operator(of, int32_t(i) / cpu::kTypes, int32_t(i) % cpu::kTypes);
    }

    OrtStatus* fill() noexcept
    {
        if (OrtStatus* status = get<ort::CreateCustomOpDomain>(api)("scconv", &domain))
            return status;
        for (const Operator& op : operators)
            if (OrtStatus* status = get<ort::CustomOpDomainAdd>(api)(domain, &op))
                return status;
        return nullptr;
    }
};

OrtStatus* registered(const OrtApi* api, OrtCustomOpDomain*& domain)
{
    static std::mutex mutex;
    static std::vector<std::unique_ptr<Registration>>& known = *new std::vector<std::unique_ptr<Registration>>;
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& registration : known)
        if (registration->api == api)
        {
            domain = registration->domain;
            return nullptr;
        }
    auto made = std::make_unique<Registration>(api);
    if (OrtStatus* status = made->fill())
        return status;
    domain = made->domain;
    known.push_back(std::move(made));
    return nullptr;
}

} // namespace

extern "C" SCCONV_SRU_CPU_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const ort::ApiBase* base) noexcept
{
    const OrtApi* api = base->get_api(ort::kVersion);
    if (!api)
    {
        char message[128];
        std::snprintf(message, sizeof(message), "The fused SRU needs ONNX Runtime 1.%u or later; this one is %s",
            ort::kVersion, base->version_string());
        return refuse(base->get_api(1), ort::kFail, message);
    }
    return guarded(api, [&]() -> OrtStatus* {
        OrtCustomOpDomain* domain = nullptr;
        if (OrtStatus* status = registered(api, domain))
            return status;
        return get<ort::AddCustomOpDomain>(api)(options, domain);
    });
}
