// bfloat16 activations on processors that multiply bfloat16 (Zen 4 and later, Sapphire Rapids and
// later): 64 columns of a unit at a time, without a detour over float32.
//
// A 64-byte load holds 64 columns of each row of the unit. One row's bits are masked, and each of
// its bytes is made the low byte of a bfloat16 whose high byte is that of 128: it then has the
// value 128 + q, exactly, without a conversion or a table. vdpbf16ps adds up pairs of products in
// float32, from a start that takes the 128 away again and is the same for all rows. A group's sum
// is multiplied by its scale; what the zeros contribute is known from the sum of a group's
// activations:
//
//     sum over groups of  scale * (sum of (q - c) x)  -  scale * (zero - c) * (sum of x)
//
// All that interleaving two registers' bytes, masking and merging costs here is a place in the
// queue: the pipes that multiply are the ones that are always busy.

#include "bf16_scales.h"

namespace {

// The bytes of 64 columns of a unit.
template <int32_t FORMAT> struct Bytes {
    __m512i low; // of 3 bit the low plane's upper row, below it the lower one, and the high plane
    __m512i below, high;
};

struct Places {
    const uint8_t *low, *below, *high;
};

template <int32_t FORMAT> INLINE Places places(const Matrix& m, const uint8_t* base, int64_t unit) {
    const uint8_t* low = base + m.weight + unit * m.columns;
    if (FORMAT != HQQ3) return {low, nullptr, nullptr};
    return {low, low + m.rows / 8 * m.columns, low + m.rows / 4 * m.columns};
}

// 64 bytes, kept in a register: without the assembly the compiler loads them again for each
// shift, and loads are what there is least of.
INLINE __m512i load_bytes(const uint8_t* bytes, __mmask64 mask) {
    __m512i value = _mm512_maskz_loadu_epi8(mask, bytes);
    asm("" : "+v"(value));
    return value;
}

template <int32_t FORMAT>
INLINE Bytes<FORMAT> load(const Places& places, int64_t column, __mmask64 mask) {
    if constexpr (FORMAT == HQQ3)
        return {load_bytes(places.low + column, mask), load_bytes(places.below + column, mask),
                load_bytes(places.high + column, mask)};
    else return {load_bytes(places.low + column, mask), __m512i(), __m512i()};
}

template <int BITS> INLINE __m512i right(__m512i words) {
    if constexpr (BITS == 0) return words;
    else return _mm512_srli_epi16(words, BITS);
}

// The bits of `mask` from `low`, the others from `high`.
INLINE __m512i merge(char mask, __m512i low, __m512i high) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(mask), low, high, 0xca);
}

// Row K's integers, one to a byte.
template <int32_t FORMAT, int K> INLINE __m512i integers(const Bytes<FORMAT>& bytes) {
    if constexpr (FORMAT == HQQ3) {
        // Shifted so that the row's high bit stands above its two low ones.
        const __m512i low = K % 2 ? bytes.below : bytes.low;
        constexpr int SHIFT = 6 - K / 2 * 2;
        if constexpr (SHIFT == 6) {
            const __m512i merged = merge(3, right<6>(low), right<K % 2 ? 4 : 5>(bytes.high));
            return _mm512_and_si512(merged, _mm512_set1_epi8(7));
        } else {
            // Not all rows in one register: one's high bit lies where another's low ones are.
            const __m512i high = _mm512_slli_epi16(bytes.high, K % 2 ? 2 : 1);
            const __m512i merged = merge(SHIFT == 2 ? 0x0c : 0x33, low, high);
            return _mm512_and_si512(right<SHIFT>(merged), _mm512_set1_epi8(7));
        }
    } else {
        constexpr int BITS = FORMAT == HQQ2 ? 2 : 4;
        const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
        return _mm512_and_si512(right<8 - BITS * (K + 1)>(bytes.low), mask);
    }
}

INLINE __m512 dot(__m512 sum, __m512i weights, __m512i x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x);
}

struct Weights {
    __m512i low, high; // columns as a Row has them
};

// bfloat16s whose low bytes are `bytes` and whose high bytes are `high`.
INLINE Weights with_high_byte(__m512i bytes, char high) {
    const __m512i constant = _mm512_set1_epi8(high);
    return {_mm512_unpacklo_epi8(bytes, constant), _mm512_unpackhi_epi8(bytes, constant)};
}

template <int32_t FORMAT, int K> INLINE Weights weights_of(const Bytes<FORMAT>& bytes) {
    if constexpr (FORMAT == MXFP4) {
        // vpermw looks at the lowest five bits; the table has all values twice.
        const __m512i table = _mm512_set_epi16(
            static_cast<short>(0xc0c0), static_cast<short>(0xc080), static_cast<short>(0xc040),
            static_cast<short>(0xc000), static_cast<short>(0xbfc0), static_cast<short>(0xbf80),
            static_cast<short>(0xbf00), static_cast<short>(0x8000), 0x40c0, 0x4080, 0x4040, 0x4000,
            0x3fc0, 0x3f80, 0x3f00, 0, static_cast<short>(0xc0c0), static_cast<short>(0xc080),
            static_cast<short>(0xc040), static_cast<short>(0xc000), static_cast<short>(0xbfc0),
            static_cast<short>(0xbf80), static_cast<short>(0xbf00), static_cast<short>(0x8000),
            0x40c0, 0x4080, 0x4040, 0x4000, 0x3fc0, 0x3f80, 0x3f00, 0);
        const __m512i index = right<4 - 4 * K>(bytes.low);
        return {_mm512_permutexvar_epi16(_mm512_unpacklo_epi8(index, index), table),
                _mm512_permutexvar_epi16(_mm512_unpackhi_epi8(index, index), table)};
    } else return with_high_byte(integers<FORMAT, K>(bytes), 0x43); // 0x4300 is 128
}

// Row K of 64 columns times a row of activations; a lane has the sum of four products.
template <int32_t FORMAT, int K>
INLINE __m512 multiply_columns(const Bytes<FORMAT>& bytes, const Row& row, int64_t vector) {
    const __m512i* x = row.columns + 3 * vector;
    __m512 sum = FORMAT == MXFP4 ? _mm512_setzero_ps() : _mm512_castsi512_ps(x[2]);
    if constexpr (FORMAT == HQQ8) {
        const __m512i mask = _mm512_set1_epi8(15);
        const Weights lower = with_high_byte(_mm512_and_si512(bytes.low, mask), 0x43);
        // 0x4500 is 2048, and the last of its bits counts 16.
        const Weights upper = with_high_byte(_mm512_and_si512(right<4>(bytes.low), mask), 0x45);
        sum = dot(dot(sum, lower.low, x[0]), lower.high, x[1]);
        return dot(dot(sum, upper.low, x[0]), upper.high, x[1]);
    } else {
        const Weights weights = weights_of<FORMAT, K>(bytes);
        return dot(dot(sum, weights.low, x[0]), weights.high, x[1]);
    }
}

// All rows of 64 columns, times their scales, added to `sums`; `scale(k, 0)` is that of each lane.
template <int32_t FORMAT, int N, class Scale>
INLINE void multiply_one(const Bytes<FORMAT>& bytes, const Row* rows, int64_t vector,
                         const Scale& scale, __m512 (*sums)[N]) {
    each<rows_per_unit(FORMAT)>([&](auto k) INLINE_LAMBDA {
        each<N>([&](auto n) INLINE_LAMBDA {
            const __m512 sum = multiply_columns<FORMAT, k>(bytes, rows[n], vector);
            sums[k][n] = _mm512_fmadd_ps(sum, scale(k, 0), sums[k][n]);
        });
    });
}

// The same for 128 columns, `scale(k, 1)` being that of the second 64. Of few rows the sums would
// be what takes the time, each waiting for the one before: so there is one for both.
template <int32_t FORMAT, int N, class Scale>
INLINE void multiply_two(const Bytes<FORMAT>& one, const Bytes<FORMAT>& two, const Row* rows,
                         int64_t vector, const Scale& scale, __m512 (*sums)[N]) {
    each<rows_per_unit(FORMAT)>([&](auto k) INLINE_LAMBDA {
        each<N>([&](auto n) INLINE_LAMBDA {
            const __m512 first = multiply_columns<FORMAT, k>(one, rows[n], vector);
            const __m512 second = multiply_columns<FORMAT, k>(two, rows[n], vector + 1);
            const __m512 both =
                _mm512_fmadd_ps(second, scale(k, 1), _mm512_mul_ps(first, scale(k, 0)));
            sums[k][n] = _mm512_add_ps(sums[k][n], both);
        });
    });
}

template <int32_t FORMAT> constexpr bool PAIRS = FORMAT == HQQ8 || FORMAT == HQQ4;
constexpr __mmask64 ALL = ~__mmask64{0};

template <int32_t FORMAT> INLINE void prefetch(const Places& from, int64_t column) {
    __builtin_prefetch(from.low + column + AHEAD);
    if (FORMAT == HQQ3) {
        __builtin_prefetch(from.below + column + AHEAD);
        __builtin_prefetch(from.high + column + AHEAD);
    }
}

// One unit times N rows of activations, groups of 64 or 128: a register has one group's columns,
// whose scale is taken from memory.
template <int32_t FORMAT, bool META, int N>
INLINE void multiply_long_groups(const Product& p, int64_t unit, const Row* rows,
                                 __m512 (*sums)[N]) {
    constexpr int R = rows_per_unit(FORMAT);
    const Matrix& m = p.matrix;
    const int shift = m.group_size == 128 ? 1 : 0;
    const Places from = places<FORMAT>(m, p.base, unit);
    alignas(64) float scales[R][BLOCK_COLUMNS / 64];
    for (int64_t begin = 0; begin < m.columns; begin += BLOCK_COLUMNS) {
        const int64_t end = std::min(m.columns, begin + BLOCK_COLUMNS);
        const int64_t first = begin / 64 >> shift, last = end / 64 >> shift;
        for (int64_t group = first; group < last; group += 16) {
            const __mmask16 mask = first_lanes(last - group);
            each<R>([&](auto k) INLINE_LAMBDA {
                const int64_t at = (unit + k * p.units) * p.groups + group;
                const __m512 decoded = decode_scales<FORMAT, META, N>(p, p.metas[k], at, group,
                                                                      mask, rows, sums[k]);
                _mm512_store_ps(scales[k] + group - first, decoded);
            });
        }
        const int64_t block = begin / COLUMNS, whole = (end - begin) / COLUMNS;
        int64_t vector = 0;
        const auto scale = [&](int k, int which) INLINE_LAMBDA {
            return _mm512_set1_ps(scales[k][(vector + which) >> shift]);
        };
        for (; PAIRS<FORMAT> && vector + 2 <= whole; vector += 2) {
            const int64_t column = begin + vector * COLUMNS;
            prefetch<FORMAT>(from, column);
            prefetch<FORMAT>(from, column + COLUMNS);
            multiply_two<FORMAT, N>(load<FORMAT>(from, column, ALL),
                                    load<FORMAT>(from, column + COLUMNS, ALL), rows,
                                    block + vector, scale, sums);
        }
        for (; vector < whole; ++vector) {
            const int64_t column = begin + vector * COLUMNS;
            prefetch<FORMAT>(from, column);
            multiply_one<FORMAT, N>(load<FORMAT>(from, column, ALL), rows, block + vector, scale,
                                    sums);
        }
    }
}

// The same for groups of 16 or 32: a register has the columns of PER_VECTOR groups, four columns
// to a lane, and scales are spread over lanes from the register that they were decoded to.
template <int32_t FORMAT, int PER_VECTOR, bool META, int N>
INLINE void multiply_short_groups(const Product& p, int64_t unit, const Row* rows,
                                  __m512 (*sums)[N]) {
    constexpr int R = rows_per_unit(FORMAT);
    constexpr int64_t AT_ONCE = 16 / PER_VECTOR; // vectors that have 16 groups
    const Matrix& m = p.matrix;
    const Places from = places<FORMAT>(m, p.base, unit);
    const __m512i spread =
        PER_VECTOR == 2 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                        : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const int64_t whole = m.columns / COLUMNS;
    __m512 scales[R];
    __m512i lanes;
    const auto decode = [&](int64_t group) INLINE_LAMBDA {
        const __mmask16 mask = first_lanes(p.groups - group);
        each<R>([&](auto k) INLINE_LAMBDA {
            const int64_t at = (unit + k * p.units) * p.groups + group;
            scales[k] = decode_scales<FORMAT, META, N>(p, p.metas[k], at, group, mask, rows,
                                                       sums[k]);
        });
        lanes = spread;
    };
    const __m512i step = _mm512_set1_epi32(PER_VECTOR);
    const auto scale = [&](int k, int which) INLINE_LAMBDA {
        const __m512i here = which ? _mm512_add_epi32(lanes, step) : lanes;
        return _mm512_permutexvar_ps(here, scales[k]);
    };
    int64_t vector = 0;
    while (vector < whole) {
        decode(vector * PER_VECTOR);
        const int64_t end = std::min(whole, vector + AT_ONCE);
        for (; PAIRS<FORMAT> && vector + 2 <= end; vector += 2) {
            const int64_t column = vector * COLUMNS;
            prefetch<FORMAT>(from, column);
            prefetch<FORMAT>(from, column + COLUMNS);
            multiply_two<FORMAT, N>(load<FORMAT>(from, column, ALL),
                                    load<FORMAT>(from, column + COLUMNS, ALL), rows, vector, scale,
                                    sums);
            lanes = _mm512_add_epi32(lanes, _mm512_add_epi32(step, step));
        }
        for (; vector < end; ++vector) {
            prefetch<FORMAT>(from, vector * COLUMNS);
            multiply_one<FORMAT, N>(load<FORMAT>(from, vector * COLUMNS, ALL), rows, vector, scale,
                                    sums);
            lanes = _mm512_add_epi32(lanes, step);
        }
    }
    if (const int64_t rest = m.columns - whole * COLUMNS) {
        if (whole % AT_ONCE == 0) decode(whole * PER_VECTOR);
        const __mmask64 mask = (__mmask64{1} << rest) - 1;
        multiply_one<FORMAT, N>(load<FORMAT>(from, whole * COLUMNS, mask), rows, whole, scale,
                                sums);
    }
}

template <int32_t FORMAT, int PER_VECTOR, bool META, int N>
void multiply_unit(const Product& p, int64_t unit, const Row* rows, float* const* results) {
    constexpr int R = rows_per_unit(FORMAT);
    __m512 sums[R][N];
    each<R>([&](auto k) INLINE_LAMBDA {
        each<N>([&](auto n) INLINE_LAMBDA { sums[k][n] = _mm512_setzero_ps(); });
    });
    prefetch_scales<FORMAT, META>(p, unit);
    if constexpr (PER_VECTOR == 1) multiply_long_groups<FORMAT, META, N>(p, unit, rows, sums);
    else multiply_short_groups<FORMAT, PER_VECTOR, META, N>(p, unit, rows, sums);
    each<R>([&](auto k) INLINE_LAMBDA {
        each<N>([&](auto n) INLINE_LAMBDA {
            results[n][unit + k * p.units] = _mm512_reduce_add_ps(sums[k][n]);
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
                p.metas[k].decode(m, base, from, to, center(FORMAT));
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
    case MXFP4: return multiply_units<MXFP4, 2, false>(m, base, first, last, prepared, results, num_rows);
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
