// The TensorRT plugin: a thin shell that checks what it is given and calls the kernels' C interface.
//
// One source for TensorRT 10.3 to 11.x. It uses what these versions share, byte for byte: IPluginV3 and its three
// capabilities in version 1.0, PluginField, PluginTensorDesc. No symbol of libnvinfer is needed.
#pragma once

#include <array>
#include <cstdint>

#include <NvInferRuntime.h>

#include "../kernel/sru.h"
#include "attributes.h"

namespace scconv {

inline constexpr const char* kNamespace = "scconv";
inline constexpr const char* kVersion = "1";

// An operator of the domain scconv as TensorRT sees it.
struct OperatorTraits
{
    const char* name;
    ScconvOperator op;
    int32_t parameters; // inputs after x
};
inline constexpr OperatorTraits kOperators[] = {
    {"SRU", SCCONV_SRU, 2},           // cut, sign
    {"SRUNorm", SCCONV_SRU_NORM, 4},  // cut, sign, gamma, beta
    {"SRUSoft", SCCONV_SRU_SOFT, 4},  // cut, sign, scale, shift
};

class SruPlugin final : public nvinfer1::IPluginV3,
                        public nvinfer1::IPluginV3OneCore,
                        public nvinfer1::IPluginV3OneBuild,
                        public nvinfer1::IPluginV3OneRuntime
{
public:
    SruPlugin(const OperatorTraits& traits, const Attributes& attributes) noexcept;

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // core
    const char* getPluginName() const noexcept override;
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override;

    // build
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t outputs, const nvinfer1::DataType* inputTypes,
        int32_t inputs) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t inputs, const nvinfer1::DimsExprs* shapeInputs,
        int32_t shapeInputCount, nvinfer1::DimsExprs* out, int32_t outputs,
        nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* inOut, int32_t inputs,
        int32_t outputs) noexcept override;
    int32_t getNbOutputs() const noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) const noexcept override;
    int32_t getNbTactics() noexcept override;
    int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override;
    const char* getTimingCacheID() noexcept override;

    // runtime
    int32_t setTactic(int32_t tactic) noexcept override;
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc* out,
        int32_t outputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
        const void* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    bool check_counts(int32_t inputs, int32_t outputs) const noexcept;
    bool check_shapes(const nvinfer1::Dims& x, const nvinfer1::PluginTensorDesc& desc,
        const nvinfer1::PluginTensorDesc* parameters, bool dynamic) const noexcept;
    bool fill(const nvinfer1::Dims& x, const nvinfer1::PluginTensorDesc& desc, ScconvSruParams& params) const noexcept;
    bool takes_channels_last(const nvinfer1::PluginTensorDesc& x) const noexcept;
    bool supports_format(const nvinfer1::PluginTensorDesc& x, bool rtx) const noexcept;
    bool configure_for_device(ScconvSruParams& params) noexcept;

    const OperatorTraits& traits_;
    const Attributes attributes_;
    const FieldList fields_;
    int32_t tactic_ = SCCONV_AUTO;
    bool both_tactics_ = false; // on chip and split differ for the shapes that were configured
    char timing_cache_id_[128];
};

} // namespace scconv
