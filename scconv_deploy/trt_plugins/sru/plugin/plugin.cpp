#include "plugin.h"

#include <cstdio>
#include <new>

#include "builder.h"
#include "message.h"

namespace scconv {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

namespace {

// Of the sources and the compiler, r<SHA-256>_cuda<version>, from whoever builds (plugin build, CMake). Without one,
// TensorRT is told to keep no timings: it would use those of other kernels.
#define SCCONV_QUOTED(token) #token
#define SCCONV_STRING(macro) SCCONV_QUOTED(macro)
#ifdef SCCONV_SRU_REVISION
constexpr const char* kRevision = SCCONV_STRING(SCCONV_SRU_REVISION);
#else
constexpr const char* kRevision = "";
#endif

constexpr int32_t kRefused = -1;

bool kernel_type(DataType type, int32_t& found) noexcept
{
    switch (type)
    {
    case DataType::kFLOAT: found = SCCONV_FLOAT; return true;
    case DataType::kHALF: found = SCCONV_HALF; return true;
    case DataType::kBF16: found = SCCONV_BFLOAT16; return true;
    default: return false;
    }
}

bool kernel_layout(TensorFormat format, int32_t& found) noexcept
{
    found = format == TensorFormat::kLINEAR ? SCCONV_LINEAR : SCCONV_CHANNELS_LAST;
    return format == TensorFormat::kLINEAR || format == TensorFormat::kHWC || format == TensorFormat::kHWC8;
}

} // namespace

SruPlugin::SruPlugin(const OperatorTraits& traits, const Attributes& attributes) noexcept
    : traits_(traits)
    , attributes_(attributes)
    , fields_(attributes_)
{
    // what time depends on; TensorRT adds shapes, types and the device
    std::snprintf(timing_cache_id_, sizeof(timing_cache_id_), "scconv-%s-%s-%s-groups%d", traits_.name, kVersion,
        kRevision, attributes_.num_groups);
}

nvinfer1::IPluginCapability* SruPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* SruPlugin::clone() noexcept
{
    auto* copy = new (std::nothrow) SruPlugin(traits_, attributes_);
    if (copy != nullptr)
    {
        copy->tactic_ = tactic_;
        copy->both_tactics_ = both_tactics_;
    }
    return copy;
}

const char* SruPlugin::getPluginName() const noexcept
{
    return traits_.name;
}

const char* SruPlugin::getPluginVersion() const noexcept
{
    return kVersion;
}

const char* SruPlugin::getPluginNamespace() const noexcept
{
    return kNamespace;
}

// --- what is refused ---

bool SruPlugin::check_counts(int32_t inputs, int32_t outputs) const noexcept
{
    if (inputs == 1 + traits_.parameters && outputs == 1)
        return true;
    message(traits_.name, "%d inputs and %d outputs, expected %d and 1", inputs, outputs, 1 + traits_.parameters);
    return false;
}

// dynamic: sizes of -1 are not known yet and pass.
bool SruPlugin::check_shapes(
    const Dims& x, const PluginTensorDesc& desc, const PluginTensorDesc* parameters, bool dynamic) const noexcept
{
    if (x.nbDims != 4)
    {
        message(traits_.name, "the input has %d dimensions, expected [N, C, H, W]", x.nbDims);
        return false;
    }
    for (int32_t i = 0; i < traits_.parameters; ++i)
    {
        const Dims& dims = parameters[i].dims;
        const bool unknown = dynamic && (x.d[1] < 0 || dims.d[0] < 0);
        if (dims.nbDims != 1 || (!unknown && dims.d[0] != x.d[1]))
        {
            message(traits_.name, "parameter %d has %d dimensions and %lld elements, expected 1 and the %lld channels",
                i + 1, dims.nbDims, static_cast<long long>(dims.nbDims > 0 ? dims.d[0] : 0),
                static_cast<long long>(x.d[1]));
            return false;
        }
    }
    for (int32_t i = 0; dynamic && i < 4; ++i)
        if (x.d[i] < 0)
            return true;
    ScconvSruParams params{};
    if (!fill(x, desc, params))
        return false;
    const char* reason = scconv_sru_refusal(&params);
    if (reason == nullptr)
        return true;
    message(traits_.name, "%s (input [%lld, %lld, %lld, %lld], num_groups %d)", reason, static_cast<long long>(x.d[0]),
        static_cast<long long>(x.d[1]), static_cast<long long>(x.d[2]), static_cast<long long>(x.d[3]),
        attributes_.num_groups);
    return false;
}

bool SruPlugin::fill(const Dims& x, const PluginTensorDesc& desc, ScconvSruParams& params) const noexcept
{
    if (!kernel_type(desc.type, params.type))
    {
        message(traits_.name, "data type %d is none of float, half and bfloat16", static_cast<int>(desc.type));
        return false;
    }
    if (!kernel_layout(desc.format, params.layout))
    {
        message(traits_.name, "format %d is none of LINEAR, HWC and HWC8", static_cast<int>(desc.format));
        return false;
    }
    if (x.d[2] > 0 && x.d[3] > INT64_MAX / x.d[2])
    {
        message(traits_.name, "H * W is not a 64-bit number");
        return false;
    }
    params.batch = x.d[0];
    params.channels = x.d[1];
    params.pixels = x.d[2] * x.d[3];
    params.num_groups = attributes_.num_groups;
    params.ddof = attributes_.ddof;
    params.eps_var = attributes_.eps_var;
    params.eps_std = attributes_.eps_std;
    params.op = traits_.op;
    params.algorithm = tactic_;
    return true;
}

// --- build ---

int32_t SruPlugin::configurePlugin(
    const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc* out, int32_t outputs) noexcept
{
    if (!check_counts(inputs, outputs))
        return kRefused;
    PluginTensorDesc parameters[4];
    for (int32_t i = 0; i < traits_.parameters; ++i)
    {
        parameters[i] = in[1 + i].desc;
        if (parameters[i].type != DataType::kFLOAT)
        {
            message(traits_.name, "parameter %d is of type %d, expected float32: in 16 bits gates change", 1 + i,
                static_cast<int>(parameters[i].type));
            return kRefused;
        }
    }
    if (in[0].desc.format != out[0].desc.format)
    {
        message(traits_.name, "the input has format %d, the output %d, expected the same",
            static_cast<int>(in[0].desc.format), static_cast<int>(out[0].desc.format));
        return kRefused;
    }
    for (const Dims* dims : {&in[0].desc.dims, &in[0].min, &in[0].opt, &in[0].max})
        if (!check_shapes(*dims, in[0].desc, parameters, true))
            return kRefused;

    ScconvSruParams params{};
    if (!fill(in[0].opt, in[0].desc, params))
        return kRefused;
    return is_rtx(__builtin_return_address(0)) || configure_for_device(params) ? 0 : kRefused;
}

// TensorRT times and runs the kernels on the GPU that it builds for: what cannot run there is refused now, with its
// remedy, and not when it is enqueued. Without a GPU nothing is known of it, and nothing is refused.
bool SruPlugin::configure_for_device(ScconvSruParams& params) noexcept
{
    int32_t chosen = SCCONV_AUTO;
    params.algorithm = SCCONV_ON_CHIP;
    const cudaError_t status = scconv_sru_choose(&params, &chosen);
    both_tactics_ = status == cudaSuccess && chosen == SCCONV_ON_CHIP;
    if (status != cudaSuccess)
        cudaGetLastError(); // the launches' check must not find it
    if (status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction
        && status != cudaErrorUnsupportedPtxVersion)
        return true;
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    message(traits_.name,
        "this library has no code that GPU %d, of compute capability %d.%d, can run (%s): build it again with "
        "scconv-deploy plugin build --arch %d%d",
        device, major, minor, cudaGetErrorString(status), major, minor);
    return false;
}

int32_t SruPlugin::getOutputDataTypes(
    DataType* outputTypes, int32_t outputs, const DataType* inputTypes, int32_t inputs) const noexcept
{
    if (!check_counts(inputs, outputs))
        return kRefused;
    int32_t unused = 0;
    if (!kernel_type(inputTypes[0], unused))
    {
        message(traits_.name, "input type %d is none of float, half and bfloat16", static_cast<int>(inputTypes[0]));
        return kRefused;
    }
    outputTypes[0] = inputTypes[0];
    return 0;
}

int32_t SruPlugin::getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t, DimsExprs* out,
    int32_t outputs, nvinfer1::IExprBuilder&) noexcept
{
    if (!check_counts(inputs, outputs))
        return kRefused;
    if (in[0].nbDims != 4)
    {
        message(traits_.name, "the input has %d dimensions, expected [N, C, H, W]", in[0].nbDims);
        return kRefused;
    }
    for (int32_t i = 1; i < inputs; ++i)
        if (in[i].nbDims != 1)
        {
            message(traits_.name, "parameter %d has %d dimensions, expected [C]", i, in[i].nbDims);
            return kRefused;
        }
    out[0] = in[0];
    return 0;
}

// Whether the kernels take a number of channels channels-last, whatever the batch and the pixels, which may be unknown.
bool SruPlugin::takes_channels_last(const PluginTensorDesc& x) const noexcept
{
    if (x.dims.nbDims != 4 || x.dims.d[1] < 0)
        return false;
    ScconvSruParams params{};
    const PluginTensorDesc desc{{}, x.type, TensorFormat::kHWC, 1.0f};
    return fill({4, {1, x.dims.d[1], 2, 1}}, desc, params) && scconv_sru_refusal(&params) == nullptr;
}

// Channels-last is what convolutions have on both sides of an SRU. TensorRT-RTX would take LINEAR before HWC, and HWC8
// before it too, and transpose at every SRU, so it is offered HWC alone; of bfloat16 it never asks for HWC.
bool SruPlugin::supports_format(const PluginTensorDesc& x, bool rtx) const noexcept
{
    const bool channels_last = takes_channels_last(x);
    const bool hwc_alone = channels_last && x.type != DataType::kBF16 && rtx;
    switch (x.format)
    {
    case TensorFormat::kLINEAR: return !hwc_alone;
    case TensorFormat::kHWC: return channels_last;
    case TensorFormat::kHWC8: // the same memory where 8 divides the channels
        return channels_last && !hwc_alone && x.type != DataType::kFLOAT && x.dims.d[1] % 8 == 0;
    default: return false;
    }
}

bool SruPlugin::supportsFormatCombination(
    int32_t position, const DynamicPluginTensorDesc* inOut, int32_t inputs, int32_t outputs) noexcept
{
    if (inputs != 1 + traits_.parameters || outputs != 1 || position < 0 || position > inputs)
        return false;
    const PluginTensorDesc& asked = inOut[position].desc;
    const PluginTensorDesc& x = inOut[0].desc;
    int32_t unused = 0;
    if (position == 0)
        return kernel_type(x.type, unused) && supports_format(x, is_rtx(__builtin_return_address(0)));
    if (position == inputs)
        return asked.type == x.type && asked.format == x.format;
    // in 16 bits a cut is another cut, and gates change
    return asked.type == DataType::kFLOAT && asked.format == TensorFormat::kLINEAR;
}

int32_t SruPlugin::getNbOutputs() const noexcept
{
    return 1;
}

size_t SruPlugin::getWorkspaceSize(
    const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*, int32_t) const noexcept
{
    ScconvSruParams params{};
    if (inputs < 1 || in[0].max.nbDims != 4 || !fill(in[0].max, in[0].desc, params))
        return 0;
    return scconv_sru_workspace_bytes(&params);
}

int32_t SruPlugin::getNbTactics() noexcept
{
    return both_tactics_ ? 2 : 0;
}

int32_t SruPlugin::getValidTactics(int32_t* tactics, int32_t count) noexcept
{
    const int32_t all[] = {SCCONV_ON_CHIP, SCCONV_SPLIT};
    if (count > getNbTactics())
        return kRefused;
    for (int32_t i = 0; i < count; ++i)
        tactics[i] = all[i];
    return 0;
}

const char* SruPlugin::getTimingCacheID() noexcept
{
    return kRevision[0] == '\0' ? nullptr : timing_cache_id_;
}

// --- runtime ---

int32_t SruPlugin::setTactic(int32_t tactic) noexcept
{
    if (tactic < SCCONV_AUTO || tactic > SCCONV_SPLIT)
    {
        message(traits_.name, "tactic %d is unknown", tactic);
        return kRefused;
    }
    tactic_ = tactic; // a tactic that a shape does not allow is replaced at launch; the workspace suffices for all
    return 0;
}

int32_t SruPlugin::onShapeChange(
    const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc*, int32_t outputs) noexcept
{
    return check_counts(inputs, outputs) && check_shapes(in[0].dims, in[0], in + 1, false) ? 0 : kRefused;
}

int32_t SruPlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
    void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    ScconvSruParams params{};
    if (!fill(in[0].dims, in[0], params))
        return kRefused;
    params.x = inputs[0];
    params.y = outputs[0];
    params.cut = static_cast<const float*>(inputs[1]);
    params.sign = static_cast<const float*>(inputs[2]);
    params.first = traits_.parameters > 2 ? static_cast<const float*>(inputs[3]) : nullptr;
    params.second = traits_.parameters > 2 ? static_cast<const float*>(inputs[4]) : nullptr;
    params.workspace = workspace;
    params.workspace_bytes = workspace == nullptr ? 0 : scconv_sru_workspace_bytes(&params);
    const cudaError_t status = scconv_sru_enqueue(&params, stream);
    if (status == cudaSuccess)
        return 0;
    message(traits_.name, "enqueue: %s", cudaGetErrorString(status));
    return kRefused;
}

nvinfer1::IPluginV3* SruPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept
{
    return clone(); // no resource is shared, and a context must not see another's tactic
}

const nvinfer1::PluginFieldCollection* SruPlugin::getFieldsToSerialize() noexcept
{
    return fields_.collection();
}

} // namespace scconv
