// Attention to bfloat16 keys and values on processors that multiply bfloat16.
//
// Scores are sums of vdpbf16ps, whose lanes are tokens: the keys of a block are transposed in
// pairs of columns. Powers stay float32, and values become it: a register of 32 is two, of the even
// columns by a shift, of the odd ones by a mask. Of sums, too, those come apart; see write().
#pragma once

#include <immintrin.h>

#include "attention_tile.h"

namespace {
namespace tile {

struct Bf16 : Generic {
    static constexpr int AT_ONCE = 8;

    using Generic::Generic;

    void load_queries() const {}

    // Some lines of a later block each time, into the second cache.
    template <int LINES> static TILE_INLINE void ask_for(Ahead& ahead) {
        for (int i = 0; i < LINES; ++i) __builtin_prefetch(ahead.next + 64 * i, 0, 2);
        ahead.next += 64 * LINES;
    }

    // Sixteen rows of as many words, of which `mask` are there, `stride` bytes apart: word k of row
    // i becomes lane i of row k. Half rows are put together as they are loaded, which saves a
    // quarter of the shuffles.
    static TILE_INLINE void transpose(const uint8_t* from, int64_t stride, __mmask16 mask,
                                      uint32_t* to, int64_t words) {
        const auto half = [&](int64_t row, int part) {
            return _mm256_maskz_loadu_epi32(static_cast<__mmask8>(mask >> 8 * part),
                                            from + row * stride + 32 * part);
        };
        for (int part = 0; part < 2; ++part) {
            __m512i quarters[2][4]; // [which 4 words][row], of rows row, row + 4, + 8, + 12
            for (int row = 0; row < 4; ++row) {
                const auto two = [&](int64_t first) {
                    return _mm512_inserti64x4(_mm512_castsi256_si512(half(first, part)),
                                              half(first + 4, part), 1);
                };
                const __m512i x = two(row), y = two(row + 8);
                quarters[0][row] = _mm512_shuffle_i32x4(x, y, 0x88);
                quarters[1][row] = _mm512_shuffle_i32x4(x, y, 0xdd);
            }
            for (int quarter = 0; quarter < 2; ++quarter) {
                const __m512i* r = quarters[quarter];
                const int64_t word = 8 * part + 4 * quarter;
                if (word >= words) return;
                const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]);
                const __m512i b = _mm512_unpacklo_epi32(r[2], r[3]);
                const __m512i c = _mm512_unpackhi_epi32(r[0], r[1]);
                const __m512i d = _mm512_unpackhi_epi32(r[2], r[3]);
                uint32_t* out = to + word * BLOCK_TOKENS;
                _mm512_store_si512(out, _mm512_unpacklo_epi64(a, b));
                _mm512_store_si512(out + BLOCK_TOKENS, _mm512_unpackhi_epi64(a, b));
                _mm512_store_si512(out + 2 * BLOCK_TOKENS, _mm512_unpacklo_epi64(c, d));
                _mm512_store_si512(out + 3 * BLOCK_TOKENS, _mm512_unpackhi_epi64(c, d));
            }
        }
    }

    // [key_width / 2][BLOCK_TOKENS], of pairs.
    void load_keys(int64_t block, int64_t tokens, Ahead ahead) const {
        const uint8_t* from = key_block(block);
        auto* to = reinterpret_cast<uint32_t*>(scratch.keys);
        const int64_t stride = c.key_width * 2, pairs = c.key_width / 2;
        for (int64_t token = 0; token < tokens; token += 16)
            for (int64_t pair = 0; pair < pairs; pair += 16) {
                const int64_t words = std::min<int64_t>(16, pairs - pair);
                if (ahead.next) ask_for<16>(ahead);
                transpose(from + token * stride + pair * 4, stride,
                          static_cast<__mmask16>((1u << words) - 1),
                          to + pair * BLOCK_TOKENS + token, words);
            }
    }

    void load_values(int64_t, int64_t) const {}

    // By assembly: g++ 12 spills sums of the intrinsic.
    static TILE_INLINE __m512 add_products(__m512 sum, __m512i x, __m512i y) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
        return sum;
    }

    template <int Q, int VECTORS, bool AHEAD>
    TILE_INLINE void dots_with(const uint16_t* const* queries, int64_t token, float* scores,
                               Ahead& ahead) const {
        const uint32_t* keys = reinterpret_cast<const uint32_t*>(scratch.keys) + token;
        __m512 sums[Q][VECTORS];
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < VECTORS; ++v) sums[q][v] = _mm512_setzero_ps();
        for (int64_t pair = 0, pairs = c.key_width / 2; pair < pairs; ++pair) {
            if (AHEAD) ask_for<VECTORS>(ahead);
            __m512i key[VECTORS];
            for (int v = 0; v < VECTORS; ++v)
                key[v] = _mm512_load_si512(keys + pair * BLOCK_TOKENS + 16 * v);
            for (int q = 0; q < Q; ++q) {
                int32_t two;
                memcpy(&two, queries[q] + 2 * pair, 4);
                const __m512i x = _mm512_set1_epi32(two);
                for (int v = 0; v < VECTORS; ++v) sums[q][v] = add_products(sums[q][v], x, key[v]);
            }
        }
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < VECTORS; ++v)
                _mm512_storeu_ps(scores + q * SCORE_STRIDE + token + 16 * v, sums[q][v]);
    }

    template <int Q>
    void dots(int64_t first, int64_t tokens, float* scores, Ahead ahead) const {
        constexpr int VECTORS = Q > 4 ? 2 : 4;
        const uint16_t* queries[Q];
        for (int q = 0; q < Q; ++q) queries[q] = view.query<uint16_t>(first + q);
        for (int64_t token = 0; token < tokens; token += 16 * VECTORS) {
            if (ahead.next) dots_with<Q, VECTORS, true>(queries, token, scores, ahead);
            else dots_with<Q, VECTORS, false>(queries, token, scores, ahead);
        }
    }

    // Pairs of columns [column, column + 16 * VECTORS * 2), of which `mask` are there in the last.
    template <int Q, int VECTORS, bool AHEAD>
    TILE_INLINE void mix_columns(const uint8_t* values, int64_t column, __mmask16 mask,
                                 int64_t from, int64_t to, const float* powers, float* sums,
                                 Ahead& ahead) const {
        const int64_t width = padded_width(c.value_width), stride = c.value_width * 2;
        const __m512i high = _mm512_set1_epi32(-0x10000);
        __m512 even[Q][VECTORS], odd[Q][VECTORS];
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < VECTORS; ++v) {
                even[q][v] = _mm512_loadu_ps(sums + q * width + column + 32 * v);
                odd[q][v] = _mm512_loadu_ps(sums + q * width + column + 32 * v + 16);
            }
        for (int64_t token = from; token < to; ++token) {
            if (AHEAD) ask_for<VECTORS>(ahead);
            const uint8_t* row = values + token * stride + column * 2;
            __m512 left[VECTORS], right[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                const __m512i pairs = v + 1 < VECTORS ? _mm512_loadu_si512(row + 64 * v)
                                                      : _mm512_maskz_loadu_epi32(mask, row + 64 * v);
                left[v] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
                right[v] = _mm512_castsi512_ps(_mm512_and_si512(pairs, high));
            }
            for (int q = 0; q < Q; ++q) {
                const __m512 power = _mm512_set1_ps(powers[q * SCORE_STRIDE + token]);
                for (int v = 0; v < VECTORS; ++v) {
                    even[q][v] = _mm512_fmadd_ps(left[v], power, even[q][v]);
                    odd[q][v] = _mm512_fmadd_ps(right[v], power, odd[q][v]);
                }
            }
        }
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < VECTORS; ++v) {
                _mm512_storeu_ps(sums + q * width + column + 32 * v, even[q][v]);
                _mm512_storeu_ps(sums + q * width + column + 32 * v + 16, odd[q][v]);
            }
    }

    template <int Q, int VECTORS>
    TILE_INLINE int64_t mix_many(const uint8_t* values, int64_t column, int64_t from, int64_t to,
                                 const float* powers, float* sums, Ahead& ahead) const {
        for (; column + 32 * (VECTORS - 1) < c.value_width; column += 32 * VECTORS) {
            const int64_t last = std::min<int64_t>(32, c.value_width - column - 32 * (VECTORS - 1));
            const auto mask = static_cast<__mmask16>((1u << last / 2) - 1);
            if (ahead.next)
                mix_columns<Q, VECTORS, true>(values, column, mask, from, to, powers, sums, ahead);
            else
                mix_columns<Q, VECTORS, false>(values, column, mask, from, to, powers, sums,
                                               ahead);
        }
        return column;
    }

    template <int Q>
    void mix(int64_t block, int64_t from, int64_t to, const float* powers, float* sums,
             Ahead ahead) const {
        constexpr int VECTORS = Q > 4 ? 1 : Q > 2 ? 2 : 4;
        const uint8_t* values = value_block(block);
        const int64_t column = mix_many<Q, VECTORS>(values, 0, from, to, powers, sums, ahead);
        if (VECTORS > 1) mix_many<Q, 1>(values, column, from, to, powers, sums, ahead);
    }

    // Of the padded columns' sums come even ones and odd ones, sixteen each.
    void write(int64_t query, float* sums, float factor) const {
        auto* out = static_cast<uint16_t*>(c.out) + view.out(query);
        for (int64_t column = 0; column < c.value_width; column += 32) {
            float values[32];
            for (int i = 0; i < 16; ++i) {
                values[2 * i] = sums[column + i] * factor + 0.0f; // -0 becomes 0: see attend()
                values[2 * i + 1] = sums[column + 16 + i] * factor + 0.0f;
            }
            narrow(values, std::min<int64_t>(32, c.value_width - column), BF16, out + column);
        }
    }
};

void attend_bf16(const AttentionTile& t) {
    if (t.call->type == BF16) attend<Bf16>(t);
    else attend<Generic>(t);
}

void fold_bf16(const AttentionTile& t) {
    if (t.call->type == BF16) fold_partials<Bf16>(t);
    else fold_partials<Generic>(t);
}

} // namespace tile
} // namespace
