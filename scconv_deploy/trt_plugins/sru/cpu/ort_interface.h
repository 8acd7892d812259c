// What a library of operators needs of ONNX Runtime's C interface. No header of ONNX Runtime's, and nothing to link.
//
// The interface is a table of functions, to which releases only append: a function keeps its place, and its signature,
// for good. GetApi(version) gives the table that has all functions of that version, or null in an older runtime. So one
// binary runs in every release from kVersion on. Places, signatures and values are facts of that interface; the tests run
// the library in the real runtime, and hold this file to the real header where it is found
// (tests/trt_plugins/cpu/ort_header.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtApi;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus; // null is success
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

namespace scconv::ort {

constexpr uint32_t kVersion = 17; // of ONNX Runtime 1.17, the first with kParallelFor

// What the entry point is given: the table of tables.
struct ApiBase
{
    const OrtApi* (*get_api)(uint32_t version);
    const char* (*version_string)();
};

enum ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int32_t { kFloat = 1, kFloat16 = 10, kBfloat16 = 16 };

// A function's place in the table, with its signature.
template <int place, typename Signature>
struct Entry
{
    static constexpr int kPlace = place;
    typedef Signature* Function;
};

typedef Entry<0, OrtStatus*(int32_t code, const char* message)> CreateStatus;
typedef Entry<26, OrtStatus*(const char* name, OrtCustomOpDomain** domain)> CreateCustomOpDomain;
struct CustomOp;
typedef Entry<27, OrtStatus*(OrtCustomOpDomain* domain, const CustomOp* op)> CustomOpDomainAdd;
typedef Entry<28, OrtStatus*(OrtSessionOptions* options, OrtCustomOpDomain* domain)> AddCustomOpDomain;
typedef Entry<51, OrtStatus*(OrtValue* value, void** data)> GetTensorMutableData;
typedef Entry<61, OrtStatus*(const OrtTensorTypeAndShapeInfo* info, size_t* count)> GetDimensionsCount;
typedef Entry<62, OrtStatus*(const OrtTensorTypeAndShapeInfo* info, int64_t* sizes, size_t count)> GetDimensions;
typedef Entry<65, OrtStatus*(const OrtValue* value, OrtTensorTypeAndShapeInfo** info)> GetTensorTypeAndShape;
typedef Entry<85, OrtStatus*(const OrtKernelInfo* info, const char* name, float* value)> GetAttributeFloat;
typedef Entry<86, OrtStatus*(const OrtKernelInfo* info, const char* name, int64_t* value)> GetAttributeInt;
typedef Entry<90, OrtStatus*(const OrtKernelContext* context, size_t index, const OrtValue** value)> GetInput;
typedef Entry<91, OrtStatus*(OrtKernelContext* context, size_t index, const int64_t* sizes, size_t count, OrtValue** value)>
    GetOutput;
typedef Entry<99, void(OrtTensorTypeAndShapeInfo* info)> ReleaseTensorTypeAndShapeInfo;
typedef Entry<268, OrtStatus*(const OrtShapeInferContext* context, size_t index, OrtTensorTypeAndShapeInfo** info)>
    GetInputTypeShape; // the info is the context's
typedef Entry<270, OrtStatus*(const OrtShapeInferContext* context, size_t index, const OrtTensorTypeAndShapeInfo* info)>
    SetOutputTypeShape;
typedef Entry<274, OrtStatus*(const OrtKernelContext* context, void (*task)(void*, size_t), size_t count, size_t batches,
                       void* data)>
    ParallelFor; // batches 0: as the runtime likes

// The function of an entry.
template <typename Function>
typename Function::Function get(const OrtApi* api)
{
    return reinterpret_cast<typename Function::Function>(reinterpret_cast<void* const*>(api)[Function::kPlace]);
}

// An operator, as the runtime reads it: OrtCustomOp of kVersion. A newer runtime reads no further, by `version`.
struct CustomOp
{
    uint32_t version;
    void* (*create_kernel)(const CustomOp*, const OrtApi*, const OrtKernelInfo*); // null: create_kernel_v2 is used
    const char* (*name)(const CustomOp*);
    const char* (*execution_provider)(const CustomOp*);
    int32_t (*input_type)(const CustomOp*, size_t);
    size_t (*input_count)(const CustomOp*);
    int32_t (*output_type)(const CustomOp*, size_t);
    size_t (*output_count)(const CustomOp*);
    void (*compute)(void* kernel, OrtKernelContext*); // null: compute_v2 is used
    void (*destroy_kernel)(void* kernel);
    int32_t (*input_characteristic)(const CustomOp*, size_t);  // 0: required
    int32_t (*output_characteristic)(const CustomOp*, size_t);
    int32_t (*input_memory)(const CustomOp*, size_t); // 0: where the provider computes
    int (*variadic_input_minimum)(const CustomOp*);
    int (*variadic_input_homogeneous)(const CustomOp*);
    int (*variadic_output_minimum)(const CustomOp*);
    int (*variadic_output_homogeneous)(const CustomOp*);
    OrtStatus* (*create_kernel_v2)(const CustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*compute_v2)(void* kernel, OrtKernelContext*);
    OrtStatus* (*infer_output_shape)(const CustomOp*, OrtShapeInferContext*);
    int (*start_version)(const CustomOp*);
    int (*end_version)(const CustomOp*);
};

} // namespace scconv::ort
