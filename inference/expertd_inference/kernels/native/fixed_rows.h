// Activations as fixed-point numbers, for products of whole numbers: rows.h takes them for all
// quantized weights, and variant_avx512bf16.cpp, of one row, for 8 and 4 bit, whose integers are
// found in their bytes by a mask alone.
//
// The activations of a group are whole multiples of a power of two, at most 32,639 of them: 15
// bits and a sign, in two planes of signed bytes, 256 * high + low. Of bfloat16s, which have 8
// bits, those larger than a 128th of the group's largest are exact, and none is off by more than a
// 32,639th of that largest, where rounding to bfloat16 moves the largest itself by up to a 512th.
//
// Or they are in one plane, multiples of a 127th of the group's largest.
#pragma once

#include <immintrin.h>

#include "generic.h"
#include "unroll.h"

namespace {

constexpr int64_t COLUMNS = 64; // of a unit, in a register

int64_t num_vectors(const Matrix& m) { return (m.columns + COLUMNS - 1) / COLUMNS; }

int64_t num_groups(const Matrix& m) { return m.columns / m.group_size; }

constexpr bool is_fixed(int32_t format) { return format == HQQ8 || format == HQQ4; }

// How far left of a byte's lowest bit the integers of row `k` lie.
constexpr int left_of(int32_t format, int k) { return format == HQQ4 && k == 0 ? 4 : 0; }

// A power of two as a float.
inline float power(int exponent) { return from_bits(static_cast<uint32_t>(exponent + 127) << 23); }

// What a group counts in, and by what numbers are multiplied to be counted so.
struct Unit {
    float factor, times;
};

// `bits` are those of the group's largest number, without its sign.
template <int PLANES> inline Unit unit_of(uint32_t bits) {
    // Infinity or none: so is all that comes of the group.
    if (bits >= 0x7f800000) return {from_bits(0x7fc00000), 0};
    if (PLANES == 1) {
        // Groups of next to nothing are 0, since what they were multiplied by would be no float.
        const float largest = from_bits(bits);
        return largest < 0x1p-120f ? Unit{0, 0} : Unit{largest / 127, 127 / largest};
    }
    // Here they are multiples of a number that is no smaller than floats can be.
    const int unit = std::max(static_cast<int>(bits >> 23) - 127 - 14, -126);
    return {power(unit), power(-unit)};
}

// A group of a row, `count` columns (a multiple of 16): its planes, 64 bytes apart; the sum of what
// they stand for, and what they count in.
template <int PLANES>
inline void prepare_group(const float* row, int64_t count, uint8_t* high, float& sum,
                          float& factor) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 16) {
        const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(row + i));
        largest = _mm512_max_epu32(
            largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    const Unit unit = unit_of<PLANES>(_mm512_reduce_max_epu32(largest));
    const bool finite = unit.factor == unit.factor;
    const __m512 times = _mm512_set1_ps(unit.times);
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(row + i), times);
        __m512i value = _mm512_min_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(32639));
        if (!finite) value = _mm512_setzero_si512();
        total = _mm512_add_epi32(total, value);
        uint8_t* const place = high + i / COLUMNS * (PLANES * COLUMNS) + i % COLUMNS;
        if (PLANES == 1) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(place), _mm512_cvtepi32_epi8(value));
            continue;
        }
        const __m512i upper =
            _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
        const __m512i lower = _mm512_sub_epi32(value, _mm512_slli_epi32(upper, 8));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(place), _mm512_cvtepi32_epi8(upper));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(place + COLUMNS),
                         _mm512_cvtepi32_epi8(lower));
    }
    factor = unit.factor;
    sum = static_cast<float>(_mm512_reduce_add_epi32(total)) * factor;
}

// For each 64 columns the high bytes and the low ones, or the only ones; then the groups' sums, and
// what each counts in, both padded with zeros to 16.
template <int PLANES>
inline void prepare_fixed(const Matrix& m, const float* row, uint8_t* prepared) {
    constexpr int64_t VECTOR = PLANES * COLUMNS;
    const int64_t bytes = VECTOR * num_vectors(m);
    const int64_t groups = num_groups(m), padded = round_up(groups, 16);
    if (m.columns % COLUMNS) memset(prepared + bytes - VECTOR, 0, VECTOR);
    auto* sums = reinterpret_cast<float*>(prepared + bytes);
    memset(sums, 0, 2 * padded * sizeof(float));
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t column = group * m.group_size;
        uint8_t* place = prepared + column / COLUMNS * VECTOR + column % COLUMNS;
        prepare_group<PLANES>(row + column, m.group_size, place, sums[group], sums[padded + group]);
    }
}

inline int64_t fixed_bytes(const Matrix& m, int planes) {
    return planes * COLUMNS * num_vectors(m) +
           2 * round_up(num_groups(m), 16) * static_cast<int64_t>(sizeof(float));
}

// Where prepared activations are: registers of columns; the groups' sums; what they count in.
struct Row {
    const __m512i* columns;
    const float *sums, *factors; // the latter of fixed-point ones
};

inline Row fixed_row_of(const Matrix& m, const uint8_t* prepared, int planes) {
    const auto* columns = reinterpret_cast<const __m512i*>(prepared);
    const auto* sums = reinterpret_cast<const float*>(columns + planes * num_vectors(m));
    return {columns, sums, sums + round_up(num_groups(m), 16)};
}

} // namespace
