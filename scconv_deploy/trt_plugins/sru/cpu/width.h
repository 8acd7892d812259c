// The loops over elements for one vector width. Include after defining SCCONV_LANES (4, 8 or 16).
//
// Every width computes the same bytes: sums have 32 lanes whatever the width, and nothing is contracted to fused
// multiply-adds (-ffp-contract=off), which the narrowest width would not have.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace scconv::cpu {
namespace {

#include "vectors.h"

constexpr int kVectors = kLanes / W;

// --- statistics ---

// Partial sums of a block's kLanes lanes.
struct Sums
{
    Floats lanes[kVectors];

    // The lanes added in halves down to four, in float, and those in double: the same order for every width.
    SCCONV_INLINE double total(const Sums& sums)
    {
        float lane[kLanes];
        __builtin_memcpy(lane, sums.lanes, sizeof(lane));
        for (int count = kLanes / 2; count >= 4; count /= 2)
            for (int i = 0; i < count; ++i)
                lane[i] += lane[i + count];
        return (double(lane[0]) + double(lane[2])) + (double(lane[1]) + double(lane[3]));
    }
};

// f(vector's number in the row, x) for each vector of each row of kLanes elements; the last row is filled up with `rest`.
// Meanwhile what lies `ahead` elements further comes into the nearest cache.
template <int ahead, typename Type, typename Function>
SCCONV_INLINE void for_rows(const typename Type::Element* x, int64_t count, float rest, Function&& f)
{
    constexpr int kLine = 64 / sizeof(x[0]);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
    {
        if (ahead)
            for (int line = 0; line < kLanes; line += kLine)
                __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(x + i + line)
                    + ahead * sizeof(x[0]))); // beyond the end too: it does not fault
        for (int v = 0; v < kVectors; ++v)
            f(v, Type::load(x + i + v * W));
    }
    if (i == count)
        return;
    typename Type::Element row[kLanes] = {};
    __builtin_memcpy(row, x + i, (count - i) * sizeof(row[0]));
    float values[kLanes];
    for (int v = 0; v < kVectors; ++v)
        write(values + v * W, Type::load(row + v * W));
    for (int64_t j = count - i; j < kLanes; ++j)
        values[j] = rest;
    for (int v = 0; v < kVectors; ++v)
        f(v, read<Floats>(values + v * W));
}

// Moments of blocks of kBlock elements, the last one shorter: the mean, then sums about it while the block is in the
// nearest cache. So the squares never cancel, wherever the mean lies, and memory is read once.
template <typename Type>
static void measure(const void* data, int64_t count, Moments* blocks)
{
    typedef typename Type::Element Element;
    const Element* x = static_cast<const Element*>(data);
    for (; count > 0; x += kBlock, count -= kBlock, ++blocks)
    {
        const int64_t size = count < kBlock ? count : kBlock;
        Sums plain{};
        for_rows<0, Type>(x, size, 0.0f, [&](int v, Floats value) __attribute__((always_inline)) {
            plain.lanes[v] += value;
        });
        const float mean = static_cast<float>(Sums::total(plain) / size);
        Sums sums{}, squares{};
        for_rows<kBlock, Type>(x, size, mean, [&](int v, Floats value) __attribute__((always_inline)) {
            const Floats centred = value - mean;
            sums.lanes[v] += centred;
            squares.lanes[v] += centred * centred;
        });
        const double sum = Sums::total(sums), rest = sum / size; // what rounding took from the mean
        const double about = Sums::total(squares) - sum * rest;
        *blocks = {mean + rest, about < 0.0 ? 0.0 : about}; // a NaN stays
    }
}

// --- the gate and the cross reconstruction ---

// A vector's gate, its channel's values in every lane.
struct WideGate
{
    Floats sign, mean, threshold, factor, offset;
};

SCCONV_INLINE WideGate widen(const Gate& gate)
{
    return {all(gate.sign), all(gate.mean), all(gate.threshold), all(gate.factor), all(gate.offset)};
}

// x's open and its closed part. Masks multiply, so that a closed gate on Inf is NaN and on -3 is -0, as in PyTorch.
struct Parts
{
    Floats open, closed;
};

template <int op, typename Type>
SCCONV_INLINE Parts parts(Floats x, const WideGate& gate)
{
    const Floats centred = x - gate.mean;
    const Ints open = gate.sign * centred >= gate.threshold; // not for NaN
    const Floats one = all(1.0f);
    if (op == 0)
        return {select(open, one, Floats{}) * x, select(open, Floats{}, one) * x};
    const Floats affine = centred * gate.factor + gate.offset;
    if (op == 1)
    {
        const Floats data = Type::round(affine);
        return {select(open, one, Floats{}) * data, select(open, Floats{}, one) * data};
    }
    const Floats r = sigmoid(affine);
    return {select(open, one, r) * x, select(open, Floats{}, r) * x};
}

template <int op, typename Type>
SCCONV_INLINE void cross(const typename Type::Element* const x[2], typename Type::Element* const y[2], int64_t at,
    const WideGate& gate0, const WideGate& gate1)
{
    const Parts lower = parts<op, Type>(Type::load(x[0] + at), gate0);
    const Parts upper = parts<op, Type>(Type::load(x[1] + at), gate1);
    Type::store(y[0] + at, lower.open + upper.closed);
    Type::store(y[1] + at, upper.open + lower.closed);
}

template <int op, typename Type>
static void reconstruct(const Pair& pair)
{
    typedef typename Type::Element Element;
    for (int64_t c = 0; c < pair.channels; ++c)
    {
        const int64_t pixels = pair.pixels, start = c * pixels;
        const Element* const x[2] = {
            static_cast<const Element*>(pair.x[0]) + start, static_cast<const Element*>(pair.x[1]) + start};
        Element* const y[2] = {static_cast<Element*>(pair.y[0]) + start, static_cast<Element*>(pair.y[1]) + start};
        const WideGate gate0 = widen(pair.gates[0][c]), gate1 = widen(pair.gates[1][c]);
        if (pixels < W)
        {
            Element in[2][W] = {}, out[2][W];
            const Element* const from[2] = {in[0], in[1]};
            Element* const to[2] = {out[0], out[1]};
            const int64_t bytes = pixels * sizeof(Element);
            for (int half = 0; half < 2; ++half)
                __builtin_memcpy(in[half], x[half], bytes);
            cross<op, Type>(from, to, 0, gate0, gate1);
            for (int half = 0; half < 2; ++half)
                __builtin_memcpy(y[half], out[half], bytes);
            continue;
        }
        int64_t i = 0;
        for (; i + W <= pixels; i += W)
            cross<op, Type>(x, y, i, gate0, gate1);
        if (i < pixels) // the last vector ends where the channel does; what it shares with the one before is the same
            cross<op, Type>(x, y, pixels - W, gate0, gate1);
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
