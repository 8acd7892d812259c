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
struct Moments
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

// Moments from sums about a pivot that is the mean up to rounding; the correction count * rest^2 is then tiny.
SCCONV_HD Moments moments(float count, float pivot, CentredSums sums)
{
    const float rest = divide(sums.sum, count);
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
struct Group
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
    float threshold; // s * cut + sign * rest
    float factor;    // SRUNorm, SRUSoft: n * first + second == (x - mean) * factor + offset
    float offset;
};

template <Operator op>
SCCONV_HD Channel prepare_channel(const Group& group, float cut, float sign, float first, float second)
{
    Channel channel{sign, multiply_add(group.s, cut, multiply(sign, group.rest)), 0.0f, 0.0f};
    if (op != Operator::kSru)
    {
        channel.factor = multiply(first, group.inverse);
        channel.offset = multiply_add(-group.rest, channel.factor, second);
    }
    return channel;
}

// The open and the closed part of an element; Eq. 4 adds one's open to the other's closed part.
struct Parts
{
    float open;
    float closed;
};

// The comparison. False for NaN, as PyTorch's is: a group that holds one is closed.
SCCONV_HD bool is_open(float centred, const Channel& channel)
{
    return multiply(channel.sign, centred) >= channel.threshold;
}

// x1 and x2 of an element. round: to the data type, which SRUNorm's data goes through before it is masked.
template <Operator op, typename Round>
SCCONV_HD Parts split(float x, float mean, const Channel& channel, Round round)
{
    const float centred = subtract(x, mean);
    const bool open = is_open(centred, channel);
    if (op == Operator::kSruSoft)
    {
        const float r = sigmoid(multiply_add(centred, channel.factor, channel.offset));
        return {multiply(open ? 1.0f : r, x), multiply(open ? 0.0f : r, x)};
    }
    const float data = op == Operator::kSruNorm ? round(multiply_add(centred, channel.factor, channel.offset)) : x;
    return {multiply(open ? 1.0f : 0.0f, data), multiply(open ? 0.0f : 1.0f, data)};
}

// Eq. 4 for one element: its own open part and the closed part of the element half the channels away.
SCCONV_HD float reconstruct(Parts own, Parts other)
{
    return add(own.open, other.closed);
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
