// Everything that a host does before it enqueues; needs no GPU.

#include <cmath>
#include <cstring>
#include <memory>

#include "host.h"

namespace harness {

namespace {

const char* const kNames[] = {"SRU", "SRUNorm", "SRUSoft"};
const DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
const char* const kTypeNames[] = {"float", "half", "bfloat16"};
// in the order in which TensorRT-RTX's builder asks
const TensorFormat kFormats[] = {TensorFormat::kLINEAR, TensorFormat::kCHW2, TensorFormat::kHWC8, TensorFormat::kCHW32,
    TensorFormat::kCHW4, TensorFormat::kDHWC8, TensorFormat::kCDHW32, TensorFormat::kHWC16, TensorFormat::kHWC};

using Plugin = std::unique_ptr<IPluginV3>;

// Like the parser and a user's code: fields of other kinds, missing ones, and ones that mean nothing.
void check_fields(IPluginCreatorV3One& creator, Report& report)
{
    const std::string name = creator.getPluginName();
    const PluginFieldCollection* announced = creator.getFieldNames();
    const char* const expected[] = {"num_groups", "ddof", "eps_var", "eps_std"};
    bool same = announced != nullptr && announced->nbFields == 4;
    for (int32_t i = 0; same && i < 4; ++i)
        same = std::strcmp(announced->fields[i].name, expected[i]) == 0;
    report.check(name + " announces its fields", same);

    const auto created = [&](std::initializer_list<PluginField> fields) {
        const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.begin()};
        return Plugin(creator.createPlugin("test", &collection, TensorRTPhase::kBUILD));
    };
    const int32_t groups = 4, zero = 0, two = 2;
    const int64_t wide = 4;
    const float negative = -1.0f, nan = std::nanf("");
    report.check(name + " has defaults", created({}) != nullptr);
    report.check(name + " takes no fields", Plugin(creator.createPlugin("x", nullptr, TensorRTPhase::kBUILD)) != nullptr);
    report.check(name + " takes int32", created({{"num_groups", &groups, PluginFieldType::kINT32, 1}}) != nullptr);
    report.check(name + " takes int64", created({{"num_groups", &wide, PluginFieldType::kINT64, 1}}) != nullptr);
    report.check(name + " refuses num_groups 0", !created({{"num_groups", &zero, PluginFieldType::kINT32, 1}}));
    report.check(name + " refuses ddof 2", !created({{"ddof", &two, PluginFieldType::kINT32, 1}}));
    report.check(name + " refuses eps -1", !created({{"eps_var", &negative, PluginFieldType::kFLOAT32, 1}}));
    report.check(name + " refuses eps nan", !created({{"eps_std", &nan, PluginFieldType::kFLOAT32, 1}}));
    report.check(name + " refuses a float for an int", !created({{"ddof", &negative, PluginFieldType::kFLOAT32, 1}}));
    report.check(name + " refuses two values", !created({{"ddof", &groups, PluginFieldType::kINT32, 2}}));
    report.check(name + " refuses no data", !created({{"ddof", nullptr, PluginFieldType::kINT32, 1}}));
    report.check(name + " refuses a name it does not know",
        !created({{"groups", &groups, PluginFieldType::kINT32, 1}}));
}

void check_formats(IPluginV3OneBuild& build, const Case& one, const std::string& name, Report& report)
{
    auto tensors = one.dynamic_descriptions();
    const int32_t inputs = 1 + one.parameters(), last = inputs;
    const auto supported = [&](int32_t position) {
        return build.supportsFormatCombination(position, tensors.data(), inputs, 1);
    };
    bool all = true;
    for (int32_t i = 0; i <= last; ++i)
        all = all && supported(i);
    report.check(name + " supports itself", all);

    const auto refused = [&](int32_t position, DataType type, TensorFormat format) {
        auto kept = tensors[position];
        tensors[position].desc.type = type;
        tensors[position].desc.format = format;
        const bool answer = !supported(position);
        tensors[position] = kept;
        return answer;
    };
    const DataType other = one.type == DataType::kHALF ? DataType::kBF16 : DataType::kHALF;
    report.check(name + " refuses int8", refused(0, DataType::kINT8, one.format));
    report.check(name + " refuses another output type", refused(last, other, one.format));
    for (const TensorFormat format : {TensorFormat::kLINEAR, TensorFormat::kHWC, TensorFormat::kHWC8})
        if (format != one.format)
            report.check(name + " refuses another format at the output", refused(last, one.type, format));
    for (const TensorFormat format : {TensorFormat::kCHW2, TensorFormat::kCHW4, TensorFormat::kCHW32})
        report.check(name + " refuses channels in vectors, apart", refused(0, one.type, format));
    for (int32_t i = 1; i < last; ++i)
    {
        const std::string which = name + " refuses parameter " + std::to_string(i);
        report.check(which + " in half", refused(i, DataType::kHALF, TensorFormat::kLINEAR));
        report.check(which + " in bfloat16", refused(i, DataType::kBF16, TensorFormat::kLINEAR));
        report.check(which + " in HWC", refused(i, DataType::kFLOAT, TensorFormat::kHWC));
    }
}

std::string name_of(TensorFormat format)
{
    return format == TensorFormat::kLINEAR ? "LINEAR"
        : format == TensorFormat::kHWC     ? "HWC"
        : format == TensorFormat::kHWC8    ? "HWC8"
                                           : "another";
}

// Formats of x, asked for before anything else is chosen: the tensors beyond it have no type and no format yet.
std::string offered(IPluginCreatorV3One& creator, Case one)
{
    const Plugin plugin(create(creator, one, TensorRTPhase::kBUILD));
    std::string found;
    for (const TensorFormat format : kFormats)
    {
        one.format = format;
        auto tensors = one.dynamic_descriptions();
        for (size_t i = 1; i < tensors.size(); ++i)
        {
            tensors[i].desc.type = static_cast<DataType>(-1);
            tensors[i].desc.format = static_cast<TensorFormat>(-1);
        }
        if (Capabilities(*plugin).build->supportsFormatCombination(0, tensors.data(), 1 + one.parameters(), 1))
            found += (found.empty() ? "" : " ") + name_of(format);
    }
    return found;
}

void check_offered(IPluginCreatorV3One& creator, Report& report)
{
    struct Offer
    {
        int64_t channels;
        int32_t num_groups;
        const char* float_formats;
        const char* half_formats;
    };
    for (const Offer& offer : {Offer{32, 4, "LINEAR HWC", "LINEAR HWC8 HWC"}, Offer{12, 3, "LINEAR HWC", "LINEAR HWC"},
             Offer{24, 16, "LINEAR", "LINEAR"}, Offer{9, 3, "LINEAR", "LINEAR"}, Offer{-1, 4, "LINEAR", "LINEAR"}})
        for (int t = 0; t < 3; ++t)
        {
            const std::string op = creator.getPluginName();
            const Case one{op, kTypes[t], DataType::kFLOAT, {-1, offer.channels, -1, -1}, offer.num_groups};
            const std::string found = offered(creator, one);
            const std::string what = std::to_string(offer.channels) + " channels in " + std::to_string(offer.num_groups)
                + " groups, " + kTypeNames[t] + ": " + found;
            report.check(op + " offers for " + what, found == (t == 0 ? offer.float_formats : offer.half_formats));
        }
}

void check_shapes(IPluginV3OneBuild& build, const Case& one, const std::string& name, Report& report)
{
    const int32_t inputs = 1 + one.parameters();
    Expression unknown(-1), channels(one.shape[1]);
    std::vector<DimsExprs> in(inputs);
    in[0].nbDims = 4;
    for (int32_t i = 0; i < 4; ++i)
        in[0].d[i] = i == 1 ? &channels : &unknown;
    for (int32_t i = 1; i < inputs; ++i)
    {
        in[i].nbDims = 1;
        in[i].d[0] = &channels;
    }
    ExpressionBuilder builder;
    DimsExprs out{};
    bool same = build.getOutputShapes(in.data(), inputs, nullptr, 0, &out, 1, builder) == 0 && out.nbDims == 4;
    for (int32_t i = 0; same && i < 4; ++i)
        same = out.d[i] == in[0].d[i];
    report.check(name + " has its input's shape", same);
    report.check(name + " refuses a missing input",
        build.getOutputShapes(in.data(), inputs - 1, nullptr, 0, &out, 1, builder) != 0);
    in[0].nbDims = 3;
    report.check(
        name + " refuses [C, H, W]", build.getOutputShapes(in.data(), inputs, nullptr, 0, &out, 1, builder) != 0);

    std::vector<DataType> types(inputs, one.parameter_type);
    types[0] = one.type;
    DataType result = DataType::kINT32;
    report.check(name + " has its input's type",
        build.getOutputDataTypes(&result, 1, types.data(), inputs) == 0 && result == one.type);
    types[0] = DataType::kINT32;
    report.check(name + " refuses int32", build.getOutputDataTypes(&result, 1, types.data(), inputs) != 0);
}

void check_configuration(IPluginV3OneBuild& build, const Case& one, const std::string& name, Report& report)
{
    const int32_t inputs = 1 + one.parameters();
    const auto configured = [&](const Case& changed) {
        const auto tensors = changed.dynamic_descriptions();
        return build.configurePlugin(tensors.data(), inputs, tensors.data() + inputs, 1) == 0;
    };
    Case changed = one;
    changed.shape[1] += 1;
    report.check(name + " refuses an odd number of channels", !configured(changed));
    auto tensors = one.dynamic_descriptions();
    tensors[1] = dynamic(tensor({one.shape[1] + 2}, one.parameter_type));
    report.check(name + " refuses a parameter of another length",
        build.configurePlugin(tensors.data(), inputs, tensors.data() + inputs, 1) != 0);
    tensors = one.dynamic_descriptions();
    tensors[inputs - 1].desc.type = DataType::kHALF;
    report.check(name + " is not configured with a parameter in half",
        build.configurePlugin(tensors.data(), inputs, tensors.data() + inputs, 1) != 0);

    tensors = one.dynamic_descriptions();
    tensors[inputs].desc.format = one.format == TensorFormat::kLINEAR ? TensorFormat::kHWC : TensorFormat::kLINEAR;
    report.check(name + " is not configured with an output in another format",
        build.configurePlugin(tensors.data(), inputs, tensors.data() + inputs, 1) != 0);

    tensors = one.dynamic_descriptions(); // dynamic batch, height and width
    for (int32_t i : {0, 2, 3})
    {
        for (const size_t t : {size_t{0}, tensors.size() - 1})
        {
            tensors[t].desc.dims.d[i] = -1;
            tensors[t].max.d[i] *= 4;
            tensors[t].opt.d[i] *= 2;
        }
    }
    report.check(name + " takes a dynamic batch, height and width",
        build.configurePlugin(tensors.data(), inputs, tensors.data() + inputs, 1) == 0);
    const size_t largest = build.getWorkspaceSize(tensors.data(), inputs, tensors.data() + inputs, 1);
    report.check(name + " is configured", configured(one));
    const auto fixed = one.dynamic_descriptions();
    const size_t needed = build.getWorkspaceSize(fixed.data(), inputs, fixed.data() + inputs, 1);
    report.check(name + " asks for more workspace for larger sizes", 0 < needed && needed < largest);

    const int32_t count = build.getNbTactics();
    std::vector<int32_t> tactics(count);
    bool valid = build.getValidTactics(tactics.data(), count) == 0;
    for (int32_t i = 0; i < count; ++i)
        valid = valid && tactics[i] > 0 && (i == 0 || tactics[i] != tactics[i - 1]);
    report.check(name + " has " + std::to_string(count) + " tactics, positive and unique", valid);
    const char* const id = build.getTimingCacheID();
    report.check(name + " has the timing cache id " + (id == nullptr ? "null" : id),
        id != nullptr && std::strstr(id, one.op.c_str()) != nullptr);
}

// Serialise by name, create again at run time, attach to a context: what an engine does.
void check_life(IPluginCreatorV3One& creator, IPluginV3& plugin, const Case& one, const std::string& name, Report& report)
{
    Capabilities first(plugin);
    const PluginFieldCollection* fields = first.runtime->getFieldsToSerialize();
    bool complete = fields != nullptr && fields->nbFields == 4;
    for (int32_t i = 0; complete && i < 4; ++i)
    {
        const PluginField& field = fields->fields[i];
        const std::string key = field.name;
        int32_t integer = 0;
        float real = 0.0f;
        std::memcpy(key == "num_groups" || key == "ddof" ? static_cast<void*>(&integer) : &real, field.data, 4);
        complete = key == "num_groups" ? integer == one.num_groups
            : key == "ddof"            ? integer == one.ddof
            : key == "eps_var"         ? real == one.eps_var
                                       : key == "eps_std" && real == one.eps_std;
    }
    report.check(name + " serialises every field with its value", complete);

    const Plugin again(creator.createPlugin(one.op.c_str(), fields, TensorRTPhase::kRUNTIME));
    report.check(name + " is created again from what it serialised", again != nullptr);
    if (again == nullptr)
        return;
    Capabilities second(*again);
    const Plugin attached(second.runtime->attachToContext(nullptr));
    const Plugin copied(plugin.clone());
    report.check(name + " is attached and cloned", attached != nullptr && copied != nullptr);
    if (attached == nullptr || copied == nullptr)
        return;
    Capabilities third(*attached);
    report.check(name + " keeps its name, version and namespace",
        std::string(third.core->getPluginName()) == one.op && std::string(third.core->getPluginVersion()) == "1"
            && std::string(third.core->getPluginNamespace()) == "scconv");
    const auto tensors = one.descriptions();
    const int32_t inputs = 1 + one.parameters();
    report.check(name + " takes its shapes",
        third.runtime->onShapeChange(tensors.data(), inputs, tensors.data() + inputs, 1) == 0);
    auto changed = tensors;
    changed[0].dims.d[1] += 2;
    report.check(name + " refuses other channels at run time",
        third.runtime->onShapeChange(changed.data(), inputs, changed.data() + inputs, 1) != 0);
    auto empty = tensors;
    empty[0].dims.d[0] = empty.back().dims.d[0] = 0;
    report.check(name + " takes an empty batch",
        third.runtime->onShapeChange(empty.data(), inputs, empty.data() + inputs, 1) == 0);
    report.check(name + " takes its tactics",
        third.runtime->setTactic(0) == 0 && third.runtime->setTactic(1) == 0 && third.runtime->setTactic(2) == 0
            && third.runtime->setTactic(9) != 0);
    const PluginFieldCollection* repeated = third.runtime->getFieldsToSerialize();
    report.check(name + " serialises the same again",
        repeated != nullptr && std::memcmp(repeated->fields[0].data, fields->fields[0].data, 4) == 0);
}

struct Layout
{
    const char* name;
    std::vector<int64_t> shape;
    TensorFormat format;
};
const Layout kLayouts[] = {{"", {2, 32, 7, 7}, TensorFormat::kLINEAR}, {" straddling", {1, 24, 4, 4}, TensorFormat::kLINEAR},
    {" HWC", {2, 32, 7, 7}, TensorFormat::kHWC}, {" HWC8", {2, 32, 7, 7}, TensorFormat::kHWC8}};

void check_case(IPluginCreatorV3One& creator, const Case& one, const std::string& name, Report& report)
{
    const Plugin plugin(create(creator, one, TensorRTPhase::kBUILD));
    report.check(name + " is created", plugin != nullptr);
    if (plugin == nullptr)
        return;
    Capabilities capabilities(*plugin);
    const bool all = capabilities.core && capabilities.build && capabilities.runtime;
    report.check(name + " has its three capabilities", all);
    if (!all)
        return;
    check_formats(*capabilities.build, one, name, report);
    check_shapes(*capabilities.build, one, name, report);
    check_configuration(*capabilities.build, one, name, report);
    check_life(creator, *plugin, one, name, report);
}

} // namespace

void check_library(const char* path, Report& report)
{
    const Library library(path, report);
    report.check("there are three creators", library.size() == 3);
    for (const char* op : kNames)
    {
        IPluginCreatorV3One* const creator = library.creator(op);
        report.check(std::string(op) + " is found under scconv, version 1", creator != nullptr);
        if (creator == nullptr)
            continue;
        check_fields(*creator, report);
        check_offered(*creator, report);
        for (int t = 0; t < 3; ++t)
            for (const Layout& layout : kLayouts)
            {
                if (layout.format == TensorFormat::kHWC8 && kTypes[t] == DataType::kFLOAT)
                    continue;
                const Case one{op, kTypes[t], DataType::kFLOAT, layout.shape, 16, 0, 1e-5f, 0.0f, layout.format};
                check_case(*creator, one, std::string(op) + " " + kTypeNames[t] + layout.name, report);
            }
    }
}

} // namespace harness
