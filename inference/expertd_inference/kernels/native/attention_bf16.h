// Attention to bfloat16 keys and values on processors that multiply bfloat16.
//
// Scores are sums of vdpbf16ps, whose lanes are tokens: a word of keys is a pair of columns. So are
// results, whose lanes are columns and whose pairs are two tokens: powers are rounded to bfloat16,
// and a query's total is the sum of the rounded ones. docs/kernels.md says what float32 would cost.
#pragma once

#include "unroll.h" // before the intrinsics: see there

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
                key[g] = _mm512_load_si512(keys + (g * words + word) * 64);
                ask_for(ahead + (g * words + word) * 64);
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

    // Adds to VECTORS times 32 columns the values of tokens [from, to), two at a time. A later
    // block is asked for line by line, so that the processor sees a stream of its own.
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
        const auto add = [&](int64_t token, bool first, bool second) INLINE_LAMBDA {
            __m512i left[VECTORS], right[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                const __m512i one = first ? row_of(token, v) : _mm512_setzero_si512();
                const __m512i other = second ? row_of(token + 1, v) : _mm512_setzero_si512();
                left[v] = _mm512_unpacklo_epi16(one, other);
                right[v] = _mm512_unpackhi_epi16(one, other);
                ask_for(ahead + (token * VECTORS + 2 * v) * 64);
                ask_for(ahead + (token * VECTORS + 2 * v + 1) * 64);
            }
            for (int q = 0; q < Q; ++q) {
                const __m512i two = pair(powers + q * 2 * SCORE_STRIDE + token);
                for (int v = 0; v < VECTORS; ++v) {
                    low[q][v] = add_products(low[q][v], two, left[v]);
                    high[q][v] = add_products(high[q][v], two, right[v]);
                }
            }
        };
        // What no query sees may be anything: it is not read.
        int64_t token = from;
        if (token % 2) add(token++ - 1, false, true);
        for (; token + 1 < to; token += 2) add(token, true, true);
        if (token < to) add(token, true, false);
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
        const auto ahead_of = [&](int64_t column) { return ahead + column * 2 * BLOCK_TOKENS; };
        int64_t column = 0;
        for (; column + 32 * VECTORS <= c.value_width; column += 32 * VECTORS)
            mix_columns<Q, VECTORS, false>(values + 2 * column, ahead_of(column), 0, from, to,
                                           powers, sums + column);
        for (; column < c.value_width; column += 32)
            mix_columns<Q, 1, true>(values + 2 * column, ahead_of(column), mask_of(column), from,
                                    to, powers, sums + column);
    }

    // Which of 32 columns there are.
    __mmask32 mask_of(int64_t column) const {
        const int64_t left = std::min<int64_t>(32, c.value_width - column);
        return static_cast<__mmask32>((uint64_t{1} << left) - 1);
    }

    // Sums come sixteen of each eight columns' first four, then sixteen of the others.
    void write(int64_t query, float* sums, float factor) const {
        auto* out = static_cast<uint16_t*>(c.out) + view.out(query);
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22,
                                                23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (int64_t column = 0; column < c.value_width; column += 32) {
            const auto scaled = [&](int64_t i) {
                // -0 becomes 0: see attend()
                return (__m512)(load(sums + column + i) * factor + 0.0f);
            };
            const __m512 low = scaled(0), high = scaled(16);
            const __m512 left = _mm512_permutex2var_ps(low, first, high);
            const __m512 right = _mm512_permutex2var_ps(low, second, high);
            const auto both = (__m512i)_mm512_cvtne2ps_pbh(right, left);
            _mm512_mask_storeu_epi16(out + column, mask_of(column), both);
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
