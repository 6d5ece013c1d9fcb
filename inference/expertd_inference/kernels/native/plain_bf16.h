// bfloat16 weights times bfloat16 activations where the processor multiplies them: a lane has
// pairs of columns.
#pragma once

#include <immintrin.h>

#include "plain_rows.h"

namespace {
namespace plain {

struct ByPairs {
    static constexpr int COLUMNS = 32, WEIGHT_BYTES = 2, ROW_BYTES = 2;
    using Sum = __m512;
    using Vector = __m512i;

    static INLINE __m512i weights(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static INLINE __m512i row(const uint8_t* from) { return _mm512_loadu_si512(from); }

    // By assembly, since GCC 12 would copy the sum to another register and back.
    static INLINE void add(__m512& sum, __m512i weights, __m512i row) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(row));
    }

    static INLINE __m512 add_pairs(__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }

    // In each four lanes of the result one for each of the sums; these four are added in halves.
    static INLINE void finish(const __m512* sums, float* results) {
        static_assert(AT_ONCE == 4);
        const __m512d first = _mm512_castps_pd(add_pairs(sums[0], sums[1]));
        const __m512d second = _mm512_castps_pd(add_pairs(sums[2], sums[3]));
        const __m512 fours = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                                           _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
        const __m256 eight =
            _mm256_add_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps(fours, 1));
        _mm_storeu_ps(results, _mm_add_ps(_mm256_castps256_ps128(eight),
                                          _mm256_extractf128_ps(eight, 1)));
    }
};

} // namespace plain
} // namespace
