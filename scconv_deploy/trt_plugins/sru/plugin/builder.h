// Which library asks, where TensorRT and TensorRT-RTX have to be answered differently.
#pragma once

#include <cstring>

#include <dlfcn.h>

namespace scconv {

// Whether TensorRT-RTX asks, told by the address that a function returns to: both may be in one process. RTX's builder does not
// time what a plugin offers: it takes the first format that it asks for and is not refused, LINEAR before all others (measured
// in 1.7.1). And it builds without a GPU, or for others than the one that is there. TensorRT times every format and tactic on
// the GPU that it builds for.
inline bool is_rtx(const void* caller) noexcept
{
    Dl_info found{};
    return dladdr(caller, &found) != 0 && found.dli_fname != nullptr
        && std::strstr(found.dli_fname, "libtensorrt_rtx.so") != nullptr;
}

} // namespace scconv
