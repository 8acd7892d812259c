// A host without TensorRT: does to a plugin library what TensorRT does, so that its interface and its numbers are
// tested where TensorRT is not.
//
//   sru_harness check PLUGIN                  everything up to enqueue
//   sru_harness register REGISTER_LIBRARY     dlopen alone, with libnvinfer's stand-in (registry.cpp)
//   sru_harness run PLUGIN OP TYPE PARAMETER_TYPE FORMAT N C H W GROUPS DDOF EPS_VAR EPS_STD TACTIC plain|graph FOLDER
//                                             on a GPU: FOLDER/{x,cut,sign,first,second}.bin -> FOLDER/y.bin;
//                                             x and y lie in FORMAT, LINEAR, HWC or HWC8
//
// Exit status 0: all passed, 1: a check failed, 2: usage, 3: no GPU.

#include <dlfcn.h>

#include "host.h"

namespace {

using namespace harness;

bool type_of(const std::string& name, DataType& type)
{
    type = name == "float" ? DataType::kFLOAT : name == "half" ? DataType::kHALF : DataType::kBF16;
    return name == "float" || name == "half" || name == "bfloat16";
}

bool format_of(const std::string& name, TensorFormat& format)
{
    format = name == "HWC" ? TensorFormat::kHWC : name == "HWC8" ? TensorFormat::kHWC8 : TensorFormat::kLINEAR;
    return name == "LINEAR" || name == "HWC" || name == "HWC8";
}

int run(char** arguments, Report& report)
{
    Case one;
    one.op = arguments[3];
    if (!type_of(arguments[4], one.type) || !type_of(arguments[5], one.parameter_type)
        || !format_of(arguments[6], one.format))
        return 2;
    for (int i = 7; i < 11; ++i)
        one.shape.push_back(std::atoll(arguments[i]));
    one.num_groups = std::atoi(arguments[11]);
    one.ddof = std::atoi(arguments[12]);
    one.eps_var = std::strtof(arguments[13], nullptr);
    one.eps_std = std::strtof(arguments[14], nullptr);
    const bool captured = std::string(arguments[16]) == "graph";
    return run_case(arguments[2], one, std::atoi(arguments[15]), captured, arguments[17], report);
}

// The stand-in for libnvinfer is loaded first, as a host's own TensorRT would be; then nothing but dlopen.
int check_register(const char* path, Report& report)
{
    void* const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    report.check("dlopen", handle != nullptr);
    if (handle == nullptr)
    {
        std::printf("%s\n", dlerror());
        return EXIT_FAILURE;
    }
    using GetRegistry = IPluginRegistry* (*) ();
    const auto get_registry = reinterpret_cast<GetRegistry>(dlsym(handle, "getPluginRegistry"));
    report.check("it is linked to the library that has the registry", get_registry != nullptr);
    if (get_registry == nullptr)
        return EXIT_FAILURE;
    int32_t count = 0;
    get_registry()->getAllCreators(&count);
    report.check("three creators are registered", count == 3);
    for (const char* op : {"SRU", "SRUNorm", "SRUSoft"})
    {
        auto* const creator = static_cast<IPluginCreatorV3One*>(get_registry()->getCreator(op, "1", "scconv"));
        report.check(std::string(op) + " is registered", creator != nullptr);
        Case one;
        one.op = op;
        delete (creator ? create(*creator, one, TensorRTPhase::kRUNTIME) : nullptr);
    }
    return report.status();
}

} // namespace

int main(int count, char** arguments)
{
    Report report;
    const std::string command = count > 1 ? arguments[1] : "";
    if (command == "check" && count == 3)
    {
        check_library(arguments[2], report);
        return report.status();
    }
    if (command == "register" && count == 3)
        return check_register(arguments[2], report);
    if (command == "run" && count == 18)
        return run(arguments, report);
    std::fprintf(stderr, "usage: sru_harness check|register LIBRARY, or run with 16 arguments (see main.cpp)\n");
    return 2;
}
