// Scales and zeros for products of tiles (avx2_tiles.h): lanes are units.
#pragma once

#include "avx2_tiles.h"

namespace {

constexpr int64_t STRIP = 16; // groups whose scales are decoded at a time

// Scales of a strip: [group][tile][scale, zero][unit].
template <int32_t FORMAT>
constexpr int64_t floats_per_group = rows_per_unit(FORMAT) * 2 * LANES;

// Nothing is kept from strip to strip.
template <int32_t FORMAT> struct StripMetas {};

// store(g, register) for g in 0 ... 7 of 16 rows of words, `stride` bytes apart: word i of the
// register is word g of row i.
template <class Store>
INLINE void transpose_words(const uint8_t* rows, int64_t stride, const Store& store) {
    __m256i row[8], pairs[8], fours[8];
    each<8>([&](auto i) INLINE_LAMBDA {
        row[i] = load_pair(rows + i * stride, rows + (i + 8) * stride);
    });
    each<4>([&](auto i) INLINE_LAMBDA {
        pairs[i] = _mm256_unpacklo_epi16(row[2 * i], row[2 * i + 1]);
        pairs[4 + i] = _mm256_unpackhi_epi16(row[2 * i], row[2 * i + 1]);
    });
    // Of rows 0 to 3 and 4 to 7: double words are of two rows, and now there are two of them.
    each<4>([&](auto i) INLINE_LAMBDA {
        constexpr int from = i / 2 * 4 + i % 2 * 2;
        fours[i * 2] = _mm256_unpacklo_epi32(pairs[from], pairs[from + 1]);
        fours[i * 2 + 1] = _mm256_unpackhi_epi32(pairs[from], pairs[from + 1]);
    });
    each<4>([&](auto i) INLINE_LAMBDA {
        constexpr int from = i / 2 * 4 + i % 2;
        store(i * 2, _mm256_unpacklo_epi64(fours[from], fours[from + 2]));
        store(i * 2 + 1, _mm256_unpackhi_epi64(fours[from], fours[from + 2]));
    });
}

// Eight groups' scales or zeros of 16 bits, times `times`, to out + g * floats_per_group.
template <int32_t FORMAT>
INLINE void decode_halves(const uint8_t* rows, int64_t stride, bool bfloat, float* out) {
    transpose_words(rows, stride, [&](int g, __m256i words) INLINE_LAMBDA {
        const __m128i lower = _mm256_castsi256_si128(words);
        const __m128i upper = _mm256_extracti128_si256(words, 1);
        const auto widened = [&](__m128i eight) INLINE_LAMBDA {
            if (!bfloat) return _mm256_cvtph_ps(eight);
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
        };
        float* const to = out + g * floats_per_group<FORMAT>;
        _mm256_store_ps(to, widened(lower));
        _mm256_store_ps(to + 8, widened(upper));
    });
}

// Those of `num` groups from `group` on of one row of each of `count` units.
template <int32_t FORMAT>
void decode_row_of_units(const Matrix& m, const uint8_t* base, int64_t at, int64_t count,
                         int64_t num, float* out) {
    const int64_t groups = num_groups(m);
    if (FORMAT != MXFP4 && !m.meta_group_size) {
        const auto decode = [&](int64_t from, bool bfloat, float* to) INLINE_LAMBDA {
            const uint8_t* rows = base + from + at * 2;
            int64_t stride = groups * 2;
            alignas(32) uint8_t padded[LANES][STRIP * 2];
            if (count < LANES || num < STRIP) {
                memset(padded, 0, sizeof padded);
                for (int64_t i = 0; i < count; ++i) memcpy(padded[i], rows + i * stride, num * 2);
                rows = padded[0], stride = sizeof padded[0];
            }
            decode_halves<FORMAT>(rows, stride, bfloat, to);
            decode_halves<FORMAT>(rows + 16, stride, bfloat, to + 8 * floats_per_group<FORMAT>);
        };
        decode(m.scale, m.scale_format == BF16, out);
        return decode(m.zero, false, out + LANES);
    }
    alignas(32) float scales[LANES][STRIP], zeros[LANES][STRIP];
    for (int64_t i = 0; i < count; ++i)
        generic::decode_groups(m, base, at + i * groups, num, scales[i], zeros[i]);
    for (int64_t g = 0; g < STRIP; ++g)
        for (int64_t i = 0; i < LANES; ++i) {
            float* const to = out + g * floats_per_group<FORMAT>;
            const bool there = i < count && g < num;
            to[i] = !there ? 0 : FORMAT == MXFP4 ? scales[i][g] * 0.5f : scales[i][g];
            to[LANES + i] = !there ? 0 : FORMAT == MXFP4 ? E2M1_ZERO : zeros[i][g];
        }
}

// Those of `count` units from `unit` on, `num` groups from `group` on; others are 0.
template <int32_t FORMAT>
void decode_strip(const Matrix& m, const uint8_t* base, int64_t unit, int64_t count, int64_t group,
                  int64_t num, StripMetas<FORMAT>&, float* out) {
    const int64_t units = num_units(m), groups = num_groups(m);
    for (int row = 0; row < rows_per_unit(FORMAT); ++row)
        decode_row_of_units<FORMAT>(m, base, (unit + row * units) * groups + group, count, num,
                                    out + row * 2 * LANES);
}

} // namespace
