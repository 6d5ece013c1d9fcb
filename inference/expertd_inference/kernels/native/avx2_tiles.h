// Weights for products with several rows of activations, without VNNI: what rows_tiles.h is for
// processors that have it.
//
// A tile is 16 units by 64 columns of one row of each unit, an integer in a byte. Its line k has in
// its double word i columns 4k to 4k + 3 of unit i.
#pragma once

#include "fixed_rows.h"

namespace {

constexpr int64_t LANES = 16; // units of a tile

// What a tile's bytes are, by the largest. Of e2m1 they are twice the values, plus 12.
enum Fields : int32_t {
    TWO_BITS = 3,
    THREE_BITS = 7,
    FOUR_BITS = 15,
    DOUBLED_E2M1 = 24,
    EIGHT_BITS = 255
};

constexpr Fields fields_of(int32_t format) {
    return format == HQQ2    ? TWO_BITS
           : format == HQQ3  ? THREE_BITS
           : format == HQQ4  ? FOUR_BITS
           : is_e2m1(format) ? DOUBLED_E2M1
                             : EIGHT_BITS;
}

// A tile has one field, of the row of its unit that it is called by.
constexpr int num_fields(int32_t) { return 1; }
constexpr int tiles_per_vector(int32_t format) { return static_cast<int>(rows_per_unit(format)); }
constexpr int row_of_field(int32_t, int tile, int) { return tile; }

// Of 16 registers each, as rows_tiles.h has them: lines here.
constexpr int registers_per_vector(int32_t format) { return 16 * tiles_per_vector(format); }

constexpr float E2M1_ZERO = 12; // what DOUBLED_E2M1 are too much

// 16 bytes of a row in the lower half, of another in the upper one.
INLINE __m256i load_pair(const uint8_t* lower, const uint8_t* upper) {
    return _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lower))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(upper)), 1);
}

// store(k, register) for k in 0 ... 3: lane i has double word k of row i of 8, `stride` apart.
template <class Store>
INLINE void transpose_8x4(const uint8_t* rows, int64_t stride, const Store& store) {
    __m256i row[4];
    each<4>([&](auto i) INLINE_LAMBDA {
        row[i] = load_pair(rows + i * stride, rows + (i + 4) * stride);
    });
    const __m256i a = _mm256_unpacklo_epi32(row[0], row[1]);
    const __m256i b = _mm256_unpackhi_epi32(row[0], row[1]);
    const __m256i c = _mm256_unpacklo_epi32(row[2], row[3]);
    const __m256i d = _mm256_unpackhi_epi32(row[2], row[3]);
    store(std::integral_constant<int, 0>(), _mm256_unpacklo_epi64(a, c));
    store(std::integral_constant<int, 1>(), _mm256_unpackhi_epi64(a, c));
    store(std::integral_constant<int, 2>(), _mm256_unpacklo_epi64(b, d));
    store(std::integral_constant<int, 3>(), _mm256_unpackhi_epi64(b, d));
}

// Bits of each byte moved, right or left, those of the byte beside it masked out.
template <int RIGHT> INLINE __m256i field(__m256i bytes, int mask) {
    if constexpr (RIGHT > 0) bytes = _mm256_srli_epi16(bytes, RIGHT);
    if constexpr (RIGHT < 0) bytes = _mm256_slli_epi16(bytes, -RIGHT);
    return _mm256_and_si256(bytes, _mm256_set1_epi8(static_cast<char>(mask)));
}

// The integers of row K of 8 units, from their bytes; `low` is that of the row where there are two.
template <int32_t FORMAT, int K> INLINE __m256i integers_of(__m256i low, __m256i high) {
    if constexpr (FORMAT == HQQ4) return field<4 - 4 * K>(low, 0x0f);
    if constexpr (FORMAT == HQQ2) return field<6 - 2 * K>(low, 0x03);
    if constexpr (FORMAT == HQQ3)
        return _mm256_or_si256(field<6 - K / 2 * 2>(low, 0x03), field<5 - K>(high, 0x04));
    if constexpr (is_e2m1(FORMAT)) {
        const __m256i table = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        return _mm256_shuffle_epi8(table, field<4 - 4 * K>(low, 0x0f));
    }
    return low;
}

// The tiles of 16 units, 64 columns of them: tile t begins at tiles + t * apart. A unit's bytes are
// `stride` apart from the next one's.
template <int32_t FORMAT>
INLINE void make_tiles(const Places& from, int64_t stride, Line* tiles, int64_t apart) {
    constexpr int R = tiles_per_vector(FORMAT);
    for (int half = 0; half < 2; ++half)
        for (int four = 0; four < 4; ++four) {
            const int64_t at = half * 8 * stride + four * 16;
            __m256i below[4], high[4];
            if constexpr (FORMAT == HQQ3) {
                transpose_8x4(from.below + at, stride,
                              [&](int k, __m256i value) INLINE_LAMBDA { below[k] = value; });
                transpose_8x4(from.high + at, stride,
                              [&](int k, __m256i value) INLINE_LAMBDA { high[k] = value; });
            }
            transpose_8x4(from.low + at, stride, [&](auto k, __m256i low) INLINE_LAMBDA {
                each<R>([&](auto t) INLINE_LAMBDA {
                    const __m256i own = FORMAT == HQQ3 && t % 2 ? below[k] : low;
                    tiles[t * apart + four * 4 + k].half[half] =
                        integers_of<FORMAT, t>(own, high[k]);
                });
            });
        }
}

} // namespace
