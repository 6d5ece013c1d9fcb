// Attention to bfloat16 keys and values on processors that multiply bfloat16.
//
// Scores are sums of vdpbf16ps, whose lanes are tokens: a word of keys is a pair of columns. So are
// results, whose lanes are columns and whose words are two tokens: powers are rounded to bfloat16,
// and a query's total is the sum of the rounded ones. docs/kernels.md says what float32 would cost.
// Either way a block is read, and a later one asked for, line after line.
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

    // Adds to Q pairs of registers the products of a line of 32 words with a word of each query,
    // and asks for a line of a later block.
    template <int Q>
    static TILE_INLINE void add_line(__m512 (&sums)[Q][2], __m512i low, __m512i high,
                                     const uint16_t* const* factors, int64_t at,
                                     const uint8_t* ahead) {
        ask_for(ahead);
        ask_for(ahead + 64);
        for (int q = 0; q < Q; ++q) {
            const __m512i x = pair(factors[q] + at);
            sums[q][0] = add_products(sums[q][0], x, low);
            sums[q][1] = add_products(sums[q][1], x, high);
        }
    }

    template <int Q>
    void dots(int64_t block, int64_t first, int64_t tokens, float* scores,
              const uint8_t* ahead) const {
        const uint16_t* queries[Q];
        for (int q = 0; q < Q; ++q) queries[q] = view.query<uint16_t>(first + q);
        const int64_t words = c.key_width / 2;
        const uint8_t* line = key_block(block);
        for (int64_t token = 0; token < tokens; token += KEY_TOKENS) {
            __m512 sums[Q][2];
            for (int q = 0; q < Q; ++q) sums[q][0] = sums[q][1] = _mm512_setzero_ps();
            for (int64_t word = 0; word < words; ++word, line += 128, ahead += 128)
                add_line<Q>(sums, _mm512_load_si512(line), _mm512_load_si512(line + 64), queries,
                            2 * word, ahead);
            for (int q = 0; q < Q; ++q) {
                _mm512_storeu_ps(scores + q * SCORE_STRIDE + token, sums[q][0]);
                _mm512_storeu_ps(scores + q * SCORE_STRIDE + token + 16, sums[q][1]);
            }
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

    // Adds to 32 columns, or those of the mask, the values of tokens [from, to), two at a time.
    template <int Q, bool MASKED>
    TILE_INLINE void mix_columns(const uint8_t* lines, int64_t line_bytes, __mmask32 mask,
                                 int64_t from, int64_t to, const Power* powers, float* sums,
                                 const uint8_t* ahead) const {
        const int64_t width = padded_width(c.value_width);
        const Power* factors[Q];
        for (int q = 0; q < Q; ++q) factors[q] = powers + q * 2 * SCORE_STRIDE;
        __m512 mixed[Q][2];
        for (int q = 0; q < Q; ++q)
            for (int half = 0; half < 2; ++half)
                mixed[q][half] = _mm512_loadu_ps(sums + q * width + 16 * half);
        // Of a word, `seen` is what may be read.
        const auto add = [&](int64_t token, int32_t seen) INLINE_LAMBDA {
            const uint8_t* line = lines + token / 2 * line_bytes;
            const auto half = [&](int i) INLINE_LAMBDA {
                const auto there = static_cast<__mmask16>(mask >> 16 * i);
                const __m512i words = MASKED ? _mm512_maskz_loadu_epi32(there, line + 64 * i)
                                             : _mm512_loadu_si512(line + 64 * i);
                return _mm512_and_si512(words, _mm512_set1_epi32(seen));
            };
            add_line<Q>(mixed, half(0), half(1), factors, token, ahead + token * 64);
        };
        // What no query sees may be anything: it is not read.
        int64_t token = from / 2 * 2;
        if (from % 2) add(token, static_cast<int32_t>(0xffff0000)), token += 2;
        for (; token + 1 < to; token += 2) add(token, -1);
        if (token < to) add(token, 0xffff);
        for (int q = 0; q < Q; ++q)
            for (int half = 0; half < 2; ++half)
                _mm512_storeu_ps(sums + q * width + 16 * half, mixed[q][half]);
    }

    template <int Q>
    void mix(int64_t block, int64_t from, int64_t to, const Power* powers, float* sums,
             const uint8_t* ahead) const {
        const int64_t columns = value_columns(c.value_width), line_bytes = 4 * columns;
        for (int64_t column = 0; column < c.value_width; column += 32) {
            const uint8_t* lines = value_block(block) +
                                   column / columns * (BLOCK_TOKENS / 2) * line_bytes +
                                   column % columns * 4;
            const uint8_t* later = ahead + column * 2 * BLOCK_TOKENS;
            if (column + 32 <= c.value_width)
                mix_columns<Q, false>(lines, line_bytes, 0, from, to, powers, sums + column, later);
            else
                mix_columns<Q, true>(lines, line_bytes, mask_of(column), from, to, powers,
                                     sums + column, later);
        }
    }

    // Which of 32 columns there are.
    __mmask32 mask_of(int64_t column) const {
        const int64_t left = std::min<int64_t>(32, c.value_width - column);
        return static_cast<__mmask32>((uint64_t{1} << left) - 1);
    }

    void write(int64_t query, float* sums, float factor) const {
        auto* out = static_cast<uint16_t*>(c.out) + view.out(query);
        for (int64_t column = 0; column < c.value_width; column += 32) {
            const auto scaled = [&](int64_t i) {
                // -0 becomes 0: see attend()
                return (__m512)(load(sums + column + i) * factor + 0.0f);
            };
            const auto both = (__m512i)_mm512_cvtne2ps_pbh(scaled(16), scaled(0));
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
