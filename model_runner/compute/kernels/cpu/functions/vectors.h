// Vectors of 16 floats, whatever the processor makes of them, and bfloat16 in and out. Compiled with BFLOAT16 a Scalar
// is one; where the processor multiplies pairs of them, and NO_PAIRS does not forbid it, a vector may hold 16 pairs.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(BFLOAT16) && defined(__AVX512BF16__) && !defined(NO_PAIRS)
#define PAIRS 1
#include <immintrin.h>
#else
#define PAIRS 0
#endif

namespace {

#ifdef BFLOAT16
using Scalar = uint16_t;
#else
using Scalar = float;
#endif

constexpr long WIDTH = 16;            // floats of a vector
constexpr long STEP = PAIRS ? 2 : 1;  // values multiplied at once

using Wide = float __attribute__((vector_size(4 * WIDTH)));
using Bits = uint32_t __attribute__((vector_size(4 * WIDTH)));
using Ints = int32_t __attribute__((vector_size(4 * WIDTH)));
using Halves = uint16_t __attribute__((vector_size(2 * WIDTH)));

template <class To, class From> inline To copied(const From* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

inline Wide load(const float* from) { return copied<Wide>(from); }
inline Bits longer(Halves value) {
#if PAIRS
    return (Bits)_mm512_cvtepu16_epi32((__m256i)value);  // one instruction, which compilers do not find
#else
    return __builtin_convertvector(value, Bits);
#endif
}
inline Wide load(const uint16_t* from) { return (Wide)(longer(copied<Halves>(from)) << 16); }
inline float widen(float value) { return value; }
inline float widen(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    return copied<float>(&bits);
}

inline Halves rounded(Wide value) {  // to nearest, ties to even; a NaN stays one
#if PAIRS
    return (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
    const Bits bits = (Bits)value, even = (bits >> 16) & 1;
    const Bits kept = value == value ? (bits + 0x7fff + even) >> 16 : (bits >> 16) | 0x40;
    return __builtin_convertvector(kept, Halves);
#endif
}
inline void store(float* to, Wide value) { std::memcpy(to, &value, sizeof value); }
inline void store(uint16_t* to, Wide value) {
    const Halves halves = rounded(value);
    std::memcpy(to, &halves, sizeof halves);
}

// The same of which only so many are there, the others 0.
template <class Value> inline Wide load(const Value* from, long there) {
    Value some[WIDTH] = {};
    std::memcpy(some, from, there * sizeof(Value));
    return load(some);
}
template <class Value> inline void store(Value* to, Wide value, long there) {
    Value some[WIDTH];
    store(some, value);
    std::memcpy(to, some, there * sizeof(Value));
}

// A whole vector, where that is known beforehand.
struct Whole {};
template <class Value> inline Wide load(const Value* from, Whole) { return load(from); }
template <class Value> inline void store(Value* to, Wide value, Whole) { store(to, value); }

// Calls `act` with where each vector of so many values begins, and how much of it is there.
template <class Act> inline void each(long values, Act act) {
    long at = 0;
    for (; at + WIDTH <= values; at += WIDTH) act(at, Whole{});
    if (at < values) act(at, values - at);
}

// As it is once it has been stored.
inline Wide as_stored(Wide value) {
#ifdef BFLOAT16
    return (Wide)(longer(rounded(value)) << 16);
#else
    return value;
#endif
}

// e to the power of x: 2^n e^r with |r| <= ln 2 / 2, e^r by its series to the sixth power, off by 1e-7 of itself. An x
// below -87 or above 88 counts as that; what comes of a NaN is some number.
inline Wide power(Wide given) {
    const Wide some = given < -87.0f ? -87.0f - Wide{} : given, x = some > 88.0f ? 88.0f - Wide{} : some;
    const float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
    const Wide shifted = x * 1.44269504f + magic, n = shifted - magic;
    const Wide r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Wide series = r * (1.0f / 720) + 1.0f / 120;
    series = series * r + 1.0f / 24, series = series * r + 1.0f / 6, series = series * r + 0.5f;
    series = (series * r + 1.0f) * r + 1.0f;
    return (Wide)((Ints)series + ((Ints)shifted << 23));
}

// One step of turning 16 rows of 16 into columns: of every other element of two rows, those at even and at odd places.
inline void part(Wide& one, Wide& two, int step) {
    Bits even, odd;
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) {
        even[i] = i & step ? WIDTH + (i ^ step) : i;
        odd[i] = i & step ? WIDTH + i : i ^ step;
    }
    const Wide first = one, second = two;
    one = __builtin_shuffle(first, second, even);
    two = __builtin_shuffle(first, second, odd);
}

// All elements taken together, two by two, at every place.
template <class Take> inline Wide fold(Wide value, Take take) {
#pragma GCC unroll 4
    for (int step = WIDTH / 2; step; step /= 2) {
        Bits other;
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) other[i] = i ^ step;
        value = take(value, __builtin_shuffle(value, other));
    }
    return value;
}

// Element i is the sum of vector i, of sixteen.
inline Wide sums(const Wide* of) {
    Wide vectors[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) vectors[i] = of[i];
#pragma GCC unroll 4
    for (int step = 1; step < WIDTH; step *= 2)
#pragma GCC unroll 8
        for (int at = 0; at < WIDTH; at += 2 * step) {
            part(vectors[at], vectors[at + step], step);
            vectors[at] += vectors[at + step];
        }
    return vectors[0];
}

// total + the products of 16 pairs, or of 16 floats, summed pair by pair.
inline Wide add_products(Wide total, Wide one, Wide two) {
#if PAIRS
    return (Wide)_mm512_dpbf16_ps((__m512)total, (__m512bh)one, (__m512bh)two);
#else
    return total + one * two;
#endif
}

// WIDTH * STEP values: pairs as they lie, or floats.
inline Wide load_steps(const Scalar* from) {
#if PAIRS
    return copied<Wide>(from);
#else
    return load(from);
#endif
}

// The same of which so many are there, the others 0.
inline Wide load_steps(const Scalar* from, long there) {
#if PAIRS
    const __mmask32 mask = there >= 2 * WIDTH ? ~0u : (1u << there) - 1;
    return (Wide)_mm512_maskz_loadu_epi16(mask, from);
#else
    if (there >= WIDTH) return load_steps(from);
    Wide some = {};
    for (long i = 0; i < there; i++) some[i] = widen(from[i]);
    return some;
#endif
}

// WIDTH values of one row, or pairs of these and of those below them.
inline Wide load_column(const Scalar* one, [[maybe_unused]] const Scalar* below) {
#if PAIRS
    const auto low = copied<Halves>(one), high = copied<Halves>(below);
    return (Wide)(longer(low) | longer(high) << 16);
#else
    return load(one);
#endif
}

// The same step, a pair or a value, WIDTH times.
inline Wide spread(const Scalar* step) {
#if PAIRS
    return (Wide)_mm512_set1_epi32(copied<int>(step));
#else
    return widen(*step) - Wide{};
#endif
}

}  // namespace
