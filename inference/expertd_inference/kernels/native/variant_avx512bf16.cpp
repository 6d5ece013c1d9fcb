// bfloat16 activations on processors that multiply bfloat16 (Zen 4 and later, Sapphire Rapids and
// later): 64 columns of a unit at a time, without a detour over float32.
//
// A 64-byte load holds 64 columns of each row of the unit. bf16_words.h makes them bfloat16s of
// the value e + q, e being a small power of two; vdpbf16ps adds up pairs of products in float32.
// A group's sum is multiplied by its scale; what the zeros contribute, and the e, is known from the
// sum of a group's activations:
//
//     sum over groups of  scale * (sum of (e + q) x)  -  scale * (zero + e) * (sum of x)
//
// Both pipes that multiply are to be busy all the time, and what else there is to do for a register
// of weights is as much again. So it counts: scales are decoded without a mask or a branch where
// that can be, and between the products, which leaves the processor a choice.

#include "bf16_words.h"

namespace {

INLINE __m512 dot(__m512 sum, __m512i weights, __m512i x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x);
}

// A zero that is not a copy of one: copies of 64 bytes are what the processor has least room for.
INLINE __m512 fresh_zero() {
    __m512 zero;
    asm volatile("vpxord %x0, %x0, %x0" : "=v"(zero));
    return zero;
}

// Row K of 64 columns times a row of activations; a lane has the sum of four products.
template <int32_t FORMAT, int K>
INLINE __m512 multiply_columns(const Words<FORMAT>& words, const Row& row, int64_t vector) {
    const __m512i* x = row.columns + num_registers(FORMAT) * vector;
    __m512 sum = has_start(FORMAT, K) ? _mm512_castsi512_ps(x[2]) : fresh_zero();
    if constexpr (FORMAT == HQQ8) {
        // Two fields at bit 3, of which the upper one's lowest bit counts 16.
        constexpr uint16_t ONE = power_bits(power_above(3));
        constexpr uint16_t SIXTEEN = power_bits(16 * power_above(3));
        sum = dot(sum, field(words.shifted[0], 15 << 3, ONE), x[0]);
        sum = dot(sum, field(words.shifted[1], 15 << 3, SIXTEEN), x[0]);
        sum = dot(sum, field(words.shifted[2], 15 << 3, ONE), x[1]);
        return dot(sum, field(words.shifted[3], 15 << 3, SIXTEEN), x[1]);
    } else {
        sum = dot(sum, weights_of<FORMAT, K, 0>(words), x[0]);
        return dot(sum, weights_of<FORMAT, K, 1>(words), x[1]);
    }
}

// All rows of 64 columns, times their scales, added to `sums`; `scale(k, v)` has
// those of row k and vector v, in each lane its own.
template <int32_t FORMAT, int N, class Scale>
INLINE void multiply_one(const Words<FORMAT>& words, const Row* rows, int64_t vector,
                         const Scale& scale, __m512 (*sums)[N]) {
    each<rows_per_unit(FORMAT)>([&](auto k) INLINE_LAMBDA {
        each<N>([&](auto n) INLINE_LAMBDA {
            const __m512 sum = multiply_columns<FORMAT, k>(words, rows[n], vector);
            sums[k][n] = _mm512_fmadd_ps(sum, scale(k, vector), sums[k][n]);
        });
    });
}

// The same for 128 columns. Of few rows the sums would be what takes the time, each waiting for the
// one before: so there is one for both.
template <int32_t FORMAT, int N, class Scale>
INLINE void multiply_two(const Words<FORMAT>& one, const Words<FORMAT>& two, const Row* rows,
                         int64_t vector, const Scale& scale, __m512 (*sums)[N]) {
    each<rows_per_unit(FORMAT)>([&](auto k) INLINE_LAMBDA {
        each<N>([&](auto n) INLINE_LAMBDA {
            const __m512 first = multiply_columns<FORMAT, k>(one, rows[n], vector);
            const __m512 second = multiply_columns<FORMAT, k>(two, rows[n], vector + 1);
            const __m512 scaled = _mm512_mul_ps(first, scale(k, vector));
            const __m512 both = _mm512_fmadd_ps(second, scale(k, vector + 1), scaled);
            sums[k][n] = _mm512_add_ps(sums[k][n], both);
        });
    });
}

template <int32_t FORMAT> constexpr int STEP = FORMAT == HQQ8 || FORMAT == HQQ4 ? 2 : 1;
constexpr __mmask64 ALL = ~__mmask64{0};

template <int32_t FORMAT> INLINE void prefetch(const Places& from, int64_t column) {
    __builtin_prefetch(from.low + column + AHEAD);
    if (FORMAT == HQQ3) {
        __builtin_prefetch(from.below + column + AHEAD);
        __builtin_prefetch(from.high + column + AHEAD);
    }
}

// COUNT vectors, one or two.
template <int32_t FORMAT, int N, int COUNT = STEP<FORMAT>, class Scale>
INLINE void multiply_step(const Places& from, int64_t vector, const Row* rows, const Scale& scale,
                          __m512 (*sums)[N]) {
    const int64_t column = vector * COLUMNS;
    prefetch<FORMAT>(from, column);
    const Words<FORMAT> words = load<FORMAT>(from, column, ALL);
    if constexpr (COUNT == 1) multiply_one<FORMAT, N>(words, rows, vector, scale, sums);
    else {
        prefetch<FORMAT>(from, column + COLUMNS);
        const Words<FORMAT> more = load<FORMAT>(from, column + COLUMNS, ALL);
        multiply_two<FORMAT, N>(words, more, rows, vector, scale, sums);
    }
}

// All rows of a unit's vectors [vector, end), times their scales.
template <int32_t FORMAT, int N, class Scale>
INLINE void multiply_vectors(const Places& from, int64_t vector, int64_t end, const Row* rows,
                             const Scale& scale, __m512 (*sums)[N]) {
    for (; vector + STEP<FORMAT> <= end; vector += STEP<FORMAT>)
        multiply_step<FORMAT, N>(from, vector, rows, scale, sums);
    for (; vector < end; ++vector) multiply_step<FORMAT, N, 1>(from, vector, rows, scale, sums);
}

constexpr int64_t BLOCK_VECTORS = 64; // whose scales are decoded at a time

// One unit times N rows of activations, groups of 64 or 128: a register has one group's columns,
// whose scale is taken from memory.
template <int32_t FORMAT, bool META, int N, bool ALIGNED>
INLINE void multiply_long_groups(const Product& p, int64_t unit, const Row* rows,
                                 __m512 (*sums)[N]) {
    constexpr int R = rows_per_unit(FORMAT);
    const int shift = p.matrix.group_size == 128 ? 1 : 0;
    const Places from = places<FORMAT>(p.matrix, p.base, unit);
    alignas(64) float scales[R][BLOCK_VECTORS];
    const int64_t whole = p.matrix.columns / COLUMNS;
    for (int64_t begin = 0; begin < whole; begin += BLOCK_VECTORS) {
        const int64_t end = std::min(whole, begin + BLOCK_VECTORS);
        const int64_t first = begin >> shift, count = (end >> shift) - first;
        const auto decode = [&](int64_t group, auto mask) INLINE_LAMBDA {
            each<R>([&](auto k) INLINE_LAMBDA {
                _mm512_store_ps(scales[k] + group,
                                decode_scales<FORMAT, META, N, ALIGNED, k>(
                                    p, unit, first + group, mask, rows, sums[k]));
            });
        };
        int64_t group = 0;
        for (; group + 16 <= count; group += 16) decode(group, AllLanes());
        if (group < count) decode(group, first_lanes(count - group));
        const auto scale = [&](int k, int64_t vector) INLINE_LAMBDA {
            return _mm512_set1_ps(scales[k][(vector - begin) >> shift]);
        };
        multiply_vectors<FORMAT, N>(from, begin, end, rows, scale, sums);
    }
}

// The same for groups of 16 or 32: a register has the columns of PER_VECTOR groups, four columns
// to a lane, and scales are spread over lanes from the register that they were decoded to.
template <int32_t FORMAT, int PER_VECTOR, bool META, int N, bool ALIGNED>
INLINE void multiply_short_groups(const Product& p, int64_t unit, const Row* rows,
                                  __m512 (*sums)[N]) {
    constexpr int R = rows_per_unit(FORMAT);
    constexpr int64_t AT_ONCE = 16 / PER_VECTOR; // vectors that have 16 groups
    const Places from = places<FORMAT>(p.matrix, p.base, unit);
    const __m512i spread =
        PER_VECTOR == 2 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                        : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const int64_t columns = p.matrix.columns, whole = columns / COLUMNS;
    __m512 scales[R];
    const auto decode = [&](int64_t vector, auto mask) INLINE_LAMBDA {
        each<R>([&](auto k) INLINE_LAMBDA {
            scales[k] = decode_scales<FORMAT, META, N, ALIGNED, k>(p, unit, vector * PER_VECTOR,
                                                                   mask, rows, sums[k]);
        });
    };
    int64_t vector = 0;
    // Spread over the lanes of vector `at`, from those that begin with `vector`.
    const auto scale = [&](int k, int64_t at) INLINE_LAMBDA {
        const auto group = static_cast<int>((at - vector) * PER_VECTOR);
        return _mm512_permutexvar_ps(_mm512_add_epi32(spread, _mm512_set1_epi32(group)), scales[k]);
    };
    for (; vector + AT_ONCE <= whole; vector += AT_ONCE) {
        decode(vector, AllLanes());
        each<AT_ONCE / STEP<FORMAT>>([&](auto i) INLINE_LAMBDA {
            multiply_step<FORMAT, N>(from, vector + i * STEP<FORMAT>, rows, scale, sums);
        });
    }
    if (const int64_t rest = columns - vector * COLUMNS) {
        decode(vector, first_lanes(p.groups - vector * PER_VECTOR));
        multiply_vectors<FORMAT, N>(from, vector, whole, rows, scale, sums);
        if (const __mmask64 mask = (__mmask64{1} << rest % COLUMNS) - 1)
            multiply_one<FORMAT, N>(load<FORMAT>(from, whole * COLUMNS, mask), rows, whole, scale,
                                    sums);
    }
}

// Sums of pairs of lanes: in each four lanes of the result two of `a` beside two of `b`.
INLINE __m512 add_pairs(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

// Likewise of what add_pairs returned: in each four lanes one for each of four.
INLINE __m512 add_fours(__m512 first, __m512 second) {
    const __m512d a = _mm512_castps_pd(first), b = _mm512_castps_pd(second);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}

INLINE __m128 add_lanes(__m512 sums) {
    const __m256 eight =
        _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

template <int32_t FORMAT, int PER_VECTOR, bool META, int N>
void multiply_unit(const Product& p, int64_t unit, const Row* rows, float* const* results) {
    constexpr int R = rows_per_unit(FORMAT);
    __m512 sums[R][N];
    each<R>([&](auto k) INLINE_LAMBDA {
        each<N>([&](auto n) INLINE_LAMBDA { sums[k][n] = _mm512_setzero_ps(); });
    });
    prefetch_scales<FORMAT, META>(p, unit);
    const auto multiply = [&](auto aligned) INLINE_LAMBDA {
        if constexpr (PER_VECTOR == 1)
            multiply_long_groups<FORMAT, META, N, aligned>(p, unit, rows, sums);
        else multiply_short_groups<FORMAT, PER_VECTOR, META, N, aligned>(p, unit, rows, sums);
    };
    // Without meta groups it does not matter where a row begins.
    if (!META || p.groups % 16 == 0) multiply(std::true_type());
    else multiply(std::false_type());
    each<N>([&](auto n) INLINE_LAMBDA {
        float* out = results[n] + unit;
        if constexpr (R == 1) *out = _mm512_reduce_add_ps(sums[0][n]);
        else if constexpr (R == 2) {
            const __m128 both = add_lanes(add_pairs(sums[0][n], sums[1][n]));
            out[0] = both[0] + both[2];
            out[p.units] = both[1] + both[3];
        } else each<R / 4>([&](auto i) INLINE_LAMBDA {
            const __m512 first = add_pairs(sums[4 * i][n], sums[4 * i + 1][n]);
            const __m512 second = add_pairs(sums[4 * i + 2][n], sums[4 * i + 3][n]);
            const __m128 four = add_lanes(add_fours(first, second));
            for (int k = 0; k < 4; ++k) out[(4 * i + k) * p.units] = four[k];
        });
    });
}

// So many rows of activations share a decoding as registers hold the sums of.
constexpr int most_rows(int32_t format) {
    return format == HQQ3 ? 2 : format == HQQ2 ? 4 : 8;
}

template <int32_t FORMAT, int PER_VECTOR, bool META, int N>
void multiply_some(const Product& p, int64_t unit, const Row* rows, float* const* results,
                   int64_t num_rows) {
    for (; num_rows >= N; num_rows -= N, rows += N, results += N)
        multiply_unit<FORMAT, PER_VECTOR, META, N>(p, unit, rows, results);
    if constexpr (N > 1)
        if (num_rows)
            multiply_some<FORMAT, PER_VECTOR, META, N / 2>(p, unit, rows, results, num_rows);
}

template <int32_t FORMAT, int PER_VECTOR, bool META>
void multiply_units(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                    const uint8_t* const* prepared, float* const* results, int64_t num_rows) {
    constexpr int64_t MOST = 32;
    Row rows[MOST];
    Product p(m, base);
    for (int64_t start = 0; start < num_rows; start += MOST) {
        const int64_t count = std::min(MOST, num_rows - start);
        for (int64_t n = 0; n < count; ++n) rows[n] = row_of(m, prepared[start + n]);
        const int64_t at_once = META ? Metas::units_at_once(p.groups) : last - first;
        for (int64_t begin = first; begin < last; begin += at_once) {
            const int64_t end = std::min(last, begin + at_once);
            for (int k = 0; META && k < rows_per_unit(FORMAT); ++k) {
                const int64_t from = (begin + k * p.units) * p.groups;
                const int64_t to = from + (end - begin) * p.groups;
                p.metas[k].decode(m, base, from, to, excess(FORMAT, k));
            }
            for (int64_t unit = begin; unit < end; ++unit)
                multiply_some<FORMAT, PER_VECTOR, META, most_rows(FORMAT)>(
                    p, unit, rows, results + start, count);
        }
    }
}

template <int32_t FORMAT, bool META>
void multiply_groups(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                     const uint8_t* const* prepared, float* const* results, int64_t num_rows) {
    if (m.group_size == 16)
        multiply_units<FORMAT, 4, META>(m, base, first, last, prepared, results, num_rows);
    else if (m.group_size == 32)
        multiply_units<FORMAT, 2, META>(m, base, first, last, prepared, results, num_rows);
    else multiply_units<FORMAT, 1, META>(m, base, first, last, prepared, results, num_rows);
}

template <int32_t FORMAT>
void multiply_quantized(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                        const uint8_t* const* prepared, float* const* results, int64_t num_rows) {
    if (m.meta_group_size)
        multiply_groups<FORMAT, true>(m, base, first, last, prepared, results, num_rows);
    else multiply_groups<FORMAT, false>(m, base, first, last, prepared, results, num_rows);
}

// Row `row` of a bfloat16 matrix times N rows of activations.
template <int N>
void multiply_plain_row(const Matrix& m, const uint8_t* weights, int64_t row,
                        const uint8_t* const* prepared, float* const* results) {
    __m512 sums[N][2]; // two, since one product has to wait for the one before
    for (int n = 0; n < N; ++n) sums[n][0] = sums[n][1] = _mm512_setzero_ps();
    const auto step = [&](int64_t column, __mmask32 mask, int which) {
        const __m512i w = _mm512_maskz_loadu_epi16(mask, weights + column * 2);
        for (int n = 0; n < N; ++n)
            sums[n][which] =
                dot(sums[n][which], w, _mm512_loadu_si512(prepared[n] + column * 2));
    };
    int64_t column = 0;
    for (; column + 64 <= m.columns; column += 64) {
        __builtin_prefetch(weights + column * 2 + AHEAD);
        __builtin_prefetch(weights + column * 2 + AHEAD + 64);
        step(column, ~__mmask32{0}, 0);
        step(column + 32, ~__mmask32{0}, 1);
    }
    for (; column < m.columns; column += 32) {
        const int64_t rest = std::min<int64_t>(32, m.columns - column);
        step(column, static_cast<__mmask32>((uint64_t{1} << rest) - 1), 0);
    }
    for (int n = 0; n < N; ++n)
        results[n][row] = _mm512_reduce_add_ps(_mm512_add_ps(sums[n][0], sums[n][1]));
}

void multiply_plain(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                    const uint8_t* const* prepared, float* const* results, int64_t num_rows) {
    for (int64_t row = first; row < last; ++row) {
        const uint8_t* weights = base + m.weight + row * m.columns * 2;
        int64_t n = 0;
        for (; n + 4 <= num_rows; n += 4)
            multiply_plain_row<4>(m, weights, row, prepared + n, results + n);
        for (; n < num_rows; ++n)
            multiply_plain_row<1>(m, weights, row, prepared + n, results + n);
    }
}

void multiply(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
              const uint8_t* const* prepared, float* const* results, int64_t num_rows,
              int32_t type) {
    if (!is_fast(m, type))
        return generic::multiply(m, base, first, last, prepared, results, num_rows, type);
    switch (m.format) {
    case HQQ8: return multiply_quantized<HQQ8>(m, base, first, last, prepared, results, num_rows);
    case HQQ4: return multiply_quantized<HQQ4>(m, base, first, last, prepared, results, num_rows);
    case HQQ3: return multiply_quantized<HQQ3>(m, base, first, last, prepared, results, num_rows);
    case HQQ2: return multiply_quantized<HQQ2>(m, base, first, last, prepared, results, num_rows);
    case MXFP4:
        return multiply_units<MXFP4, 2, false>(m, base, first, last, prepared, results, num_rows);
    default: return multiply_plain(m, base, first, last, prepared, results, num_rows);
    }
}

} // namespace

extern const Variant VARIANT_AVX512BF16;
const Variant VARIANT_AVX512BF16 = {"avx512bf16",
                                    generic::prepared_bytes,
                                    prepare,
                                    multiply,
                                    generic::dequantize,
                                    generic::activate,
                                    widen,
                                    narrow,
                                    round_all};
