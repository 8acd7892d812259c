// The SRU's arithmetic, for host and device: statistics of a group, the exact cut, the cross reconstruction.
//
// Symbols: x is [N, C, H, W]; G groups of L elements lie over the flattened C*H*W of a sample.
//
//   mean_g = mean0 + rest            mean0 rounded, rest = mean(x - mean0): what rounding took from it
//   s_g    = sqrt(SS_g / (L - ddof) + eps_var) + eps_std       SS_g = sum((x - mean_g)^2)
//   open  <=>  sign_c * (x - mean_g) >= s_g * cut_c
//   y     = concat(lower.open + upper.closed, upper.open + lower.closed)       over the halves of the channels
//
// Why the mean is kept in two parts: where |mean| >> s, x - mean0 is exact, but mean0 alone is off by up to an ulp of
// the mean, which may be many ulps of x - mean. The comparison is then sign * (x - mean0) >= s * cut + sign * rest.
//
// What is cheaper and equal to the bit, NaN and Inf included (tests/trt_plugins/test_math.py):
//   sign * (x - mean0) == fma(x, sign, -(sign * mean0))     sign is -1, 0 or 1, so that the product is exact; but where
//                                                           finite x - mean0 overflows and sign is 0
//   1 - open is the closed mask, and open * a + closed * b == fma(open, a, closed * b), the first product being exact
//
// Why masks multiply: PyTorch writes mask * x, so that a closed gate on Inf is NaN and on -3 is -0. Multiplying costs
// what selecting does, and the output of SRU is PyTorch's to the bit wherever the gates are.
//
// Everything that rounds is a named function, so that neither compiler contracts or reorders it: the CPU build of this
// file computes what the GPU computes.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SCCONV_HD __host__ __device__ __forceinline__
#else
#define SCCONV_HD inline
#endif

namespace scconv {

enum class Operator : int32_t { kSru = 0, kSruNorm = 1, kSruSoft = 2 };

// --- arithmetic that is the same on both sides ---

SCCONV_HD float add(float a, float b)
{
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b; // compiled with -ffp-contract=off
#endif
}

SCCONV_HD float subtract(float a, float b)
{
#ifdef __CUDA_ARCH__
    return __fsub_rn(a, b);
#else
    return a - b;
#endif
}

SCCONV_HD float multiply(float a, float b)
{
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

SCCONV_HD float multiply_add(float a, float b, float c)
{
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
}

SCCONV_HD float divide(float a, float b)
{
#ifdef __CUDA_ARCH__
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

SCCONV_HD float square_root(float a)
{
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(a);
#else
    return std::sqrt(a);
#endif
}

// a >= b as 1 or 0; 0 for NaN. One instruction on a GPU, which a comparison and a selection would not be.
SCCONV_HD float at_least(float a, float b)
{
#ifdef __CUDA_ARCH__
    float found;
    asm("set.ge.f32.f32 %0, %1, %2;" : "=f"(found) : "f"(a), "f"(b));
    return found;
#else
    return a >= b ? 1.0f : 0.0f;
#endif
}

// 1 / (1 + exp(-z)); a few ulp from torch.sigmoid. It weights data and decides no gate.
SCCONV_HD float sigmoid(float z)
{
#ifdef __CUDA_ARCH__
    return __fdividef(1.0f, 1.0f + expf(-z));
#else
    return 1.0f / (1.0f + std::exp(-z));
#endif
}

// --- statistics ---

// Moments of some elements: their mean is mean + rest, squares the sum of squares about it.
struct alignas(16) Moments
{
    float count;
    float mean;
    float rest;
    float squares;
};

// Sums of the elements less a pivot: what the second pass over a group (or a piece of it) gathers.
struct CentredSums
{
    float sum;
    float squares;
};

SCCONV_HD void accumulate(CentredSums& sums, float x, float pivot)
{
    const float centred = subtract(x, pivot);
    sums.sum = add(sums.sum, centred);
    sums.squares = multiply_add(centred, centred, sums.squares);
}

SCCONV_HD CentredSums operator+(CentredSums a, CentredSums b)
{
    return {add(a.sum, b.sum), add(a.squares, b.squares)};
}

// Moments from sums about a pivot that is the mean up to rounding, and rest = sums.sum / count; the correction
// count * rest^2 is then tiny.
SCCONV_HD Moments moments(float count, float pivot, CentredSums sums, float rest)
{
    const float squares = multiply_add(-sums.sum, rest, sums.squares);
    // not fmaxf, which would turn a NaN into 0
    return {count, pivot, rest, squares < 0.0f ? 0.0f : squares};
}

// How a piece's mean lies from the pivot of the whole, times its count: the first sum of a merge (Chan et al. 1979).
SCCONV_HD float weighted_shift(Moments piece, float pivot)
{
    return multiply(piece.count, add(subtract(piece.mean, pivot), piece.rest));
}

// A piece's squares about pivot + rest: the second sum of a merge.
SCCONV_HD float shifted_squares(Moments piece, float pivot, float rest)
{
    const float shift = subtract(add(subtract(piece.mean, pivot), piece.rest), rest);
    return multiply_add(multiply(piece.count, shift), shift, piece.squares);
}

// What the gate needs of its group.
struct alignas(16) Group
{
    float mean;
    float rest;
    float s;
    float inverse; // 1 / s
};

SCCONV_HD Group group_statistics(Moments m, float freedom, float eps_var, float eps_std)
{
    const float s = add(square_root(add(divide(m.squares, freedom), eps_var)), eps_std);
    return {m.mean, m.rest, s, divide(1.0f, s)};
}

// --- the gate ---

// What the gate needs of its channel, the group's statistics folded in.
struct Channel
{
    float sign;
    float shift;     // -(sign * mean)
    float threshold; // s * cut + sign * rest
    float mean;      // SRUNorm, SRUSoft: of the group
    float factor;    // SRUNorm, SRUSoft: n * first + second == (x - mean) * factor + offset
    float offset;
};

template <Operator op>
SCCONV_HD Channel prepare_channel(const Group& group, float cut, float sign, float first, float second)
{
    Channel channel{sign, -multiply(sign, group.mean), multiply_add(group.s, cut, multiply(sign, group.rest)),
        group.mean, 0.0f, 0.0f};
    if (op != Operator::kSru)
    {
        channel.factor = multiply(first, group.inverse);
        channel.offset = multiply_add(-group.rest, channel.factor, second);
    }
    return channel;
}

// The comparison, as 1 or 0. 0 for NaN, as PyTorch's is: a group that holds one is closed.
SCCONV_HD float opened(float x, const Channel& channel)
{
    return at_least(multiply_add(x, channel.sign, channel.shift), channel.threshold);
}

// An element with the weights of its open and its closed part.
struct Gated
{
    float open;
    float closed;
    float data;
};

// round: to the data type, which SRUNorm's data goes through before it is masked.
template <Operator op, typename Round>
SCCONV_HD Gated gated(float x, const Channel& channel, Round round)
{
    const float open = opened(x, channel);
    if (op == Operator::kSru)
        return {open, subtract(1.0f, open), x};
    const float affine = multiply_add(subtract(x, channel.mean), channel.factor, channel.offset);
    if (op == Operator::kSruNorm)
        return {open, subtract(1.0f, open), round(affine)};
    const float r = sigmoid(affine);
    return {open != 0.0f ? 1.0f : r, open != 0.0f ? 0.0f : r, x};
}

// Eq. 4 for one element: its own open part and the closed part of the element half the channels away.
template <Operator op>
SCCONV_HD float reconstruct(const Gated& own, const Gated& other)
{
    const float closed = multiply(other.closed, other.data);
    if (op == Operator::kSruSoft) // a weight between 0 and 1: PyTorch rounds both products
        return add(multiply(own.open, own.data), closed);
    return multiply_add(own.open, own.data, closed);
}

// --- division by a number known at launch ---

// n / d for 0 <= n < 2^31 by one multiplication (Granlund and Montgomery 1994).
struct Divisor
{
    uint32_t divisor;
    uint32_t multiplier;
    uint32_t shift; // of the high word; divisor 1 has none

    SCCONV_HD uint32_t quotient(uint32_t n) const
    {
#ifdef __CUDA_ARCH__
        const uint32_t high = __umulhi(n, multiplier);
#else
        const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> 32);
#endif
        return divisor == 1 ? n : high >> shift;
    }
};

inline Divisor make_divisor(uint32_t d)
{
    uint32_t bits = 0;
    while ((uint64_t{1} << bits) < d)
        ++bits;
    if (d <= 1)
        return {1, 0, 0};
    const uint64_t power = uint64_t{1} << (31 + bits);
    return {d, static_cast<uint32_t>((power + d - 1) / d), bits - 1};
}

} // namespace scconv
