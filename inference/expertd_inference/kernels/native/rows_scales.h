// Scales and zeros for products of tiles (rows_tiles.h): lanes are units.
#pragma once

#include "rows_tiles.h"

namespace {

constexpr int64_t STRIP = 16; // groups whose scales are decoded at a time

// Scales of a strip: [group][tile][field][scale, zero][unit], as fields want them: an upper one
// counts 16 times too much.
template <int32_t FORMAT>
constexpr int64_t floats_per_group = rows_per_unit(FORMAT) * 2 * LANES;

// What a place of a strip counts too much, and so do its sums of activations: 16 of upper fields.
template <int32_t FORMAT> constexpr float too_much(int place) {
    return num_fields(FORMAT) == 2 && place % 2 == 0 ? 16 : 1;
}

template <int32_t FORMAT> constexpr int row_of_place(int place) {
    return row_of_field(FORMAT, place / num_fields(FORMAT), place % num_fields(FORMAT));
}

// Whole tiles of scales that are fp16 or bfloat16 by themselves: of two groups of scales, and two of
// zeros, lanes are units after a transposition of both.
template <int32_t FORMAT, bool WHOLE>
INLINE void decode_plain_strip(const Matrix& m, const uint8_t* base, int64_t unit, int64_t group,
                               int64_t num, float* out) {
    const int64_t units = num_units(m), groups = num_groups(m);
    const bool bfloat = m.scale_format == BF16;
    const __mmask16 mask = first_lanes(num);
    each<rows_per_unit(FORMAT)>([&](auto place) INLINE_LAMBDA {
        constexpr float above = too_much<FORMAT>(place);
        const int64_t at = (unit + row_of_place<FORMAT>(place) * units) * groups + group;
        float* const to = out + place * 2 * LANES;
        const auto decode = [&](const uint8_t* from, bool wide, float times, float* here)
            INLINE_LAMBDA {
                const auto one = [&](int64_t i) INLINE_LAMBDA {
                    return _mm256_maskz_loadu_epi16(mask, from + i * groups * 2);
                };
                const auto load = [&](int i) INLINE_LAMBDA {
                    const uint8_t *lower = from + i * groups * 2, *upper = lower + 8 * groups;
                    if constexpr (WHOLE) return load_pair(lower, upper);
                    return _mm512_inserti64x4(_mm512_castsi256_si512(one(i)), one(i + 4), 1);
                };
                const __m512 factor = _mm512_set1_ps(times);
                const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
                transpose_half(load, [&](int j, __m512i two) INLINE_LAMBDA {
                    __m512 even, odd;
                    if (wide) {
                        even = _mm512_castsi512_ps(_mm512_slli_epi32(two, 16));
                        odd = _mm512_castsi512_ps(_mm512_and_si512(two, upper_half));
                    } else {
                        even = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(two));
                        odd = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(two, 16)));
                    }
                    float* const group0 = here + 2 * j * floats_per_group<FORMAT>;
                    _mm512_store_ps(group0, _mm512_mul_ps(even, factor));
                    _mm512_store_ps(group0 + floats_per_group<FORMAT>,
                                    _mm512_mul_ps(odd, factor));
                });
            };
        if (bfloat) decode(base + m.scale + at * 2, true, 1 / above, to);
        else decode(base + m.scale + at * 2, false, 1 / above, to);
        decode(base + m.zero + at * 2, false, above, to + LANES);
    });
}

// Those of `count` units from `unit` on, `num` groups from `group` on; others are 0.
template <int32_t FORMAT>
void decode_strip(const Matrix& m, const uint8_t* base, int64_t unit, int64_t count,
                  int64_t group, int64_t num, float* out) {
    if constexpr (FORMAT != MXFP4)
        if (count == LANES && !m.meta_group_size)
            return num == STRIP ? decode_plain_strip<FORMAT, true>(m, base, unit, group, num, out)
                                : decode_plain_strip<FORMAT, false>(m, base, unit, group, num, out);
    const int64_t units = num_units(m), groups = num_groups(m);
    alignas(64) float scales[LANES][STRIP], zeros[LANES][STRIP];
    for (int place = 0; place < rows_per_unit(FORMAT); ++place) {
        const float above = too_much<FORMAT>(place);
        memset(scales, 0, sizeof scales);
        memset(zeros, 0, sizeof zeros);
        for (int64_t i = 0; i < count; ++i)
            generic::decode_groups(
                m, base, (unit + i + row_of_place<FORMAT>(place) * units) * groups + group, num,
                scales[i], zeros[i]);
        float* to = out + place * 2 * LANES;
        const float times = FORMAT == MXFP4 ? 0.5f : 1 / above;
        transpose(reinterpret_cast<const uint8_t*>(scales), sizeof *scales,
                  [&](int g, __m512i value) INLINE_LAMBDA {
                      const __m512 scale =
                          _mm512_mul_ps(_mm512_castsi512_ps(value), _mm512_set1_ps(times));
                      _mm512_store_ps(to + g * floats_per_group<FORMAT>, scale);
                  });
        transpose(reinterpret_cast<const uint8_t*>(zeros), sizeof *zeros,
                  [&](int g, __m512i value) INLINE_LAMBDA {
                      __m512 zero =
                          _mm512_mul_ps(_mm512_castsi512_ps(value), _mm512_set1_ps(above));
                      if (FORMAT == MXFP4) zero = _mm512_set1_ps(E2M1_ZERO);
                      _mm512_store_ps(to + g * floats_per_group<FORMAT> + LANES, zero);
                  });
    }
}

} // namespace
