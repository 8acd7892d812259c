// The attributes of a node: read from fields by name, with defaults, and written back by name.
#pragma once

#include <array>
#include <cstdint>

#include <NvInferRuntime.h>

namespace scconv {

// The defaults are those of the original code (groupbn-hard); an exported node writes every one.
struct Attributes
{
    int32_t num_groups = 16;
    int32_t ddof = 1;
    float eps_var = 0.0f;
    float eps_std = 1e-10f;
};

// What a creator announces, and what a plugin serialises: the same names in the same order.
class FieldList
{
public:
    // Names and types without values.
    FieldList() noexcept;
    // With the values of attributes that outlive the list.
    explicit FieldList(const Attributes& attributes) noexcept;

    const nvinfer1::PluginFieldCollection* collection() const noexcept
    {
        return &collection_;
    }
    FieldList(const FieldList&) = delete;
    FieldList& operator=(const FieldList&) = delete;

private:
    std::array<nvinfer1::PluginField, 4> fields_;
    nvinfer1::PluginFieldCollection collection_;
};

// Attributes from fields; what is not given keeps its default. False, and a line on stderr, for a field of an unknown
// name, of a wrong type or length, or with a value that has no meaning.
bool read_attributes(const char* op, const nvinfer1::PluginFieldCollection* fields, Attributes& attributes) noexcept;

} // namespace scconv
