// Scales and zeros for the products of variant_avx512bf16.cpp, sixteen groups at a time.
#pragma once

#include "bf16_rows.h"

namespace {

// 16 values of the flattened scales or zeros from element `at`, as far as `mask` goes.
INLINE __m512 decode_plain(const uint8_t* base, int64_t at, __mmask16 mask, bool bfloat = false) {
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, base + at * 2);
    if (bfloat)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    return _mm512_cvtph_ps(halves);
}

// The meta groups of some units: element i of the scales, which is in meta group g = i / 128, is
// q[i] * scale_factors[g - first] + scale_offsets[g - first], and the zeros likewise.
struct Metas {
    static constexpr int64_t MOST = 80;
    float scale_factors[MOST], scale_offsets[MOST], zero_factors[MOST], zero_offsets[MOST];
    int64_t first;

    // Of elements [begin, end). `more` is added to each zero.
    void decode(const Matrix& m, const uint8_t* base, int64_t begin, int64_t end, float more) {
        first = begin / 128;
        const int64_t count = (end - 1) / 128 - first + 1;
        for (int64_t i = 0; i < count; i += 16) {
            const auto mask = static_cast<__mmask16>((1u << std::min<int64_t>(16, count - i)) - 1);
            const auto decode_one = [&](int64_t scales, int64_t zeros, bool bfloat, float add,
                                        float* factors, float* offsets) {
                const __m512 scale = decode_plain(base + scales, first + i, mask, bfloat);
                const __m512 zero = decode_plain(base + zeros, first + i, mask);
                _mm512_storeu_ps(factors + i, scale);
                _mm512_storeu_ps(offsets + i,
                                 _mm512_fnmadd_ps(scale, zero, _mm512_set1_ps(add)));
            };
            decode_one(m.scale_scale, m.scale_zero, m.scale_format == BF16, 0, scale_factors, scale_offsets);
            decode_one(m.zero_scale, m.zero_zero, false, more, zero_factors, zero_offsets);
        }
    }

    // So many units, of `groups` groups a row, always fit.
    static int64_t units_at_once(int64_t groups) {
        return std::max<int64_t>(1, (MOST - 18) * 128 / groups);
    }
};

// 16 elements, of which those from lane `left` on are in the next meta group, unless they are
// ALIGNED.
template <bool ALIGNED>
INLINE __m512 decode_meta(__m512 value, const float* factors, const float* offsets, int64_t left) {
    __m512 factor = _mm512_set1_ps(factors[0]), offset = _mm512_set1_ps(offsets[0]);
    if (!ALIGNED && left < 16) {
        const auto next = static_cast<__mmask16>(0xffff << left);
        factor = _mm512_mask_mov_ps(factor, next, _mm512_set1_ps(factors[1]));
        offset = _mm512_mask_mov_ps(offset, next, _mm512_set1_ps(offsets[1]));
    }
    return _mm512_fmadd_ps(value, factor, offset);
}

INLINE __m512 widen_bytes(const uint8_t* bytes, __mmask16 mask) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes)));
}

INLINE __m512 decode_e8m0(__m512i exponent) {
    const __m512i least = _mm512_set1_epi32(0x00400000), nan = _mm512_set1_epi32(0x7fc00000);
    __m512i bits = _mm512_slli_epi32(exponent, 23);
    bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(exponent, exponent), least);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(
        bits, _mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(255)), nan));
}

// As from_e4m3.
INLINE __m512 decode_e4m3(__m512i codes) {
    const __m512i size = _mm512_and_si512(codes, _mm512_set1_epi32(0x7f));
    const __m512i sign = _mm512_slli_epi32(_mm512_xor_si512(codes, size), 24);
    const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(size, 20)),
                                       _mm512_set1_ps(0x1p120f));
    const __m512i bits = _mm512_or_si512(_mm512_castps_si512(value), sign);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(
        bits, _mm512_cmpeq_epi32_mask(size, _mm512_set1_epi32(0x7f)),
        _mm512_set1_epi32(0x7fc00000)));
}

// Sixteen codes by `factor`. As a float16's exponent and mantissa they count a 256th.
INLINE __m512 scale_e4m3(__m128i codes, float factor) {
    const __m256i words = _mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8);
    const __m256i halves =
        _mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16(static_cast<short>(0xbfff)));
    const __mmask16 numbers = _mm_cmpneq_epi8_mask(
        _mm_and_si128(codes, _mm_set1_epi8(0x7f)), _mm_set1_epi8(0x7f));
    return _mm512_mask_mul_ps(_mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)), numbers,
                              _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256)),
                              _mm512_set1_ps(factor));
}

// What all units of a product have in common.
struct Product {
    const Matrix& matrix;
    const uint8_t* base;
    int64_t units, groups; // of the matrix, of a row
    Metas metas[8]; // by row of the unit

    Product(const Matrix& m, const uint8_t* base)
        : matrix(m), base(base), units(num_units(m)), groups(num_groups(m)) {}
};

INLINE __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

using AllLanes = std::integral_constant<__mmask16, 0xffff>;

// The scales of 16 groups in row K of a unit, from its group `group` on, as far as `mask` goes.
// What their zeros contribute is subtracted from the row's sum. ALIGNED: the first is a multiple of
// 16 among all of the matrix.
template <int32_t FORMAT, bool META, bool ALIGNED, int K, class Mask>
INLINE __m512 decode_scales(const Product& p, int64_t unit, int64_t group, Mask mask,
                            const Row& row, __m512& sum) {
    const uint8_t* scales = p.base + p.matrix.scale;
    const uint8_t* zeros = p.base + p.matrix.zero;
    const int64_t at = (unit + K * p.units) * p.groups + group;
    if constexpr (is_e2m1(FORMAT)) {
        const __m128i codes = _mm_maskz_loadu_epi8(mask, scales + at);
        if constexpr (FORMAT == MXFP4)
            return _mm512_maskz_mov_ps(mask, decode_e8m0(_mm512_cvtepu8_epi32(codes)));
        float own;
        memcpy(&own, p.base + p.matrix.scale_scale + (unit + K * p.units) * 4, sizeof own);
        return scale_e4m3(codes, own);
    }
    __m512 scale, zero;
    if constexpr (META) {
        const Metas& metas = p.metas[K];
        const int64_t meta = (at >> 7) - metas.first, left = 128 - (at & 127);
        scale = decode_meta<ALIGNED>(widen_bytes(scales + at, mask), metas.scale_factors + meta,
                                     metas.scale_offsets + meta, left);
        zero = decode_meta<ALIGNED>(widen_bytes(zeros + at, mask), metas.zero_factors + meta,
                                    metas.zero_offsets + meta, left);
        scale = _mm512_maskz_mov_ps(mask, scale);
    } else {
        scale = decode_plain(scales, at, mask, p.matrix.scale_format == BF16);
        if (p.matrix.zero < 0) zero = _mm512_set1_ps(middle(FORMAT) + excess(FORMAT, K));
        else
            zero = _mm512_add_ps(decode_plain(zeros, at, mask),
                                 _mm512_set1_ps(excess(FORMAT, K)));
    }
    const __m512 offset = _mm512_mul_ps(scale, zero);
    sum = _mm512_fnmadd_ps(offset, _mm512_loadu_ps(row.sums + group), sum);
    return scale;
}

// The scales and zeros of the units from `unit` on, for as many bytes as one has.
template <int32_t FORMAT, bool META> INLINE void prefetch_scales(const Product& p, int64_t unit) {
    const int64_t row_bytes = p.groups * (META || is_e2m1(FORMAT) ? 1 : 2);
    each<rows_per_unit(FORMAT)>([&](auto k) INLINE_LAMBDA {
        const int64_t begin = (unit + k * p.units) * row_bytes + SCALES_AHEAD;
        for (int64_t at = begin; at < begin + row_bytes; at += 64) {
            __builtin_prefetch(p.base + p.matrix.scale + at);
            if (p.matrix.zero >= 0) __builtin_prefetch(p.base + p.matrix.zero + at);
        }
    });
}

} // namespace
