// For hosts that only dlopen (Triton, DeepStream, LD_PRELOAD): registers the creators when it is loaded.
//
// Linked to libnvinfer of one major version, unlike the plugin: IPluginRegistry's table of functions differs between
// TensorRT 10 and 11, so the loader must refuse the other one. Build it with the headers of the TensorRT it will meet.

#include <cstdint>
#include <cstdio>

#include <NvInferRuntime.h>

extern "C" nvinfer1::IPluginCreatorInterface* const* scconv_sru_creators(int32_t& count);

namespace {

__attribute__((constructor)) void register_creators()
{
    nvinfer1::IPluginRegistry* const registry = getPluginRegistry();
    if (registry == nullptr)
    {
        std::fprintf(stderr, "scconv: TensorRT has no plugin registry, so the SRU plugins are not registered.\n");
        return;
    }
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* const creators = scconv_sru_creators(count);
    for (int32_t i = 0; i < count; ++i)
    {
        auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
        const char* const name = creator->getPluginName();
        // twice, if the host also loads the plugin itself: the first one stays
        if (registry->getCreator(name, creator->getPluginVersion(), creator->getPluginNamespace()) != nullptr)
            continue;
        if (!registry->registerCreator(*creator, creator->getPluginNamespace()))
            std::fprintf(stderr, "scconv: TensorRT did not register %s.\n", name);
    }
}

} // namespace
