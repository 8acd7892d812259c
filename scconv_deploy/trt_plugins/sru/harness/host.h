// What TensorRT is to a plugin: the interfaces that a host implements, and the tensors that it describes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

namespace harness {

using namespace nvinfer1;

// One line per check; a failed one ends up in the exit status.
class Report
{
public:
    void check(const std::string& what, bool passed)
    {
        std::printf("%s %s\n", passed ? "passed" : "FAILED", what.c_str());
        std::fflush(stdout);
        failures_ += passed ? 0 : 1;
    }
    int status() const
    {
        return failures_ == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
    }

private:
    int failures_ = 0;
};

// A size that shape inference passes around: a constant, or one that is known at run time only.
class Expression final : public IDimensionExpr, private apiv::VDimensionExpr
{
public:
    explicit Expression(int64_t value)
        : value_(value)
    {
        mImpl = this;
    }
    bool isConstant() const override
    {
        return value_ >= 0;
    }
    int64_t getConstantValue() const override
    {
        return value_;
    }
    bool isSizeTensor() const override
    {
        return false;
    }

private:
    int64_t value_;
};

// The SRU needs no arithmetic on sizes: what is asked for is an error.
class ExpressionBuilder final : public IExprBuilder, private apiv::VExprBuilder
{
public:
    ExpressionBuilder()
    {
        mImpl = this;
    }
    IDimensionExpr const* constant(int64_t) override
    {
        return nullptr;
    }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return nullptr;
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return nullptr;
    }
};

inline Dims dims(const std::vector<int64_t>& sizes)
{
    Dims found{};
    found.nbDims = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i)
        found.d[i] = sizes[i];
    return found;
}

inline PluginTensorDesc tensor(
    const std::vector<int64_t>& sizes, DataType type, TensorFormat format = TensorFormat::kLINEAR)
{
    return {dims(sizes), type, format, 1.0f};
}

// A tensor of the build phase whose sizes are the same in every profile.
inline DynamicPluginTensorDesc dynamic(const PluginTensorDesc& desc)
{
    return {desc, desc.dims, desc.dims, desc.dims};
}

// One use of the operator: sizes and types of everything.
struct Case
{
    std::string op;
    DataType type = DataType::kFLOAT;
    DataType parameter_type = DataType::kFLOAT;
    std::vector<int64_t> shape;
    int32_t num_groups = 16;
    int32_t ddof = 1;
    float eps_var = 0.0f;
    float eps_std = 1e-10f;
    TensorFormat format = TensorFormat::kLINEAR; // of x and y

    int32_t parameters() const
    {
        return op == "SRU" ? 2 : 4;
    }
    std::vector<PluginTensorDesc> descriptions() const
    {
        std::vector<PluginTensorDesc> found{tensor(shape, type, format)};
        for (int32_t i = 0; i < parameters(); ++i)
            found.push_back(tensor({shape[1]}, parameter_type));
        found.push_back(tensor(shape, type, format));
        return found;
    }
    std::vector<DynamicPluginTensorDesc> dynamic_descriptions() const
    {
        std::vector<DynamicPluginTensorDesc> found;
        for (const PluginTensorDesc& each : descriptions())
            found.push_back(dynamic(each));
        return found;
    }
};

// A plugin library, opened as IPluginRegistry::loadLibrary opens it.
class Library
{
public:
    Library(const char* path, Report& report);

    IPluginCreatorV3One* creator(const std::string& name) const;
    size_t size() const
    {
        return creators_.size();
    }

private:
    std::vector<IPluginCreatorV3One*> creators_;
};

IPluginV3* create(IPluginCreatorV3One& creator, const Case& one, TensorRTPhase phase);

// A plugin's capabilities, as the host asks for them.
struct Capabilities
{
    explicit Capabilities(IPluginV3& plugin);

    IPluginV3OneCore* core;
    IPluginV3OneBuild* build;
    IPluginV3OneRuntime* runtime;
};

void check_library(const char* path, Report& report);
int run_case(const char* path, const Case& one, int32_t tactic, bool captured, const std::string& folder, Report& report);

} // namespace harness
