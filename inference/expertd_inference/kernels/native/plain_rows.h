// Plain weights times rows of activations. A block of the product, AT_ONCE rows of the matrix times
// up to MOST_ROWS rows of activations, stays in registers while the columns go by: both are read
// once for it.
//
// A lane adds up its columns in rising order, and at the end the lanes are added in halves. So a
// result's bits depend neither on the number of rows nor on how a matrix is divided.
#pragma once

#include <algorithm>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "unroll.h"
#include "values.h"
#include "variant.h"

namespace {
namespace plain {

#if defined(__AVX512F__)
constexpr int LANES = 16, AT_ONCE = 4, MOST_ROWS = 4;
#else // 16 registers
#if defined(__AVX2__)
constexpr int LANES = 8, AT_ONCE = 2, MOST_ROWS = 4;
#else
constexpr int LANES = 4, AT_ONCE = 2, MOST_ROWS = 4;
#endif
#endif

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// Halves are added until one lane is left.
typedef float Four __attribute__((vector_size(16)));
INLINE float sum_of(const Four& lanes) { return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]); }
#if defined(__AVX2__)
INLINE float sum_of(__m256 lanes) {
    return sum_of((Four)_mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
}
#endif
#if defined(__AVX512F__)
INLINE float sum_of(__m512 lanes) {
    return sum_of(
        _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1)));
}
#endif

// Any weights by float32 activations.
template <int32_t FORMAT> struct ByFloats {
    static constexpr int COLUMNS = LANES; // of a register
    static constexpr int WEIGHT_BYTES = FORMAT == F32 ? 4 : 2, ROW_BYTES = 4;
    using Sum = Lanes;
    using Vector = Lanes;

    static INLINE Lanes weights(const uint8_t* from) {
        Lanes values;
        if constexpr (FORMAT == F32) {
            memcpy(&values, from, sizeof values);
            return values;
        }
#if defined(__AVX2__)
        if constexpr (FORMAT == F16) {
#if defined(__AVX512F__)
            return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#else
            return (Lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#endif
        }
#endif
        Halves halves;
        memcpy(&halves, from, sizeof halves);
        const Words words = __builtin_convertvector(halves, Words);
        if constexpr (FORMAT == BF16) return (Lanes)(words << 16);
        // As from_f16.
        const Words special = (Words)((words & 0x7c00) == 0x7c00) & 0x7f800000u;
        const Lanes size = (Lanes)((words & 0x7fff) << 13) * 0x1p112f;
        return (Lanes)((Words)size | special | (words & 0x8000) << 16);
    }

    static INLINE Lanes row(const uint8_t* from) {
        Lanes values;
        memcpy(&values, from, sizeof values);
        return values;
    }

    static INLINE void add(Lanes& sum, const Lanes& weights, const Lanes& row) {
        sum += weights * row;
    }

    static INLINE void finish(const Lanes* sums, float* results) {
        each<AT_ONCE>([&](auto i) INLINE_LAMBDA { results[i] = sum_of(sums[i]); });
    }
};

// What is to be computed next, which is asked of memory in equal shares while this is computed.
struct Prefetch {
    const uint8_t *at, *due;
    int64_t step; // bytes with every step

    INLINE void advance() {
        for (due += step; at < due; at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// Adds rows `weights` of the matrix times N rows of activations to their sums, over `columns`.
template <class Way, int N>
INLINE void add_columns(const uint8_t* const* weights, const uint8_t* const* rows,
                        int64_t columns, Prefetch& next, typename Way::Sum (&sums)[N][AT_ONCE]) {
    const auto step = [&](const uint8_t* const* from, int64_t weight, int64_t row) INLINE_LAMBDA {
        typename Way::Vector w[AT_ONCE];
        each<AT_ONCE>([&](auto i) INLINE_LAMBDA { w[i] = Way::weights(from[i] + weight); });
        each<N>([&](auto n) INLINE_LAMBDA {
            const auto x = Way::row(rows[n] + row);
            each<AT_ONCE>([&](auto i) INLINE_LAMBDA { Way::add(sums[n][i], w[i], x); });
        });
    };
    int64_t column = 0;
    for (; column + Way::COLUMNS <= columns; column += Way::COLUMNS) {
        next.advance();
        step(weights, column * Way::WEIGHT_BYTES, column * Way::ROW_BYTES);
    }
    if (column == columns) return;
    // Activations are padded with zeros, weights are not.
    alignas(64) uint8_t rest[AT_ONCE][Way::COLUMNS * Way::WEIGHT_BYTES] = {};
    const uint8_t* from[AT_ONCE];
    for (int i = 0; i < AT_ONCE; ++i) {
        memcpy(rest[i], weights[i] + column * Way::WEIGHT_BYTES,
               (columns - column) * Way::WEIGHT_BYTES);
        from[i] = rest[i];
    }
    step(from, 0, column * Way::ROW_BYTES);
}

// Rows `weights` of the matrix times N rows of activations: results [N][AT_ONCE].
template <class Way, int N>
INLINE void multiply_block(const uint8_t* const* weights, const uint8_t* const* rows,
                           int64_t columns, Prefetch& next, float (*results)[AT_ONCE]) {
    typename Way::Sum sums[N][AT_ONCE];
    const typename Way::Sum zero = {};
    each<N * AT_ONCE>([&](auto i) INLINE_LAMBDA { sums[i / AT_ONCE][i % AT_ONCE] = zero; });
    add_columns<Way, N>(weights, rows, columns, next, sums);
    each<N>([&](auto n) INLINE_LAMBDA { Way::finish(sums[n], results[n]); });
}

// The same for any number of rows, of which N and more are left; the first `count` results of each
// are stored from `row` on.
template <class Way, int N>
INLINE void multiply_rows(const uint8_t* const* weights, int64_t row, int count,
                          const uint8_t* const* rows, float* const* results, int64_t num_rows,
                          int64_t columns, Prefetch& next) {
    for (; num_rows >= N; num_rows -= N, rows += N, results += N) {
        float block[N][AT_ONCE];
        multiply_block<Way, N>(weights, rows, columns, next, block);
        for (int n = 0; n < N; ++n) memcpy(results[n] + row, block[n], count * sizeof(float));
    }
    if constexpr (N > 1)
        if (num_rows)
            multiply_rows<Way, N - 1>(weights, row, count, rows, results, num_rows, columns, next);
}

// Rows [first, last) of the matrix times all rows of activations, which are padded with zeros to
// a multiple of Way::COLUMNS.
template <class Way>
void multiply_with(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                   const uint8_t* const* rows, float* const* results, int64_t num_rows) {
    const int64_t bytes = m.columns * Way::WEIGHT_BYTES;
    const int64_t passes = (num_rows + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t step = AT_ONCE * Way::COLUMNS * Way::WEIGHT_BYTES / std::max<int64_t>(passes, 1);
    const uint8_t* const end = base + m.weight + last * bytes;
    for (int64_t row = first; row < last; row += AT_ONCE) {
        const int count = static_cast<int>(std::min<int64_t>(AT_ONCE, last - row));
        const uint8_t* weights[AT_ONCE];
        for (int i = 0; i < AT_ONCE; ++i) // the last one again where there are none
            weights[i] = base + m.weight + (row + std::min(i, count - 1)) * bytes;
        const uint8_t* after = std::min(end, weights[0] + AT_ONCE * bytes);
        Prefetch next = {after, after, after < end ? step : 0};
        multiply_rows<Way, MOST_ROWS>(weights, row, count, rows, results, num_rows, m.columns,
                                      next);
    }
}

// By float32 activations, as generic::prepare leaves them.
inline void multiply(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                     const uint8_t* const* rows, float* const* results, int64_t num_rows) {
    const auto with = m.format == BF16  ? multiply_with<ByFloats<BF16>>
                      : m.format == F16 ? multiply_with<ByFloats<F16>>
                                        : multiply_with<ByFloats<F32>>;
    with(m, base, first, last, rows, results, num_rows);
}

} // namespace plain
} // namespace
