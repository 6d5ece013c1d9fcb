// e4m3 weights times bfloat16 activations where the processor multiplies them: two tables make
// bfloat16s of 64 bytes, exactly.
#pragma once

#include <immintrin.h>

#include "e4m3_rows.h"
#include "plain_bf16.h"

namespace {
namespace plain {

// The halves of the bfloat16s that codes without a sign stand for.
struct E4m3Halves {
    uint8_t high[128], low[128];

    constexpr E4m3Halves() : high(), low() {
        for (int code = 0; code < 128; ++code) {
            int exponent = code >> 3, mantissa = code & 7, bits = 0;
            if (code == 0x7f) bits = 0x7fc0;
            else if (exponent || mantissa) {
                if (!exponent) exponent = 1;
                else mantissa += 8;
                while (mantissa < 8) {
                    mantissa *= 2;
                    --exponent;
                }
                bits = (exponent - 7 + 127) << 7 | (mantissa & 7) << 4;
            }
            high[code] = static_cast<uint8_t>(bits >> 8);
            low[code] = static_cast<uint8_t>(bits & 255);
        }
    }
};

alignas(64) constexpr E4m3Halves E4M3_HALVES;

struct E4m3ByPairs {
    static constexpr int COLUMNS = 64, ROW_BYTES = 2;
    static constexpr bool TWO_SCALES = true; // of columns 0 to 31, and the others
    using Sum = __m512;
    using Scale = __m512;

    // Columns 16 i to 16 i + 7 and 16 i + 8 to 16 i + 15, i being the quarter of a register.
    struct Weights {
        __m512i first, second;
    };

    static INLINE __m512 scale(float low, float high) {
        return _mm512_mask_mov_ps(_mm512_set1_ps(low), 0xff00, _mm512_set1_ps(high));
    }

    static INLINE __m512i look_up(const uint8_t* table, __m512i codes) {
        return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes,
                                        _mm512_load_si512(table + 64));
    }

    static INLINE Weights weights(const uint8_t* from, __m512) {
        const __m512i codes = _mm512_loadu_si512(from);
        const __m512i low = look_up(E4M3_HALVES.low, codes);
        // The sign of the code, or the table's bits.
        const __m512i high = _mm512_ternarylogic_epi32(
            look_up(E4M3_HALVES.high, codes), codes, _mm512_set1_epi8(-0x80), 0xf8);
        return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
    }

    static INLINE void add(__m512& sum, const Weights& weights, __m512 scale, const uint8_t* row) {
        __m512 products = _mm512_setzero_ps();
        // By assembly, since GCC 12 would copy the sum to another register and back.
        asm("vdpbf16ps %2, %1, %0"
            : "+v"(products)
            : "v"(weights.first), "m"(*reinterpret_cast<const __m512i*>(row)));
        asm("vdpbf16ps %2, %1, %0"
            : "+v"(products)
            : "v"(weights.second), "m"(*reinterpret_cast<const __m512i*>(row + 64)));
        sum = _mm512_fmadd_ps(products, scale, sum);
    }

    static INLINE void finish(const __m512* sums, float* results) {
        ByPairs::finish(sums, results);
    }
};

} // namespace plain
} // namespace
