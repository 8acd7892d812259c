// Holds ort_interface.h to ONNX Runtime's own header: places, signatures, values, layouts. Compiled, never run.
#include <onnxruntime_c_api.h>

#include <type_traits>

#include "ort_interface.h"

using namespace scconv::ort;

// A function of the table has this place, and a signature that ours calls; enumerations are int32 there.
template <typename Ours, typename Theirs>
struct Same;

template <typename A, typename B>
constexpr bool same_parameter = std::is_same_v<A, B> || (std::is_enum_v<B> && sizeof(B) == 4 && std::is_same_v<A, int32_t>)
    || (std::is_same_v<A, const CustomOp*> && std::is_same_v<B, const OrtCustomOp*>);

template <typename R, typename... A, typename S, typename... B>
struct Same<R (*)(A...), S (*)(B...)>
{
    static constexpr bool value = std::is_same_v<R, S> && (same_parameter<A, B> && ...);
};

template <typename R, typename... A, typename S, typename... B>
struct Same<R (*)(A...), S (*)(B...) noexcept> : Same<R (*)(A...), S (*)(B...)>
{
};

#define CHECK(ours, theirs)                                                                                            \
    static_assert(offsetof(OrtApi, theirs) == ours::kPlace * sizeof(void*), #theirs " has another place");             \
    static_assert(Same<ours::Function, std::remove_const_t<decltype(OrtApi::theirs)>>::value, #theirs " has another signature")

CHECK(CreateStatus, CreateStatus);
CHECK(CreateCustomOpDomain, CreateCustomOpDomain);
CHECK(CustomOpDomainAdd, CustomOpDomain_Add);
CHECK(AddCustomOpDomain, AddCustomOpDomain);
CHECK(GetTensorMutableData, GetTensorMutableData);
CHECK(GetDimensionsCount, GetDimensionsCount);
CHECK(GetDimensions, GetDimensions);
CHECK(GetTensorTypeAndShape, GetTensorTypeAndShape);
CHECK(GetAttributeFloat, KernelInfoGetAttribute_float);
CHECK(GetAttributeInt, KernelInfoGetAttribute_int64);
CHECK(GetInput, KernelContext_GetInput);
CHECK(GetOutput, KernelContext_GetOutput);
CHECK(ReleaseTensorTypeAndShapeInfo, ReleaseTensorTypeAndShapeInfo);
CHECK(GetInputTypeShape, ShapeInferContext_GetInputTypeShape);
CHECK(SetOutputTypeShape, ShapeInferContext_SetOutputTypeShape);
CHECK(ParallelFor, KernelContext_ParallelFor);

#define FIELD(ours, theirs) static_assert(offsetof(CustomOp, ours) == offsetof(OrtCustomOp, theirs), #theirs " lies elsewhere")

FIELD(version, version);
FIELD(create_kernel, CreateKernel);
FIELD(name, GetName);
FIELD(execution_provider, GetExecutionProviderType);
FIELD(input_type, GetInputType);
FIELD(input_count, GetInputTypeCount);
FIELD(output_type, GetOutputType);
FIELD(output_count, GetOutputTypeCount);
FIELD(compute, KernelCompute);
FIELD(destroy_kernel, KernelDestroy);
FIELD(input_characteristic, GetInputCharacteristic);
FIELD(output_characteristic, GetOutputCharacteristic);
FIELD(input_memory, GetInputMemoryType);
FIELD(variadic_input_minimum, GetVariadicInputMinArity);
FIELD(variadic_input_homogeneous, GetVariadicInputHomogeneity);
FIELD(variadic_output_minimum, GetVariadicOutputMinArity);
FIELD(variadic_output_homogeneous, GetVariadicOutputHomogeneity);
FIELD(create_kernel_v2, CreateKernelV2);
FIELD(compute_v2, KernelComputeV2);
FIELD(infer_output_shape, InferOutputShapeFn);
FIELD(start_version, GetStartVersion);
FIELD(end_version, GetEndVersion);

static_assert(offsetof(ApiBase, get_api) == offsetof(OrtApiBase, GetApi), "");
static_assert(offsetof(ApiBase, version_string) == offsetof(OrtApiBase, GetVersionString), "");
static_assert(int(kFail) == int(ORT_FAIL) && int(kInvalidArgument) == int(ORT_INVALID_ARGUMENT), "");
static_assert(int(kFloat) == int(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT), "");
static_assert(int(kFloat16) == int(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16), "");
static_assert(int(kBfloat16) == int(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16), "");
static_assert(int(INPUT_OUTPUT_REQUIRED) == 0 && int(OrtMemTypeDefault) == 0, "");
static_assert(sizeof(ONNXTensorElementDataType) == 4 && sizeof(OrtErrorCode) == 4, "");
static_assert(sizeof(OrtCustomOpInputOutputCharacteristic) == 4 && sizeof(OrtMemType) == 4, "");
static_assert(ORT_API_VERSION >= kVersion, "");
