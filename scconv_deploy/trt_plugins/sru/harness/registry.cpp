// libnvinfer's stand-in: a plugin registry, laid out as the headers that it is compiled with say, and nothing else.
//
// Compiled into libnvinfer.so.MAJOR for the harness. `override` is left out on purpose: which functions exist differs
// between TensorRT 10 and 11, and the headers decide where each of these goes.

#include <cstring>
#include <vector>

#include <NvInferRuntime.h>

namespace {

using namespace nvinfer1;

class Registry final : public IPluginRegistry
{
public:
    // TensorRT 10
    bool registerCreator(IPluginCreator&, char const* const) noexcept
    {
        return false;
    }
    IPluginCreator* const* getPluginCreatorList(int32_t* const count) const noexcept
    {
        *count = 0;
        return nullptr;
    }
    IPluginCreator* getPluginCreator(char const* const, char const* const, char const* const) noexcept
    {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreator const&) noexcept
    {
        return false;
    }
    // TensorRT 11
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const count) noexcept
    {
        return getAllCreators(count);
    }
    // both
    void setErrorRecorder(IErrorRecorder* const) noexcept {}
    IErrorRecorder* getErrorRecorder() const noexcept
    {
        return nullptr;
    }
    bool isParentSearchEnabled() const
    {
        return true;
    }
    void setParentSearchEnabled(bool const) {}
    PluginLibraryHandle loadLibrary(char const*) noexcept
    {
        return nullptr;
    }
    void deregisterLibrary(PluginLibraryHandle) noexcept {}
    bool registerCreator(IPluginCreatorInterface& creator, char const* const space) noexcept
    {
        auto& one = static_cast<IPluginCreatorV3One&>(creator);
        if (std::strcmp(space, one.getPluginNamespace()) != 0)
            return false;
        creators_.push_back(&creator);
        return true;
    }
    IPluginCreatorInterface* const* getAllCreators(int32_t* const count) const noexcept
    {
        *count = static_cast<int32_t>(creators_.size());
        return creators_.data();
    }
    IPluginCreatorInterface* getCreator(
        char const* const name, char const* const version, char const* const space) noexcept
    {
        for (IPluginCreatorInterface* each : creators_)
        {
            auto* const one = static_cast<IPluginCreatorV3One*>(each);
            if (std::strcmp(one->getPluginName(), name) == 0 && std::strcmp(one->getPluginVersion(), version) == 0
                && std::strcmp(one->getPluginNamespace(), space) == 0)
                return each;
        }
        return nullptr;
    }
    bool deregisterCreator(IPluginCreatorInterface const&) noexcept
    {
        return false;
    }
    IPluginResource* acquirePluginResource(char const*, IPluginResource*) noexcept
    {
        return nullptr;
    }
    int32_t releasePluginResource(char const*) noexcept
    {
        return 0;
    }

private:
    std::vector<IPluginCreatorInterface*> creators_;
};

} // namespace

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginRegistry* getPluginRegistry() noexcept
{
    static Registry registry;
    return &registry;
}
