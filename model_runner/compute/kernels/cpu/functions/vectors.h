// Vectors of 16 floats in GCC's vector extension, loaded from and stored to float or bfloat16.
//
// With BFLOAT16 defined a Scalar is a bfloat16, else a float. If the processor multiplies pairs of bfloat16
// (AVX512_BF16) and NO_PAIRS is not defined, a Vector may also hold 16 such pairs.

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

constexpr long WIDTH = 16;            // floats in a vector
constexpr long STEP = PAIRS ? 2 : 1;  // values of a row that one multiply_add takes for each float

using Vector = float __attribute__((vector_size(4 * WIDTH)));
using UintVector = uint32_t __attribute__((vector_size(4 * WIDTH)));
using IntVector = int32_t __attribute__((vector_size(4 * WIDTH)));
using HalfVector = uint16_t __attribute__((vector_size(2 * WIDTH)));

template <class To, class From> inline To load_bits(const From* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

inline Vector load(const float* from) { return load_bits<Vector>(from); }
inline UintVector to_uint32(HalfVector value) {
#if PAIRS
    return (UintVector)_mm512_cvtepu16_epi32((__m256i)value);  // one instruction; compilers emit several
#else
    return __builtin_convertvector(value, UintVector);
#endif
}
inline Vector load(const uint16_t* from) { return (Vector)(to_uint32(load_bits<HalfVector>(from)) << 16); }
inline float widen(float value) { return value; }
inline float widen(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    return load_bits<float>(&bits);
}

inline HalfVector round_to_bfloat16(Vector value) {  // to nearest, ties to even; NaN stays NaN
#if PAIRS
    return (HalfVector)_mm512_cvtneps_pbh((__m512)value);
#else
    const UintVector bits = (UintVector)value, even = (bits >> 16) & 1;
    const UintVector kept = value == value ? (bits + 0x7fff + even) >> 16 : (bits >> 16) | 0x40;
    return __builtin_convertvector(kept, HalfVector);
#endif
}
inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }
inline void store(uint16_t* to, Vector value) {
    const HalfVector halves = round_to_bfloat16(value);
    std::memcpy(to, &halves, sizeof halves);
}

// Load or store only the first `count` values; a load sets the other values to 0.
template <class Value> inline Vector load(const Value* from, long count) {
    Value values[WIDTH] = {};
    std::memcpy(values, from, count * sizeof(Value));
    return load(values);
}
template <class Value> inline void store(Value* to, Vector value, long count) {
    Value values[WIDTH];
    store(values, value);
    std::memcpy(to, values, count * sizeof(Value));
}

// Replaces `count` where the count is known to be WIDTH at compile time.
struct FullVector {};
template <class Value> inline Vector load(const Value* from, FullVector) { return load(from); }
template <class Value> inline void store(Value* to, Vector value, FullVector) { store(to, value); }

// Calls function(index of the vector's first value, count) for each vector of an array of `values` values.
template <class Function> inline void for_each_vector(long values, Function function) {
    long at = 0;
    for (; at + WIDTH <= values; at += WIDTH) function(at, FullVector{});
    if (at < values) function(at, values - at);
}

// Returns the vector as it is after being stored as Scalars and loaded again.
inline Vector round_as_stored(Vector value) {
#ifdef BFLOAT16
    return (Vector)(to_uint32(round_to_bfloat16(value)) << 16);
#else
    return value;
#endif
}

// Returns e^x = 2^n e^r with |r| <= ln 2 / 2, and e^r by its Taylor series of degree 6; relative error 1e-7. x is
// clamped to -87 .. 88; the result for NaN is an arbitrary number.
inline Vector exp(Vector value) {
    const Vector low = value < -87.0f ? -87.0f - Vector{} : value, x = low > 88.0f ? 88.0f - Vector{} : low;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds a float to an integer
    const Vector shifted = x * 1.44269504f + magic, n = shifted - magic;
    const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector series = r * (1.0f / 720) + 1.0f / 120;
    series = series * r + 1.0f / 24, series = series * r + 1.0f / 6, series = series * r + 0.5f;
    series = (series * r + 1.0f) * r + 1.0f;
    return (Vector)((IntVector)series + ((IntVector)shifted << 23));
}

// One of the four steps (1, 2, 4, 8) of transposing 16 rows of 16: exchanges elements `step` apart between two rows.
inline void transpose_step(Vector& one, Vector& two, int step) {
    UintVector even, odd;
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) {
        even[i] = i & step ? WIDTH + (i ^ step) : i;
        odd[i] = i & step ? WIDTH + i : i ^ step;
    }
    const Vector first = one, second = two;
    one = __builtin_shuffle(first, second, even);
    two = __builtin_shuffle(first, second, odd);
}

// Reduces all elements by a binary function. Every element of the result is the reduction.
template <class Combine> inline Vector reduce(Vector value, Combine combine) {
#pragma GCC unroll 4
    for (int step = WIDTH / 2; step; step /= 2) {
        UintVector other;
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) other[i] = i ^ step;
        value = combine(value, __builtin_shuffle(value, other));
    }
    return value;
}

// Returns the sums of 16 vectors: element i of the result is the sum of the elements of vector i.
inline Vector sum_each(const Vector* given) {
    Vector vectors[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) vectors[i] = given[i];
#pragma GCC unroll 4
    for (int step = 1; step < WIDTH; step *= 2)
#pragma GCC unroll 8
        for (int at = 0; at < WIDTH; at += 2 * step) {
            transpose_step(vectors[at], vectors[at + step], step);
            vectors[at] += vectors[at + step];
        }
    return vectors[0];
}

// Returns total + one * two for each float; for pairs, total plus the sum of the two products of each pair.
inline Vector multiply_add(Vector total, Vector one, Vector two) {
#if PAIRS
    return (Vector)_mm512_dpbf16_ps((__m512)total, (__m512bh)one, (__m512bh)two);
#else
    return total + one * two;
#endif
}

// Loads WIDTH * STEP consecutive values, as pairs or as floats.
inline Vector load_steps(const Scalar* from) {
#if PAIRS
    return load_bits<Vector>(from);
#else
    return load(from);
#endif
}

// Loads only the first `count` of WIDTH * STEP consecutive values, and sets the other values to 0.
inline Vector load_steps(const Scalar* from, long count) {
#if PAIRS
    const __mmask32 mask = count >= 2 * WIDTH ? ~0u : (1u << count) - 1;
    return (Vector)_mm512_maskz_loadu_epi16(mask, from);
#else
    if (count >= WIDTH) return load_steps(from);
    Vector values = {};
    for (long i = 0; i < count; i++) values[i] = widen(from[i]);
    return values;
#endif
}

// Loads WIDTH columns of STEP rows: the values of one row, or pairs of a value and the value below it in the next row.
inline Vector load_rows(const Scalar* one, [[maybe_unused]] const Scalar* below) {
#if PAIRS
    const auto low = load_bits<HalfVector>(one), high = load_bits<HalfVector>(below);
    return (Vector)(to_uint32(low) | to_uint32(high) << 16);
#else
    return load(one);
#endif
}

// Loads one pair or one value and repeats it WIDTH times.
inline Vector broadcast(const Scalar* step) {
#if PAIRS
    return (Vector)_mm512_set1_epi32(load_bits<int>(step));
#else
    return widen(*step) - Vector{};
#endif
}

}  // namespace
