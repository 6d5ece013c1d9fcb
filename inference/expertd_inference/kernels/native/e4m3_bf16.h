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

// A step is of so many VECTORS of 64 columns; of one it may have two scales.
template <int VECTORS> struct E4m3ByPairs {
    static constexpr int COLUMNS = 64 * VECTORS, ROW_BYTES = 2;
    static constexpr bool TWO_SCALES = VECTORS == 1; // of columns 0 to 31, and the others
    using Sum = __m512;
    using Scale = __m512;

    // Of each vector columns 16 i to 16 i + 7, i being the quarter of a register, and the others.
    struct Step {
        __m512i of[2 * VECTORS];
    };
    using Row = Step;

    static INLINE __m512 scale(float low, float high) {
        if (VECTORS > 1) return _mm512_set1_ps(low);
        return _mm512_mask_mov_ps(_mm512_set1_ps(low), 0xff00, _mm512_set1_ps(high));
    }

    static INLINE __m512i look_up(const uint8_t* table, __m512i codes) {
        return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes,
                                        _mm512_load_si512(table + 64));
    }

    static INLINE Step weights(const uint8_t* from, __m512) {
        Step step;
        each<VECTORS>([&](auto v) INLINE_LAMBDA {
            __m512i codes = _mm512_loadu_si512(from + v * 64);
            asm("" : "+v"(codes)); // kept in a register: loads are scarce
            const __m512i low = look_up(E4M3_HALVES.low, codes);
            // The sign of the code, or the table's bits.
            const __m512i high = _mm512_ternarylogic_epi32(
                look_up(E4M3_HALVES.high, codes), codes, _mm512_set1_epi8(-0x80), 0xf8);
            step.of[2 * v] = _mm512_unpacklo_epi8(low, high);
            step.of[2 * v + 1] = _mm512_unpackhi_epi8(low, high);
        });
        return step;
    }

    static INLINE Row row(const uint8_t* from) {
        Row row;
        each<2 * VECTORS>([&](auto i) INLINE_LAMBDA {
            row.of[i] = _mm512_loadu_si512(from + i * 64);
        });
        return row;
    }

    // By assembly: GCC 12 would copy a zero, and sums from register to register.
    static INLINE void add(__m512& sum, const Step& weights, __m512 scale, const Row& row) {
        __m512 products;
        asm volatile("vpxord %x0, %x0, %x0" : "=v"(products));
        each<2 * VECTORS>([&](auto i) INLINE_LAMBDA {
            asm("vdpbf16ps %2, %1, %0" : "+v"(products) : "v"(weights.of[i]), "vm"(row.of[i]));
        });
        sum = _mm512_fmadd_ps(products, scale, sum);
    }

    static INLINE void finish(const __m512* sums, float* results) {
        ByPairs::finish(sums, results);
    }
};

} // namespace plain
} // namespace
