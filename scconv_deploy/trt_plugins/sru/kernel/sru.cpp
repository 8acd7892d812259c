// The C interface: checks, the plan, dispatch by data type. Host code; the kernels are in sru_*.cu.
#include "sru.h"

#include <atomic>

#include "kernel_params.h"

namespace {

using namespace scconv;

static_assert(sizeof(ScconvSruParams) == 120, "trt_plugins/library.py mirrors the struct");

Problem problem_of(const ScconvSruParams& p)
{
    return {p.batch, p.channels, p.pixels, p.num_groups, p.type == SCCONV_FLOAT ? 4 : 2, static_cast<Layout>(p.layout),
        static_cast<Algorithm>(p.algorithm)};
}

const char* refusal_of(const ScconvSruParams& p)
{
    if (p.op < SCCONV_SRU || p.op > SCCONV_SRU_SOFT)
        return "the operator is unknown";
    if (p.type < SCCONV_FLOAT || p.type > SCCONV_BFLOAT16)
        return "the data type is none of float, half and bfloat16";
    if (p.layout < SCCONV_LINEAR || p.layout > SCCONV_CHANNELS_LAST)
        return "the layout is neither linear nor channels-last";
    if (p.algorithm < SCCONV_AUTO || p.algorithm > SCCONV_SPLIT)
        return "the algorithm is unknown";
    return refusal(problem_of(p), p.ddof);
}

// The current device's limits; asked of CUDA once for each of the first 64 devices, for that takes locks of the driver.
cudaError_t query(Limits& limits)
{
    static std::atomic<uint64_t> known[64]; // multiprocessors, shared bytes, clusters
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess)
        return status;
    uint64_t found = device < 64 ? known[device].load(std::memory_order_relaxed) : 0;
    if (found == 0)
    {
        int multiprocessors = 0, shared_bytes = 0, architecture = 0;
        status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
        if (status == cudaSuccess)
            status = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (status == cudaSuccess)
            status = compiled_architecture(architecture);
        if (status != cudaSuccess)
            return status;
        // the code's architecture, not the device's: code from older PTX knows no clusters
        found = static_cast<uint64_t>(multiprocessors) << 32 | static_cast<uint64_t>(shared_bytes) << 1
            | (architecture >= 90 ? 1 : 0);
        if (device < 64)
            known[device].store(found, std::memory_order_relaxed);
    }
    limits = {static_cast<int32_t>(found >> 32), static_cast<int32_t>((found & 0xffffffffu) >> 1), (found & 1) != 0};
    return cudaSuccess;
}

bool aligned_to_16(const void* a, const void* b)
{
    return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

KernelParams kernel_params(const ScconvSruParams& p, const Problem& problem, const Plan& plan)
{
    KernelParams k{};
    k.x = p.x;
    k.y = p.y;
    k.cut = p.cut;
    k.sign = p.sign;
    k.first = p.first;
    k.second = p.second;
    k.pieces = static_cast<Moments*>(p.workspace);
    k.groups = reinterpret_cast<Group*>(k.pieces + p.batch * p.num_groups * plan.pieces);
    k.batch = p.batch;
    k.num_groups = static_cast<uint32_t>(p.num_groups);
    k.half_groups = k.num_groups / 2;
    k.length = static_cast<uint32_t>(problem.group_elements());
    k.pixels = static_cast<uint32_t>(p.pixels);
    k.half_elements = static_cast<uint32_t>(problem.half_elements());
    k.half_channels = static_cast<uint32_t>(p.channels / 2);
    k.group_channels = static_cast<uint32_t>(problem.group_channels());
    k.pieces_per_group = plan.pieces;
    k.blocks_per_item = static_cast<uint32_t>(plan.blocks / p.batch);
    k.cluster = plan.cluster;
    k.pieces_per_block = plan.pieces_per_block;
    k.shared = plan.shared;
    k.tile = plan.tile;
    k.by_pixels = make_divisor(k.pixels);
    k.by_length = make_divisor(k.length);
    k.by_group_channels = make_divisor(k.group_channels);
    k.freedom = static_cast<float>(problem.group_elements() - p.ddof);
    k.eps_var = p.eps_var;
    k.eps_std = p.eps_std;
    k.parameters_are_aligned = aligned_to_16(p.cut, p.sign) && aligned_to_16(p.first, p.second);
    return k;
}

bool pointers_given(const ScconvSruParams& p)
{
    const bool affine = p.op == SCCONV_SRU || (p.first != nullptr && p.second != nullptr);
    return p.x != nullptr && p.y != nullptr && aligned_to_16(p.x, p.y) && p.cut != nullptr && p.sign != nullptr && affine;
}

cudaError_t run(const ScconvSruParams& p, const Problem& problem, const Plan& plan, cudaStream_t stream)
{
    const int64_t groups = p.batch * p.num_groups;
    if (plan.blocks > kMaxBlocks || groups > kMaxBlocks / plan.pieces)
        return cudaErrorInvalidConfiguration;
    if (plan.algorithm != Algorithm::kOnChip
        && (p.workspace == nullptr || !aligned_to_16(p.workspace, nullptr)
            || p.workspace_bytes < workspace_bytes(problem)))
        return cudaErrorInvalidValue;
    const KernelParams kernel = kernel_params(p, problem, plan);
    const Operator op = static_cast<Operator>(p.op);
    switch (p.type)
    {
    case SCCONV_FLOAT: return launch_float(op, kernel, plan, stream);
    case SCCONV_HALF: return launch_half(op, kernel, plan, stream);
    default: return launch_bfloat16(op, kernel, plan, stream);
    }
}

} // namespace

int32_t scconv_sru_abi_version(void)
{
    return SCCONV_SRU_ABI_VERSION;
}

const char* scconv_sru_refusal(const ScconvSruParams* params)
{
    return params == nullptr ? "no parameters are given" : refusal_of(*params);
}

uint64_t scconv_sru_workspace_bytes(const ScconvSruParams* params)
{
    return params == nullptr || refusal_of(*params) != nullptr ? 0 : workspace_bytes(problem_of(*params));
}

cudaError_t scconv_sru_choose(const ScconvSruParams* params, int32_t* algorithm)
{
    if (params == nullptr || algorithm == nullptr || refusal_of(*params) != nullptr)
        return cudaErrorInvalidValue;
    Limits limits{};
    const cudaError_t status = query(limits);
    if (status == cudaSuccess)
        *algorithm = static_cast<int32_t>(make_plan(problem_of(*params), limits).algorithm);
    return status;
}

cudaError_t scconv_sru_enqueue(const ScconvSruParams* params, cudaStream_t stream)
{
    if (params == nullptr || refusal_of(*params) != nullptr)
        return cudaErrorInvalidValue;
    if (params->batch == 0)
        return cudaSuccess;
    if (!pointers_given(*params))
        return cudaErrorInvalidValue;
    Limits limits{};
    const cudaError_t status = query(limits);
    if (status != cudaSuccess)
        return status;
    const Problem problem = problem_of(*params);
    const cudaError_t done = run(*params, problem, make_plan(problem, limits), stream);
    if (done != cudaErrorInvalidClusterSize)
        return done;
    Problem split = problem; // a device too small for the cluster
    split.wanted = Algorithm::kSplit;
    return run(*params, split, make_plan(split, limits), stream);
}
