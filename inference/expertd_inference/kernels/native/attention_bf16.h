// Attention to bfloat16 keys and values on processors that multiply bfloat16.
//
// Scores are sums of vdpbf16ps, whose lanes are tokens: a word of keys is a pair of columns. Results
// are sums of it, too, whose lanes are columns and whose pairs are two tokens: so powers are rounded
// to bfloat16, and a query's total is that of the rounded ones. Twice as many products at a time as
// in float32 are what keeps pace with memory: see docs/kernels.md.
#pragma once

#include <immintrin.h>

#include "attention_tile.h"

namespace {
namespace tile {

struct Bf16 : Generic {
    static constexpr int AT_ONCE = 8;
    using Power = uint16_t;

    using Generic::Generic;

    void load_queries() const {}
    void load_keys(int64_t, int64_t) const {}
    void load_values(int64_t, int64_t) const {}

    // By assembly: g++ 12 spills sums of the intrinsic.
    static TILE_INLINE __m512 add_products(__m512 sum, __m512i x, __m512i y) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
        return sum;
    }

    static TILE_INLINE __m512i pair(const uint16_t* from) {
        int32_t two;
        memcpy(&two, from, sizeof two);
        return _mm512_set1_epi32(two);
    }

    // Scores of Q queries with the tokens of GROUPS groups of keys.
    template <int Q, int GROUPS>
    TILE_INLINE void dots_with(const uint16_t* const* queries, const uint8_t* keys,
                               const uint8_t* ahead, float* scores) const {
        const int64_t words = c.key_width / 2;
        __m512 sums[Q][GROUPS];
        for (int q = 0; q < Q; ++q)
            for (int g = 0; g < GROUPS; ++g) sums[q][g] = _mm512_setzero_ps();
        for (int64_t word = 0; word < words; ++word) {
            __m512i key[GROUPS];
            for (int g = 0; g < GROUPS; ++g) {
                const int64_t place = (g * words + word) * 64;
                key[g] = _mm512_load_si512(keys + place);
                ask_for(ahead + place);
            }
            for (int q = 0; q < Q; ++q) {
                const __m512i x = pair(queries[q] + 2 * word);
                for (int g = 0; g < GROUPS; ++g) sums[q][g] = add_products(sums[q][g], x, key[g]);
            }
        }
        for (int q = 0; q < Q; ++q)
            for (int g = 0; g < GROUPS; ++g)
                _mm512_storeu_ps(scores + q * SCORE_STRIDE + 16 * g, sums[q][g]);
    }

    template <int Q>
    void dots(int64_t block, int64_t first, int64_t tokens, float* scores,
              const uint8_t* ahead) const {
        constexpr int GROUPS = Q > 4 ? 2 : 4;
        const uint16_t* queries[Q];
        for (int q = 0; q < Q; ++q) queries[q] = view.query<uint16_t>(first + q);
        const uint8_t* keys = key_block(block);
        for (int64_t token = 0; token < tokens; token += KEY_TOKENS * GROUPS) {
            const int64_t place = token * c.key_width * 2;
            dots_with<Q, GROUPS>(queries, keys + place, ahead + place, scores + token);
        }
    }

    // Of scores their powers, in the same place; their sum.
    static TILE_INLINE float raise(float* scores, int64_t count, float base) {
        const __m512i ones = _mm512_set1_epi32(0x3f803f80);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += 32) {
            const Lanes low = power(load(scores + i) - base);
            const Lanes high = power(load(scores + i + 16) - base);
            const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
            _mm512_storeu_si512(reinterpret_cast<Power*>(scores) + i, both);
            sum = add_products(sum, both, ones);
        }
        return sum_of((Lanes)sum);
    }

    // Adds to VECTORS vectors of columns the values of tokens [from, to), two at a time.
    template <int Q, int VECTORS, bool MASKED>
    TILE_INLINE void mix_columns(const uint8_t* values, const uint8_t* ahead, __mmask32 mask,
                                 int64_t from, int64_t to, const Power* powers,
                                 float* sums) const {
        const int64_t width = padded_width(c.value_width), stride = c.value_width * 2;
        __m512 low[Q][VECTORS], high[Q][VECTORS]; // of each eight columns four
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < VECTORS; ++v) {
                low[q][v] = _mm512_loadu_ps(sums + q * width + 32 * v);
                high[q][v] = _mm512_loadu_ps(sums + q * width + 32 * v + 16);
            }
        const auto row_of = [&](int64_t token, int v) {
            const uint8_t* row = values + token * stride + 64 * v;
            return MASKED ? _mm512_maskz_loadu_epi16(mask, row) : _mm512_loadu_si512(row);
        };
        const auto add = [&](int64_t token, const auto& second_of) __attribute__((always_inline)) {
            __m512i left[VECTORS], right[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                const __m512i one = row_of(token, v), other = second_of(v);
                left[v] = _mm512_unpacklo_epi16(one, other);
                right[v] = _mm512_unpackhi_epi16(one, other);
                ask_for(ahead + token * stride + 64 * v);
                ask_for(ahead + (token + 1) * stride + 64 * v);
            }
            for (int q = 0; q < Q; ++q) {
                const __m512i two = pair(powers + q * 2 * SCORE_STRIDE + token);
                for (int v = 0; v < VECTORS; ++v) {
                    low[q][v] = add_products(low[q][v], two, left[v]);
                    high[q][v] = add_products(high[q][v], two, right[v]);
                }
            }
        };
        int64_t token = from / 2 * 2;
        for (; token + 1 < to; token += 2)
            add(token, [&](int v) { return row_of(token + 1, v); });
        // What comes after the last token may be anything.
        if (token < to) add(token, [](int) { return _mm512_setzero_si512(); });
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < VECTORS; ++v) {
                _mm512_storeu_ps(sums + q * width + 32 * v, low[q][v]);
                _mm512_storeu_ps(sums + q * width + 32 * v + 16, high[q][v]);
            }
    }

    template <int Q>
    void mix(int64_t block, int64_t from, int64_t to, const Power* powers, float* sums,
             const uint8_t* ahead) const {
        constexpr int VECTORS = Q > 4 ? 1 : Q > 2 ? 2 : 4;
        const uint8_t* values = value_block(block);
        int64_t column = 0;
        for (; column + 32 * VECTORS <= c.value_width; column += 32 * VECTORS)
            mix_columns<Q, VECTORS, false>(values + 2 * column, ahead + 2 * column, 0, from, to,
                                           powers, sums + column);
        for (; column < c.value_width; column += 32) {
            const int64_t left = std::min<int64_t>(32, c.value_width - column);
            const auto mask = static_cast<__mmask32>((uint64_t{1} << left) - 1);
            mix_columns<Q, 1, true>(values + 2 * column, ahead + 2 * column, mask, from, to, powers,
                                    sums + column);
        }
    }

    // Sums come sixteen of each eight columns' first four, then sixteen of the others.
    void write(int64_t query, float* sums, float factor) const {
        auto* out = static_cast<uint16_t*>(c.out) + view.out(query);
        for (int64_t column = 0; column < c.value_width; column += 32) {
            float values[32];
            for (int i = 0; i < 16; ++i) {
                const int place = i / 4 * 8 + i % 4;
                values[place] = sums[column + i] * factor + 0.0f; // -0 becomes 0: see attend()
                values[place + 4] = sums[column + 16 + i] * factor + 0.0f;
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
