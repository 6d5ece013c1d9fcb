// Fixed-point activations in words of 16 bits, or one plane of them in bytes, for vpmaddwd and
// vpmaddubsw. Of each four columns the words of the even ones come first.
#pragma once

#include "fixed_units.h"

namespace {

// Whether a column takes two bytes: also of one plane, if the weights are of 8 bits.
constexpr bool in_words(int32_t format, int planes) { return planes == 2 || format == HQQ8; }

// Bytes of 64 columns.
constexpr int64_t vector_bytes(int32_t format, int planes) {
    return in_words(format, planes) ? 2 * COLUMNS : COLUMNS;
}

// Where four columns begin.
inline int64_t place_of(int32_t format, int planes, int64_t column) {
    return column * (vector_bytes(format, planes) / COLUMNS);
}

// A group of a row, `count` columns (a multiple of 16), in words or bytes; the sum of what they
// stand for, and what they count in.
template <int PLANES>
inline void prepare_group(const float* row, int64_t count, int32_t format, uint8_t* out, float& sum,
                          float& factor) {
    const bool words = in_words(format, PLANES);
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 8) {
        const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(row + i));
        largest = _mm256_max_epi32(
            largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
    const Unit unit = unit_of<PLANES>(*std::max_element(lanes, lanes + 8));
    const bool finite = unit.factor == unit.factor;
    const __m256 times = _mm256_set1_ps(unit.times);
    // Of each four columns the even ones, then the odd ones; or all, as bytes.
    const __m256i pick = _mm256_broadcastsi128_si256(
        words ? _mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1)
              : _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 8) {
        const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(row + i), times);
        __m256i value = _mm256_min_epi32(_mm256_cvtps_epi32(scaled), _mm256_set1_epi32(32639));
        if (!finite) value = _mm256_setzero_si256();
        total = _mm256_add_epi32(total, value);
        const __m256i picked = _mm256_shuffle_epi8(value, pick);
        const __m128i low = _mm256_castsi256_si128(picked);
        const __m128i high = _mm256_extracti128_si256(picked, 1);
        if (words)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i),
                             _mm_unpacklo_epi64(low, high));
        else
            _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i), _mm_unpacklo_epi32(low, high));
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total);
    int32_t all = 0;
    for (const int32_t lane : lanes) all += lane;
    factor = unit.factor;
    sum = static_cast<float>(all) * factor;
}

} // namespace
