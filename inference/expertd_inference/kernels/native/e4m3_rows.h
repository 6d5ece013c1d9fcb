// Weights of FP8 and MXFP8, bytes of e4m3 numbers, times any number of rows of activations: as
// plain_rows.h has it, AT_ONCE rows of the matrix at a time, but that blocks of columns have scales.
// A row's bits depend neither on the number of rows nor on how a matrix is divided.
#pragma once

#include "plain_rows.h"

namespace {
namespace plain {

#if !defined(__AVX2__)
// A 256th of the values that codes stand for.
struct E4m3Values {
    float of[256];

    constexpr E4m3Values() : of() {
        for (int code = 0; code < 256; ++code) {
            const int exponent = code >> 3 & 15, mantissa = code & 7;
            float value = exponent ? 8 + mantissa : mantissa;
            value *= 0x1p-17f;
            for (int i = 1; i < exponent; ++i) value *= 2;
            if ((code & 127) == 127) value = __builtin_nanf("");
            of[code] = code < 128 ? value : -value;
        }
    }
};

constexpr E4m3Values E4M3_VALUES;
#endif

// By float32 activations. A step has columns of one scale, by which weights are multiplied.
struct E4m3ByFloats {
    static constexpr int COLUMNS = 2 * LANES, ROW_BYTES = 4;
    static constexpr bool TWO_SCALES = false;
    using Sum = Lanes;
    using Scale = Lanes;

    struct Step {
        Lanes of[2];
    };
    using Row = Step;

    static INLINE Lanes scale(float value, float) { return value + Lanes{}; }

    static INLINE Step weights(const uint8_t* from, Lanes scale) {
        Step step = values(from);
        each<2>([&](auto i) INLINE_LAMBDA { step.of[i] *= scale; });
        return step;
    }

    // A 256th of the values: float16s have such an exponent, and unlike float32's their subnormal
    // numbers take no longer.
    static INLINE Step values(const uint8_t* from) {
#if defined(__AVX512F__)
        const __m512i words =
            _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from)), 8);
        const __m512i largest = _mm512_set1_epi16(0x7f00);
        const __mmask32 none = _mm512_cmpeq_epi16_mask(_mm512_and_si512(words, largest), largest);
        const __m512i halves = _mm512_mask_mov_epi16(
            _mm512_and_si512(_mm512_srai_epi16(words, 1), _mm512_set1_epi16((short)0xbfff)), none,
            _mm512_set1_epi16(0x7e00));
        return {(Lanes)_mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
                (Lanes)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
#elif defined(__AVX2__)
        const __m256i words =
            _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from)), 8);
        const __m256i largest = _mm256_set1_epi16(0x7f00);
        const __m256i none = _mm256_cmpeq_epi16(_mm256_and_si256(words, largest), largest);
        const __m256i halves = _mm256_or_si256(
            _mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16((short)0xbfff)),
            _mm256_and_si256(none, _mm256_set1_epi16(0x7e00)));
        return {(Lanes)_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                (Lanes)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
#else
        Step step;
        for (int i = 0; i < COLUMNS; ++i) step.of[i / LANES][i % LANES] = E4M3_VALUES.of[from[i]];
        return step;
#endif
    }

    static INLINE Row row(const uint8_t* from) {
        return {ByFloats<F32>::row(from), ByFloats<F32>::row(from + LANES * 4)};
    }

    static INLINE void add(Lanes& sum, const Step& weights, const Lanes&, const Row& row) {
        each<2>([&](auto i) INLINE_LAMBDA { sum += weights.of[i] * row.of[i]; });
    }

    static INLINE void finish(const Lanes* sums, float* results) {
        ByFloats<F32>::finish(sums, results);
        for (int i = 0; i < AT_ONCE; ++i) results[i] *= 256;
    }
};

// Scales of AT_ONCE rows, `num` of them at a time.
struct Scales {
    static constexpr int64_t MOST = 64;
    alignas(64) float decoded[AT_ONCE][MOST];
    const float* of[AT_ONCE];

    // Those from group `group` on; what is float32 stays where it is.
    INLINE void take(const Matrix& m, const uint8_t* base, const int64_t* rows, int64_t groups,
                     int64_t group, int64_t num) {
        for (int i = 0; i < AT_ONCE; ++i) {
            if (m.format == FP8) {
                const int64_t at = rows[i] / m.group_rows * groups + group;
                of[i] = reinterpret_cast<const float*>(base + m.scale) + at;
                continue;
            }
            const uint8_t* const bytes = base + m.scale + rows[i] * groups + group;
            for (int64_t g = 0; g < num; ++g) decoded[i][g] = from_e8m0(bytes[g]);
            of[i] = decoded[i];
        }
    }
};

// Adds a step of AT_ONCE rows of the matrix times N rows of activations to their sums.
template <class Way, int N>
INLINE void add_step(const uint8_t* const* weights, int64_t column, const uint8_t* const* rows,
                     int64_t at, const typename Way::Scale (&scales)[AT_ONCE],
                     typename Way::Sum (&sums)[N][AT_ONCE]) {
    typename Way::Row x[N];
    each<N>([&](auto n) INLINE_LAMBDA { x[n] = Way::row(rows[n] + at * Way::ROW_BYTES); });
    each<AT_ONCE>([&](auto i) INLINE_LAMBDA {
        const auto w = Way::weights(weights[i] + column, scales[i]);
        each<N>([&](auto n) INLINE_LAMBDA { Way::add(sums[n][i], w, scales[i], x[n]); });
    });
}

// AT_ONCE rows `row_of` of the matrix times N rows of activations: results [N][AT_ONCE].
template <class Way, int N>
INLINE void multiply_e4m3_block(const Matrix& m, const uint8_t* base, const int64_t* row_of,
                                const uint8_t* const* rows, Prefetch& next,
                                float (*results)[AT_ONCE]) {
    typename Way::Sum sums[N][AT_ONCE];
    const typename Way::Sum zero = {};
    each<N * AT_ONCE>([&](auto i) INLINE_LAMBDA { sums[i / AT_ONCE][i % AT_ONCE] = zero; });
    const uint8_t* weights[AT_ONCE];
    each<AT_ONCE>([&](auto i) INLINE_LAMBDA {
        weights[i] = base + m.weight + row_of[i] * m.columns;
    });
    const int64_t g = m.group_size, groups = (m.columns + g - 1) / g;
    const bool two = Way::TWO_SCALES && g < Way::COLUMNS; // of a step
    const int64_t at_once = m.format == FP8 ? groups : Scales::MOST;
    Scales scales;
    for (int64_t first = 0; first < groups; first += at_once) {
        const int64_t last = std::min(groups, first + at_once);
        scales.take(m, base, row_of, groups, first, last - first);
        for (int64_t group = first; group < last; group += two ? 2 : 1) {
            const int64_t here = group - first, after = std::min(here + two, last - 1 - first);
            typename Way::Scale scale[AT_ONCE];
            each<AT_ONCE>([&](auto i) INLINE_LAMBDA {
                scale[i] = Way::scale(scales.of[i][here], scales.of[i][after]);
            });
            int64_t column = group * g;
            const int64_t end = std::min(m.columns, column + (two ? 2 * g : g));
            for (; column + Way::COLUMNS <= end; column += Way::COLUMNS) {
                next.advance();
                add_step<Way, N>(weights, column, rows, column, scale, sums);
            }
            if (column >= end) continue;
            // Activations are padded with zeros, weights are not.
            alignas(64) uint8_t rest[AT_ONCE][Way::COLUMNS] = {};
            const uint8_t* from[AT_ONCE];
            for (int i = 0; i < AT_ONCE; ++i) {
                memcpy(rest[i], weights[i] + column, end - column);
                from[i] = rest[i];
            }
            add_step<Way, N>(from, 0, rows, column, scale, sums);
        }
    }
    each<N>([&](auto n) INLINE_LAMBDA { Way::finish(sums[n], results[n]); });
}

// As multiply_rows of plain_rows.h.
template <class Way, int N>
INLINE void multiply_e4m3_rows(const Matrix& m, const uint8_t* base, const int64_t* row_of,
                               int64_t row, int count, const uint8_t* const* rows,
                               float* const* results, int64_t num_rows, Prefetch& next) {
    for (; num_rows >= N; num_rows -= N, rows += N, results += N) {
        float block[N][AT_ONCE];
        multiply_e4m3_block<Way, N>(m, base, row_of, rows, next, block);
        for (int n = 0; n < N; ++n) memcpy(results[n] + row, block[n], count * sizeof(float));
    }
    if constexpr (N > 1)
        if (num_rows)
            multiply_e4m3_rows<Way, N - 1>(m, base, row_of, row, count, rows, results, num_rows,
                                           next);
}

// Rows [first, last) of the matrix times all rows of activations, which are padded with zeros to
// a multiple of Way::COLUMNS. Groups are of 32 columns, a multiple of 64, or a whole row.
template <class Way>
void multiply_e4m3(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                   const uint8_t* const* rows, float* const* results, int64_t num_rows) {
    const int64_t passes = (num_rows + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t step = AT_ONCE * Way::COLUMNS / std::max<int64_t>(passes, 1);
    const uint8_t* const end = base + m.weight + last * m.columns;
    for (int64_t row = first; row < last; row += AT_ONCE) {
        const int count = static_cast<int>(std::min<int64_t>(AT_ONCE, last - row));
        int64_t row_of[AT_ONCE];
        for (int i = 0; i < AT_ONCE; ++i) // the last one again where there are none
            row_of[i] = row + std::min(i, count - 1);
        // Not the next rows, but those after them: a row of bytes is short.
        const uint8_t* after = std::min(end, base + m.weight + (row + 2 * AT_ONCE) * m.columns);
        Prefetch next = {after, after, after < end ? step : 0};
        multiply_e4m3_rows<Way, MOST_ROWS>(m, base, row_of, row, count, rows, results, num_rows,
                                           next);
    }
}

} // namespace plain
} // namespace
