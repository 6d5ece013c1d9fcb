// Fixed-point activations in planes of bytes, for vpdpbusd.
#pragma once

#include "fixed_units.h"

namespace {

// Bytes of 64 columns.
constexpr int64_t vector_bytes(int32_t, int planes) { return planes * COLUMNS; }

// Where a column is.
inline int64_t place_of(int32_t, int planes, int64_t column) {
    return column / COLUMNS * (planes * COLUMNS) + column % COLUMNS;
}

// A group of a row, `count` columns (a multiple of 16): its planes, 64 bytes apart; the sum of what
// they stand for, and what they count in.
template <int PLANES>
inline void prepare_group(const float* row, int64_t count, int32_t, uint8_t* high, float& sum,
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

} // namespace
