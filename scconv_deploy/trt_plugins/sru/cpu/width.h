// The loops over elements for one vector width. Include after defining SCCONV_LANES (4, 8 or 16).
//
// Every width computes the same bytes: sums have 32 lanes whatever the width, and nothing is contracted to fused
// multiply-adds (-ffp-contract=off), which the narrowest width lacks. Written they are only where the product is exact.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace scconv::cpu {
namespace {

#include "vectors.h"

constexpr int kVectors = kLanes / W;
constexpr int64_t kGates = 64;     // channels whose gates lie on the stack
constexpr uintptr_t kAhead = 4096; // bytes from what is measured to what is fetched into the nearest cache

// Bring bytes that lie `ahead` of an address into the nearest cache; beyond a tensor's end too, for that does not fault.
SCCONV_INLINE void fetch(const void* from, uintptr_t ahead, size_t bytes)
{
    for (size_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + ahead + line));
}

// --- statistics ---

// Partial sums of a block's elements less a pivot, and of their squares, in kLanes lanes.
struct LaneSums
{
    Floats sum[kVectors];
    Floats squares[kVectors];

    SCCONV_INLINE void add(LaneSums& sums, int v, Floats centred)
    {
        sums.sum[v] += centred;
        sums.squares[v] += centred * centred;
    }
};

// The lanes added in halves down to four, in float, and those in double: the same order for every width.
SCCONV_INLINE double total(const Floats lanes[kVectors])
{
    Floats sums[kVectors]; // copied one by one: GCC writes an array that is copied whole to memory, at each change of it
    for (int v = 0; v < kVectors; ++v)
        sums[v] = lanes[v];
    for (int count = kVectors / 2; count > 0; count /= 2)
        for (int v = 0; v < count; ++v)
            sums[v] += sums[v + count];
    typedef float Four __attribute__((vector_size(16)));
    struct Fours
    {
        Four of[W / 4];
    } fours = as<Fours>(sums[0]);
    for (int count = W / 8; count > 0; count /= 2)
        for (int i = 0; i < count; ++i)
            fours.of[i] += fours.of[i + count];
    const Four four = fours.of[0];
    return (double(four[0]) + double(four[2])) + (double(four[1]) + double(four[3]));
}

// Numbers of the lanes of a row's vector.
SCCONV_INLINE Ints lane_numbers(int v)
{
    Ints numbers;
    for (int i = 0; i < W; ++i)
        numbers[i] = v * W + i;
    return numbers;
}

// f(vector's number in the row, its elements as floats, which of them count) for a row that is not whole: the last
// count % kLanes elements.
template <typename Type, typename Function>
SCCONV_INLINE void for_rest(const typename Type::Element* x, int64_t count, Function&& f)
{
    const int rest = static_cast<int>(count % kLanes);
    typename Type::Element row[kLanes] = {};
    if (count < kLanes)
        __builtin_memcpy(row + kLanes - rest, x, rest * sizeof(row[0]));
    const typename Type::Element* const from = count < kLanes ? row : x + count - kLanes;
    for (int v = 0; v < kVectors; ++v)
        f(v, Type::load(from + v * W), lane_numbers(v) >= kLanes - rest);
}

// About where a block's mean lies: that of four of its rows.
template <typename Type>
SCCONV_INLINE float guessed_mean(const typename Type::Element* x, int64_t count)
{
    Floats sums[kVectors] = {};
    const int64_t rows = count / kLanes;
    if (rows == 0)
    {
        for_rest<Type>(x, count, [&](int v, Floats value, Ints counts) __attribute__((always_inline)) {
            sums[v] = select(counts, value, Floats{});
        });
        return static_cast<float>(total(sums) / double(count));
    }
    for (int64_t i = 0; i < 4; ++i)
        for (int v = 0; v < kVectors; ++v)
            sums[v] += Type::load(x + i * rows / 4 * kLanes + v * W);
    return static_cast<float>(total(sums) * (1.0 / (4 * kLanes)));
}

template <typename Type>
SCCONV_INLINE LaneSums centred_sums(const typename Type::Element* x, int64_t count, float pivot)
{
    LaneSums sums = {};
    for (int64_t i = 0; i + kLanes <= count; i += kLanes)
    {
        fetch(x + i, kAhead, kLanes * sizeof(x[0]));
        for (int v = 0; v < kVectors; ++v)
            // x - pivot by the unit that multiplies: the one that adds has more to do
            LaneSums::add(sums, v, exact_product_plus(Type::load(x + i + v * W), all(1.0f), all(-pivot)));
    }
    if (count % kLanes)
        for_rest<Type>(x, count, [&](int v, Floats value, Ints counts) __attribute__((always_inline)) {
            LaneSums::add(sums, v, select(counts, value - pivot, Floats{}));
        });
    return sums;
}

// Moments of blocks of kBlock elements, the last one shorter, from sums about a guess of the block's mean. Where that
// lies more than a deviation from the mean, the sums are taken again about the mean: so the squares never cancel.
template <typename Type>
static void measure(const void* data, int64_t count, Moments* blocks)
{
    const typename Type::Element* x = static_cast<const typename Type::Element*>(data);
    for (; count > 0; x += kBlock, count -= kBlock, ++blocks)
    {
        const int64_t size = count < kBlock ? count : kBlock;
        float pivot = guessed_mean<Type>(x, size);
        for (bool again = false;; again = true)
        {
            const LaneSums sums = centred_sums<Type>(x, size, pivot);
            const double sum = total(sums.sum), rest = sum / double(size), squares = total(sums.squares);
            const double about = squares - sum * rest;
            *blocks = {pivot + rest, about < 0.0 ? 0.0 : about}; // a NaN stays
            if (again || !(sum * rest > about))
                break;
            pivot = static_cast<float>(pivot + rest);
        }
    }
}

// --- the gate and the cross reconstruction ---

// Gates of some channels: sign * (x - mean) >= threshold, and sign * mean. SRUNorm, SRUSoft: n * first + second ==
// (x - mean) * factor + offset. The group's part of a value is in double, and rounded once.
struct Gates
{
    float threshold[kGates], shift[kGates], factor[kGates], offset[kGates];
};

template <int op>
SCCONV_INLINE void prepare(Gates& gates, const Group group, const Parameters& parameters, int64_t first, int64_t count)
{
    const float *const cut = parameters.cut + first, *const sign = parameters.sign + first;
    for (int64_t i = 0; i < count; ++i)
    {
        gates.threshold[i] = static_cast<float>(group.s * cut[i] + sign[i] * group.rest);
        gates.shift[i] = -(sign[i] * group.mean);
    }
    if (op == 0)
        return;
    const float *const scale = parameters.first + first, *const offset = parameters.second + first;
    for (int64_t i = 0; i < count; ++i)
    {
        const double factor = scale[i] / group.s;
        gates.factor[i] = static_cast<float>(factor);
        gates.offset[i] = static_cast<float>(offset[i] - group.rest * factor);
    }
}

// A channel's gate, each value in every lane.
struct WideGate
{
    Floats sign, shift, threshold, mean, factor, offset;
};

template <int op>
SCCONV_INLINE WideGate widened_gate(const Gates& gates, const float* sign, float mean, int64_t i)
{
    const bool affine = op != 0;
    return {all(sign[i]), all(gates.shift[i]), all(gates.threshold[i]), all(mean),
        affine ? all(gates.factor[i]) : Floats{}, affine ? all(gates.offset[i]) : Floats{}};
}

// The weights of x's open and its closed part, and the data that they weigh. Masks multiply, so that a closed gate on
// Inf is NaN and on -3 is -0, as in PyTorch.
struct Gated
{
    Floats open, closed, data;
};

template <int op, typename Type>
SCCONV_INLINE Gated gated(Floats x, const WideGate& gate)
{
    // sign * (x - mean): sign is -1, 0 or 1
    const Ints open = exact_product_plus(x, gate.sign, gate.shift) >= gate.threshold; // not for NaN
    const Floats one = all(1.0f);
    if (op == 0)
        return {select(open, one, Floats{}), select(open, Floats{}, one), x};
    const Floats affine = (x - gate.mean) * gate.factor + gate.offset;
    if (op == 1)
        return {select(open, one, Floats{}), select(open, Floats{}, one), Type::round(affine)};
    const Floats r = sigmoid(affine);
    return {select(open, one, r), select(open, Floats{}, r), x};
}

// Eq. 4: an element's open part and the closed part of the one half the channels away.
template <int op>
SCCONV_INLINE Floats crossed(const Gated& own, const Gated& other)
{
    const Floats closed = other.closed * other.data;
    if (op == 2) // a weight between 0 and 1: PyTorch rounds both products
        return own.open * own.data + closed;
    return exact_product_plus(own.open, own.data, closed);
}

template <int op, typename Type>
SCCONV_INLINE void cross(const typename Type::Element* const x[2], typename Type::Element* const y[2], int64_t at,
    const WideGate& gate0, const WideGate& gate1)
{
    const Gated lower = gated<op, Type>(Type::load(x[0] + at), gate0);
    const Gated upper = gated<op, Type>(Type::load(x[1] + at), gate1);
    Type::store(y[0] + at, crossed<op>(lower, upper));
    Type::store(y[1] + at, crossed<op>(upper, lower));
}

// A channel of fewer elements than a vector has.
template <int op, typename Type>
SCCONV_INLINE void cross_short(const typename Type::Element* const x[2], typename Type::Element* const y[2],
    int64_t pixels, const WideGate& gate0, const WideGate& gate1)
{
    typedef typename Type::Element Element;
    Element in[2][W] = {}, out[2][W];
    const Element* const from[2] = {in[0], in[1]};
    Element* const to[2] = {out[0], out[1]};
    for (int half = 0; half < 2; ++half)
        __builtin_memcpy(in[half], x[half], pixels * sizeof(Element));
    cross<op, Type>(from, to, 0, gate0, gate1);
    for (int half = 0; half < 2; ++half)
        __builtin_memcpy(y[half], out[half], pixels * sizeof(Element));
}

template <int op, typename Type>
static void reconstruct(const Pair& pair)
{
    typedef typename Type::Element Element;
    const Parameters parameters = pair.parameters;
    const Group groups[2] = {*pair.groups[0], *pair.groups[1]};
    const int64_t pixels = pair.pixels;
    const Element* x[2] = {static_cast<const Element*>(pair.x[0]), static_cast<const Element*>(pair.x[1])};
    Element* y[2] = {static_cast<Element*>(pair.y[0]), static_cast<Element*>(pair.y[1])};
    Gates gates[2];
    for (int64_t done = 0; done < pair.channels; done += kGates)
    {
        const int64_t left = pair.channels - done, count = left < kGates ? left : kGates;
        const int64_t channel[2] = {pair.channel[0] + done, pair.channel[1] + done};
        for (int half = 0; half < 2; ++half)
            prepare<op>(gates[half], groups[half], parameters, channel[half], count);
        for (int64_t c = 0; c < count; ++c)
        {
            const WideGate gate0 = widened_gate<op>(gates[0], parameters.sign + channel[0], groups[0].mean, c);
            const WideGate gate1 = widened_gate<op>(gates[1], parameters.sign + channel[1], groups[1].mean, c);
            int64_t i = 0;
            for (; i + W <= pixels; i += W)
                cross<op, Type>(x, y, i, gate0, gate1);
            if (pixels < W)
                cross_short<op, Type>(x, y, pixels, gate0, gate1);
            else if (i < pixels) // the last vector ends where the channel does; what it shares is the same
                cross<op, Type>(x, y, pixels - W, gate0, gate1);
            for (int half = 0; half < 2; ++half)
            {
                x[half] += pixels;
                y[half] += pixels;
            }
        }
    }
}

} // namespace

#define SCCONV_JOIN(a, b) a##b
#define SCCONV_NAME(a, b) SCCONV_JOIN(a, b)

extern const Kernels SCCONV_NAME(kKernels, SCCONV_LANES) = {
    SCCONV_LANES,
    {measure<Float>, measure<Half>, measure<Bfloat16>},
    {
        {reconstruct<0, Float>, reconstruct<0, Half>, reconstruct<0, Bfloat16>},
        {reconstruct<1, Float>, reconstruct<1, Half>, reconstruct<1, Bfloat16>},
        {reconstruct<2, Float>, reconstruct<2, Half>, reconstruct<2, Bfloat16>},
    },
};

} // namespace scconv::cpu
