// Weights for products with several rows of activations: lanes are units, so that what is done for
// a register of weights is done once for 64 columns of 16 units.
//
// A tile is 16 units by 64 columns. Its register k has in lane i columns 4k to 4k + 3 of unit i, a
// byte each. A byte holds a field of one row of the unit, or one of two: the lower in its low four
// bits, the other above it, which is found as the difference of byte and low bits. Of e2m1, whose
// values take more than four bits, the two rows have registers of their own.
#pragma once

#include "bf16_words.h"

namespace {

constexpr int64_t LANES = 16; // units of a tile

// Where the fields of a tile are.
enum Fields { WHOLE_BYTE, NIBBLES, TWO_BYTES };

constexpr Fields fields_of(int32_t format) {
    return format == HQQ8 ? WHOLE_BYTE : is_e2m1(format) ? TWO_BYTES : NIBBLES;
}

constexpr int num_fields(Fields fields) { return fields == WHOLE_BYTE ? 1 : 2; }
constexpr int num_fields(int32_t format) { return num_fields(fields_of(format)); }

constexpr int tiles_per_vector(int32_t format) {
    return format == HQQ3 ? 4 : format == HQQ2 ? 2 : 1;
}

// Of 16 registers each.
constexpr int registers_per_vector(int32_t format) {
    return 16 * (is_e2m1(format) ? 2 : tiles_per_vector(format));
}

// Which row of its unit a tile's field is; field 0 is the upper one.
constexpr int row_of_field(int32_t format, int tile, int field) {
    if (format == HQQ3) return tile % 2 * 2 + tile / 2 + 4 * field;
    if (format == HQQ2) return tile + 2 * field;
    return field;
}

// Of e2m1 a tile has twice the values, from 0 to 24: zero is 12.
constexpr float E2M1_ZERO = 12;

INLINE __m512i load_pair(const uint8_t* lower, const uint8_t* upper) {
    __m512i value =
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lower)));
    // By assembly, since the compiler would load the upper half into a register first.
    asm("vinserti64x4 $1, %1, %0, %0"
        : "+v"(value)
        : "m"(*reinterpret_cast<const __m256i*>(upper)));
    return value;
}

// The first steps of half a transposition: of pairs[j] and pairs[4 + j] the even quarters are word j
// of the 16 rows, the odd ones word 4 + j.
template <class Load> INLINE void transpose_pairs(const Load& load, __m512i* pairs) {
    each<2>([&](auto b) INLINE_LAMBDA {
        const __m512i a0 = load(b * 8), a1 = load(b * 8 + 1);
        const __m512i a2 = load(b * 8 + 2), a3 = load(b * 8 + 3);
        const __m512i t0 = _mm512_unpacklo_epi32(a0, a1), t1 = _mm512_unpackhi_epi32(a0, a1);
        const __m512i t2 = _mm512_unpacklo_epi32(a2, a3), t3 = _mm512_unpackhi_epi32(a2, a3);
        pairs[b * 4 + 0] = _mm512_unpacklo_epi64(t0, t2);
        pairs[b * 4 + 1] = _mm512_unpackhi_epi64(t0, t2);
        pairs[b * 4 + 2] = _mm512_unpacklo_epi64(t1, t3);
        pairs[b * 4 + 3] = _mm512_unpackhi_epi64(t1, t3);
    });
}

// Half of a transposition of 16 rows of 16 double words: store(j, register) for j in 0 ... 7, the
// register has in lane i word j of row i. load(i) is row i below row i + 4, of both the 32 bytes
// with these words.
template <class Load, class Store>
INLINE void transpose_half(const Load& load, const Store& store) {
    __m512i pairs[8];
    transpose_pairs(load, pairs);
    each<4>([&](auto j) INLINE_LAMBDA {
        store(j, _mm512_shuffle_i32x4(pairs[j], pairs[4 + j], 0x88));
        store(std::integral_constant<int, 4 + j>(),
              _mm512_shuffle_i32x4(pairs[j], pairs[4 + j], 0xdd));
    });
}

// store(k, register) for k in 0 ... 15, of rows `stride` bytes apart.
template <class Store>
INLINE void transpose(const uint8_t* rows, int64_t stride, const Store& store) {
    each<2>([&](auto half) INLINE_LAMBDA {
        const uint8_t* from = rows + half * 32;
        transpose_half(
            [&](int i) INLINE_LAMBDA {
                return load_pair(from + i * stride, from + (i + 4) * stride);
            },
            [&](auto j, __m512i value) INLINE_LAMBDA { store(half * 8 + j, value); });
    });
}

// Twice the values of each byte's low four bits, plus 12.
INLINE __m512i doubled_e2m1(__m512i bytes) {
    const __m512i table = _mm512_broadcast_i32x4(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
#if defined(__AVX512VBMI__) // which looks at the lowest six bits; the table has all values four times
    return _mm512_permutexvar_epi8(bytes, table);
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, _mm512_set1_epi8(0x0f)));
#endif
}

// The tiles of 16 units, 64 columns of them: tile t, or the second row of e2m1, begins at
// tiles + t * apart. A unit's bytes are `stride` apart from the next one's.
template <int32_t FORMAT>
INLINE void make_tiles(const Places& from, int64_t stride, __m512i* tiles, int64_t apart) {
    const __m512i pairs = _mm512_set1_epi8(0x33);
    transpose(from.low, stride, [&](int k, __m512i value) INLINE_LAMBDA {
        if constexpr (is_e2m1(FORMAT)) {
            tiles[k] = doubled_e2m1(_mm512_srli_epi16(value, 4));
            tiles[apart + k] = doubled_e2m1(value);
        } else if constexpr (FORMAT == HQQ2) {
            tiles[k] = _mm512_and_si512(_mm512_srli_epi16(value, 2), pairs);
            tiles[apart + k] = _mm512_and_si512(value, pairs);
        } else tiles[k] = value;
    });
    if constexpr (FORMAT == HQQ3) {
        transpose(from.below, stride,
                  [&](int k, __m512i value) INLINE_LAMBDA { tiles[apart + k] = value; });
        transpose(from.high, stride,
                  [&](int k, __m512i value) INLINE_LAMBDA { tiles[2 * apart + k] = value; });
        const __m512i fields = _mm512_set1_epi8(0x77);
        for (int k = 0; k < 16; ++k) {
            const __m512i low = tiles[k], below = tiles[apart + k], high = tiles[2 * apart + k];
            const auto store = [&](int t, __m512i value) INLINE_LAMBDA {
                tiles[t * apart + k] = _mm512_and_si512(value, fields);
            };
            store(0, merge(right<2>(low), right<1>(high)));
            store(1, merge(low, left<1>(high)));
            store(2, merge(right<2>(below), high));
            store(3, merge(below, left<2>(high)));
        }
    }
}

} // namespace
