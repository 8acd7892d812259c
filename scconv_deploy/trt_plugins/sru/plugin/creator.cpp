// Creators and the entry points that TensorRT looks for in a plugin library.

#include <new>

#include "plugin.h"

#define SCCONV_EXPORT __attribute__((visibility("default")))

namespace scconv {

class SruCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit SruCreator(const OperatorTraits& traits) noexcept
        : traits_(traits)
    {
    }

    // The same object in both phases: what is serialised are the attributes alone.
    nvinfer1::IPluginV3* createPlugin(
        const char*, const nvinfer1::PluginFieldCollection* fields, nvinfer1::TensorRTPhase) noexcept override
    {
        Attributes attributes;
        if (!read_attributes(traits_.name, fields, attributes))
            return nullptr;
        return new (std::nothrow) SruPlugin(traits_, attributes);
    }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override
    {
        return fields_.collection();
    }
    const char* getPluginName() const noexcept override
    {
        return traits_.name;
    }
    const char* getPluginVersion() const noexcept override
    {
        return kVersion;
    }
    const char* getPluginNamespace() const noexcept override
    {
        return kNamespace;
    }

private:
    const OperatorTraits& traits_;
    const FieldList fields_;
};

namespace {

nvinfer1::IPluginCreatorInterface* const* creators(int32_t& count) noexcept
{
    static SruCreator each[] = {SruCreator(kOperators[0]), SruCreator(kOperators[1]), SruCreator(kOperators[2])};
    static nvinfer1::IPluginCreatorInterface* const all[] = {&each[0], &each[1], &each[2]};
    count = 3;
    return all;
}

} // namespace
} // namespace scconv

extern "C" {

// What IPluginRegistry::loadLibrary calls.
SCCONV_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    return scconv::creators(count);
}

// Offered by TensorRT, and left alone: see message.h.
SCCONV_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

// The same creators under a name of their own: other plugin libraries export a getCreators too, and the loader would
// bind whichever comes first.
SCCONV_EXPORT nvinfer1::IPluginCreatorInterface* const* scconv_sru_creators(int32_t& count)
{
    return scconv::creators(count);
}

} // extern "C"
