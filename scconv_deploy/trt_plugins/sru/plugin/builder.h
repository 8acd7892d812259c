// Which library asks, where TensorRT and TensorRT-RTX have to be answered differently.
#pragma once

#include <cstring>

#include <link.h>

namespace scconv {

// Whether TensorRT-RTX is in this process. Its builder does not time what a plugin offers: it takes the first format
// that it asks for and is not refused, LINEAR before all others (measured in 1.7.1). And it builds without a GPU, or for
// others than the one that is there. TensorRT times every format and tactic on the GPU that it builds for.
inline bool builder_is_rtx() noexcept
{
    const auto is_rtx = [](dl_phdr_info* info, size_t, void*) {
        const char* const slash = info->dlpi_name == nullptr ? nullptr : std::strrchr(info->dlpi_name, '/');
        return slash != nullptr && std::strncmp(slash, "/libtensorrt_rtx.so", 19) == 0 ? 1 : 0;
    };
    return dl_iterate_phdr(is_rtx, nullptr) != 0;
}

} // namespace scconv
