#include "host.h"

#include <cstdlib>
#include <cstring>

#include <dlfcn.h>

namespace harness {

namespace {

// As TensorRT 10 lays it out: no version information. A plugin that calls it ends the process here.
class Finder : public ILoggerFinder
{
public:
    ILogger* findLogger() override
    {
        std::printf("FAILED the plugin calls the logger finder, whose layout differs between TensorRT 10 and 11\n");
        std::exit(EXIT_FAILURE);
    }
};

} // namespace

Library::Library(const char* path, Report& report)
{
    char* const absolute = realpath(path, nullptr); // a bare name would be looked for where libraries are installed
    void* const handle = dlopen(absolute == nullptr ? path : absolute, RTLD_LAZY | RTLD_LOCAL);
    std::free(absolute);
    report.check("dlopen", handle != nullptr);
    if (handle == nullptr)
    {
        std::printf("%s\n", dlerror());
        std::exit(EXIT_FAILURE);
    }
    using SetLoggerFinder = void (*)(ILoggerFinder*);
    using GetCreators = IPluginCreatorInterface* const* (*) (int32_t&);
    const auto set_finder = reinterpret_cast<SetLoggerFinder>(dlsym(handle, "setLoggerFinder"));
    const auto get_creators = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
    report.check("setLoggerFinder and getCreators are exported", set_finder != nullptr && get_creators != nullptr);
    if (set_finder == nullptr || get_creators == nullptr)
        std::exit(EXIT_FAILURE);
    static Finder finder;
    set_finder(&finder);
    int32_t count = 0;
    IPluginCreatorInterface* const* const found = get_creators(count);
    for (int32_t i = 0; i < count; ++i)
    {
        const InterfaceInfo info = found[i]->getInterfaceInfo();
        report.check("creator is of the kind PLUGIN CREATOR_V3ONE 1.0",
            std::strcmp(info.kind, "PLUGIN CREATOR_V3ONE") == 0 && info.major == 1 && info.minor == 0);
        creators_.push_back(static_cast<IPluginCreatorV3One*>(found[i]));
    }
}

IPluginCreatorV3One* Library::creator(const std::string& name) const
{
    for (IPluginCreatorV3One* each : creators_)
        if (each->getPluginName() == name && std::string(each->getPluginVersion()) == "1"
            && std::string(each->getPluginNamespace()) == "scconv")
            return each;
    return nullptr;
}

IPluginV3* create(IPluginCreatorV3One& creator, const Case& one, TensorRTPhase phase)
{
    const PluginField fields[] = {{"eps_std", &one.eps_std, PluginFieldType::kFLOAT32, 1},
        {"num_groups", &one.num_groups, PluginFieldType::kINT32, 1}, {"ddof", &one.ddof, PluginFieldType::kINT32, 1},
        {"eps_var", &one.eps_var, PluginFieldType::kFLOAT32, 1},
        {"plugin_namespace", "scconv", PluginFieldType::kCHAR, 6}, {"plugin_version", "1", PluginFieldType::kCHAR, 1}};
    const PluginFieldCollection collection{6, fields};
    return creator.createPlugin(one.op.c_str(), &collection, phase);
}

Capabilities::Capabilities(IPluginV3& plugin)
    : core(static_cast<IPluginV3OneCore*>(plugin.getCapabilityInterface(PluginCapabilityType::kCORE)))
    , build(static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD)))
    , runtime(static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME)))
{
}

} // namespace harness
