// Vectors of SCCONV_LANES floats in the compilers' own vector types, and the conversions from and to 16 bits.
//
// Included by one width's file alone, inside its namespace.

constexpr int W = SCCONV_LANES;
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

#define SCCONV_INLINE static inline __attribute__((always_inline))

template <typename To, typename From>
SCCONV_INLINE To as(From value)
{
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    __builtin_memcpy(&to, &value, sizeof(to));
    return to;
}

template <typename Vector>
SCCONV_INLINE Vector read(const void* from)
{
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector)); // unaligned
    return vector;
}

template <typename Vector>
SCCONV_INLINE void write(void* to, Vector vector)
{
    __builtin_memcpy(to, &vector, sizeof(vector));
}

SCCONV_INLINE Floats all(float value) { return value - Floats{}; }
// a * b + c, for products that are exact: so it is the same with one rounding and with two, and every width's.
SCCONV_INLINE Floats exact_product_plus(Floats a, Floats b, Floats c)
{
#if SCCONV_LANES == 16 && defined(__AVX512F__)
    return as<Floats>(_mm512_fmadd_ps(as<__m512>(a), as<__m512>(b), as<__m512>(c)));
#elif SCCONV_LANES == 8 && defined(__FMA__)
    return as<Floats>(_mm256_fmadd_ps(as<__m256>(a), as<__m256>(b), as<__m256>(c)));
#else
    return a * b + c;
#endif
}

SCCONV_INLINE Bits all_bits(uint32_t value) { return Bits{} + value; }

// yes where the mask's bits are 1, else no.
SCCONV_INLINE Bits select(Ints mask, Bits yes, Bits no)
{
    const Bits bits = as<Bits>(mask);
    return (bits & yes) | (~bits & no);
}

SCCONV_INLINE Floats select(Ints mask, Floats yes, Floats no)
{
    return as<Floats>(select(mask, as<Bits>(yes), as<Bits>(no)));
}

SCCONV_INLINE Bits widened(Halves halves)
{
#if SCCONV_LANES == 8 && defined(__AVX2__) // one instruction, of which GCC 12 makes five
    return as<Bits>(_mm256_cvtepu16_epi32(as<__m128i>(halves)));
#else
    return __builtin_convertvector(halves, Bits);
#endif
}

// Of numbers below 2^16.
SCCONV_INLINE Halves narrowed(Bits bits)
{
#if SCCONV_LANES == 8 && defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32(as<__m256i>(bits), as<__m256i>(bits)); // in each half of the register
    return as<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    return __builtin_convertvector(bits, Halves);
#endif
}

// Stores are ordinary ones. With streaming ones a call took 0.88 of its time for 26 MB of float32, as long for 13 MB of
// float16, and 1.3 times as long where y fits the cache, from which the next node reads it.
struct Float
{
    typedef float Element;
    SCCONV_INLINE Floats load(const Element* from) { return read<Floats>(from); }
    SCCONV_INLINE void store(Element* to, Floats value) { write(to, value); }
    SCCONV_INLINE Floats round(Floats value) { return value; }
};

struct Half
{
    typedef uint16_t Element;

#if SCCONV_LANES == 16 && defined(__AVX512F__)
    // with a mask of ones, for GCC 12 warns of what its plain intrinsics leave undefined
    SCCONV_INLINE Halves pack(Floats value)
    {
        return as<Halves>(_mm512_maskz_cvtps_ph(0xffff, as<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
    }
    SCCONV_INLINE Floats unpack(Halves value) { return as<Floats>(_mm512_maskz_cvtph_ps(0xffff, as<__m256i>(value))); }
#elif SCCONV_LANES == 8 && defined(__F16C__)
    SCCONV_INLINE Halves pack(Floats value)
    {
        return as<Halves>(_mm256_cvtps_ph(as<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
    }
    SCCONV_INLINE Floats unpack(Halves value) { return as<Floats>(_mm256_cvtph_ps(as<__m128i>(value))); }
#else
    // By integers, so that a flush of denormal numbers, which a host may have switched on, cannot change them: a half's
    // denormals are normal in float32.
    SCCONV_INLINE Floats unpack(Halves value)
    {
        const Bits bits = widened(value), magnitude = bits & 0x7fffu;
        const Bits normal = (magnitude << 13) + (112u << 23); // the exponent's bias is 15 here and 127 there
        const Bits special = normal + (112u << 23);           // Inf and NaN have the largest exponent in both
        const Floats units = __builtin_convertvector(as<Ints>(magnitude), Floats); // a denormal counts 2^-24
        const Bits small = as<Bits>(units * 0x1p-24f);
        const Bits found = select(as<Ints>(magnitude) >= 0x7c00, special,
            select(as<Ints>(magnitude) < 0x0400, small, normal));
        return as<Floats>(found | (bits & 0x8000u) << 16);
    }

    // To nearest, ties to even, as the instruction does it.
    SCCONV_INLINE Halves pack(Floats value)
    {
        const Bits bits = as<Bits>(value), magnitude = bits & 0x7fffffffu;
        const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        const Bits small = as<Bits>(as<Floats>(magnitude) + 0.5f) - as<Bits>(all(0.5f)); // 0.5's last bit counts 2^-24
        const Bits nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
        const Ints size = as<Ints>(magnitude); // without a sign: ordered like the numbers
        const Bits large = select(size > 0x7f800000, nan, all_bits(0x7c00u));
        const Bits found = select(size >= 0x47800000, large, select(size < 0x38800000, small, normal));
        return narrowed(found | (bits >> 16 & 0x8000u));
    }
#endif
    SCCONV_INLINE Floats load(const Element* from) { return unpack(read<Halves>(from)); }
    SCCONV_INLINE void store(Element* to, Floats value) { write(to, pack(value)); }
    SCCONV_INLINE Floats round(Floats value) { return unpack(pack(value)); }
};

struct Bfloat16
{
    typedef uint16_t Element;
    SCCONV_INLINE Floats load(const Element* from) { return as<Floats>(widened(read<Halves>(from)) << 16); }

    // To nearest, ties to even. A NaN keeps its upper half, which is one too: what is rounded is a result of arithmetic,
    // whose NaNs are quiet.
    SCCONV_INLINE Bits rounded(Floats value)
    {
        const Bits bits = as<Bits>(value);
        return bits + (as<Bits>(value == value) & (0x7fffu + ((bits >> 16) & 1u)));
    }
    SCCONV_INLINE void store(Element* to, Floats value) { write(to, narrowed(rounded(value) >> 16)); }
    SCCONV_INLINE Floats round(Floats value) { return as<Floats>(rounded(value) & 0xffff0000u); }
};

// 1 / (1 + exp(-z)), a few ulp from torch.sigmoid. It weights data and decides no gate.
SCCONV_INLINE Floats sigmoid(Floats z)
{
    constexpr float kFar = 104.0f; // exp(104) is Inf and exp(-104) 0 in float32
    Floats t = -z;
    t = t > kFar ? all(kFar) : t; // NaN compares false, and stays
    t = t < -kFar ? all(-kFar) : t;
    constexpr float kMagic = 0x1.8p23f; // adding it rounds to an integer, in the low bits
    const Floats shifted = t * 0x1.715476p0f + kMagic;
    const Floats n = shifted - kMagic;
    const Floats r = (t - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f; // t - n * ln 2; the first product is exact
    // exp(r) for |r| <= ln(2) / 2: the series up to r^7 / 7!, whose rest is below an eighth of an ulp; in pairs, which do not
    // wait for each other
    const Floats square = r * r;
    const Floats low = r * (1.0f / 6.0f) + 0.5f, middle = r * (1.0f / 120.0f) + (1.0f / 24.0f);
    const Floats high = r * (1.0f / 5040.0f) + (1.0f / 720.0f);
    Floats e = (high * square + middle) * square + low;
    e = e * square + r + 1.0f;
    // times 2^n in two steps, for n reaches beyond the exponents of a float
    const Ints power = as<Ints>(shifted) - as<Ints>(all(kMagic));
    const Ints half = power >> 1;
    e = e * as<Floats>((half + 127) << 23) * as<Floats>((power - half + 127) << 23);
    return 1.0f / (1.0f + e);
}
