#include "attributes.h"

#include <cmath>
#include <cstring>

#include "message.h"

namespace scconv {

namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr const char* kNumGroups = "num_groups";
constexpr const char* kDdof = "ddof";
constexpr const char* kEpsVar = "eps_var";
constexpr const char* kEpsStd = "eps_std";
// On every node, so that TensorRT's parser finds the plugin; they say nothing about the computation.
constexpr const char* kOfTheParser[] = {"plugin_namespace", "plugin_version"};

bool read(const PluginField& field, int32_t& value) noexcept
{
    if (field.type == PluginFieldType::kINT32)
    {
        std::memcpy(&value, field.data, sizeof(value));
        return true;
    }
    if (field.type == PluginFieldType::kINT64)
    {
        int64_t wide = 0;
        std::memcpy(&wide, field.data, sizeof(wide));
        value = static_cast<int32_t>(wide);
        return value == wide;
    }
    return false;
}

bool read(const PluginField& field, float& value) noexcept
{
    if (field.type == PluginFieldType::kFLOAT32)
    {
        std::memcpy(&value, field.data, sizeof(value));
        return true;
    }
    if (field.type == PluginFieldType::kFLOAT64)
    {
        double wide = 0.0;
        std::memcpy(&wide, field.data, sizeof(wide));
        value = static_cast<float>(wide);
        return true;
    }
    return false;
}

bool read_field(const char* op, const PluginField& field, Attributes& attributes) noexcept
{
    if (field.name == nullptr)
    {
        message(op, "a field has no name");
        return false;
    }
    const auto is = [&](const char* name) { return std::strcmp(field.name, name) == 0; };
    for (const char* name : kOfTheParser)
        if (is(name))
            return true;
    const bool known = is(kNumGroups) || is(kDdof) || is(kEpsVar) || is(kEpsStd);
    if (!known)
    {
        message(op, "field %s is unknown; expected num_groups, ddof, eps_var and eps_std", field.name);
        return false;
    }
    bool done = field.data != nullptr && field.length == 1;
    if (done)
        done = is(kNumGroups) ? read(field, attributes.num_groups)
            : is(kDdof)       ? read(field, attributes.ddof)
            : is(kEpsVar)     ? read(field, attributes.eps_var)
                              : read(field, attributes.eps_std);
    if (!done)
        message(op, "field %s has type %d and length %d, expected one %s", field.name, static_cast<int>(field.type),
            field.length, is(kNumGroups) || is(kDdof) ? "integer" : "float");
    return done;
}

} // namespace

FieldList::FieldList() noexcept
    : fields_{PluginField{kNumGroups, nullptr, PluginFieldType::kINT32, 1},
        PluginField{kDdof, nullptr, PluginFieldType::kINT32, 1},
        PluginField{kEpsVar, nullptr, PluginFieldType::kFLOAT32, 1},
        PluginField{kEpsStd, nullptr, PluginFieldType::kFLOAT32, 1}}
    , collection_{static_cast<int32_t>(fields_.size()), fields_.data()}
{
}

FieldList::FieldList(const Attributes& attributes) noexcept
    : FieldList()
{
    const void* const values[] = {&attributes.num_groups, &attributes.ddof, &attributes.eps_var, &attributes.eps_std};
    for (size_t i = 0; i < fields_.size(); ++i)
        fields_[i].data = values[i];
}

bool read_attributes(const char* op, const nvinfer1::PluginFieldCollection* fields, Attributes& attributes) noexcept
{
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i)
        if (!read_field(op, fields->fields[i], attributes))
            return false;
    if (attributes.num_groups < 1)
        message(op, "num_groups is %d, expected at least 1", attributes.num_groups);
    else if (attributes.ddof != 0 && attributes.ddof != 1)
        message(op, "ddof is %d, expected 0 (biased) or 1 (unbiased)", attributes.ddof);
    else if (!(attributes.eps_var >= 0.0f) || !(attributes.eps_std >= 0.0f) || std::isinf(attributes.eps_var)
        || std::isinf(attributes.eps_std))
        message(op, "eps_var is %g and eps_std %g, expected finite numbers from 0", attributes.eps_var,
            attributes.eps_std);
    else
        return true;
    return false;
}

} // namespace scconv
