// Why something is refused: one line on stderr.
//
// TensorRT's own logger is reached through ILoggerFinder, whose layout differs between TensorRT 10 and 11: a plugin
// built with the headers of one crashes in the other as soon as it logs. stderr is safe in both.
#pragma once

#include <cstdio>

namespace scconv {

template <typename... Values>
void message(const char* op, const char* format, Values... values) noexcept
{
    char text[512];
    if constexpr (sizeof...(Values) == 0)
        std::snprintf(text, sizeof(text), "%s", format);
    else
        std::snprintf(text, sizeof(text), format, values...);
    std::fprintf(stderr, "scconv::%s: %s.\n", op, text);
}

} // namespace scconv
