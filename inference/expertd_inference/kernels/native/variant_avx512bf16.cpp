// bfloat16 activations on processors that multiply bfloat16 (Zen 4 and later, Sapphire Rapids and
// later): 64 columns of a unit at a time, without a detour over float32. Several rows of
// activations are rows.h's, and this is one row by itself:
//
// A 64-byte load holds 64 columns of each row of the unit. Of 3 and 2 bit and e2m1 bf16_words.h
// makes them bfloat16s of the value e + q, e being a small power of two; vdpbf16ps adds up pairs of
// products in float32. A group's sum is multiplied by its scale; what the zeros contribute, and the
// e, is known from the sum of a group's activations:
//
//     sum over groups of  scale * (sum of (e + q) x)  -  scale * (zero + e) * (sum of x)
//
// Integers of 8 and 4 bit stay what they are, and the activations are fixed-point numbers
// (fixed_rows.h); vpdpbusd adds up four products of bytes, exactly. That is as many products for a
// register of weights, and next to nothing else: from the cache 8 bit is three quarters faster
// than by bfloat16s, 4 bit a fifth.
//
// Both pipes that multiply are to be busy all the time, and what else there is to do for a register
// of weights is as much again. So it counts: scales are decoded without a mask or a branch where
// that can be, and between the products, which leaves the processor a choice.

#include "unroll.h" // before the intrinsics: see there

#include "attention_bf16.h"
#include "e4m3_bf16.h"
#include "plain_bf16.h"
#include "rows.h"

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
    sum = dot(sum, weights_of<FORMAT, K, 0>(words), x[0]);
    return dot(sum, weights_of<FORMAT, K, 1>(words), x[1]);
}

// The same of fixed-point activations and weights that are whole numbers: of both planes exactly.
// Below 2^25, it is rounded once.
template <int32_t FORMAT, int K>
INLINE __m512 multiply_integers(__m512i bytes, const Row& row, int64_t vector) {
    const __m512i* x = row.columns + 2 * vector;
    if (FORMAT == HQQ4) bytes = _mm512_and_si512(bytes, _mm512_set1_epi8(K ? 0x0f : -0x10));
    __m512i sum = _mm512_castps_si512(fresh_zero());
    sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, bytes, x[0]), 8);
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(sum, bytes, x[1]));
}

constexpr __mmask64 ALL = ~__mmask64{0};

// Into the second cache: what memory can have under way is more than the first one waits for. Where
// computing takes longer than reading, 2 bit, even the way from there to the first is too long.
template <int32_t FORMAT> INLINE void prefetch(const uint8_t* bytes) {
    __builtin_prefetch(bytes + AHEAD, 0, FORMAT == HQQ2 ? 3 : 2);
}

template <int32_t FORMAT> INLINE void prefetch(const Places& from, int64_t column) {
    prefetch<FORMAT>(from.low + column);
    if (FORMAT == HQQ3) {
        prefetch<FORMAT>(from.below + column);
        prefetch<FORMAT>(from.high + column);
    }
}

// Vector `vector` of U units; `add(u, k, vector, sum, to)` adds up sums times their scale.
template <int32_t FORMAT, int U, class Add>
INLINE void multiply_vector(const Places* from, int64_t vector, __mmask64 mask, const Row& row,
                            const Add& add, __m512 (*sums)[rows_per_unit(FORMAT)]) {
    each<U>([&](auto u) INLINE_LAMBDA {
        prefetch<FORMAT>(from[u], vector * COLUMNS);
        const auto weights = [&] {
            if constexpr (is_fixed(FORMAT)) return load_bytes(from[u].low + vector * COLUMNS, mask);
            else return load<FORMAT>(from[u], vector * COLUMNS, mask);
        }();
        each<rows_per_unit(FORMAT)>([&](auto k) INLINE_LAMBDA {
            __m512 sum;
            if constexpr (is_fixed(FORMAT))
                sum = multiply_integers<FORMAT, k>(weights, row, vector);
            else sum = multiply_columns<FORMAT, k>(weights, row, vector);
            add(u, k, vector, sum, sums[u][k]);
        });
    });
}

// A scale for what sums of fixed-point activations count in, from group `group` on.
template <int32_t FORMAT, int K>
INLINE __m512 scale_of(__m512 scale, const Row& row, int64_t group) {
    if constexpr (!is_fixed(FORMAT)) return scale;
    if constexpr (left_of(FORMAT, K) > 0)
        scale = _mm512_mul_ps(scale, _mm512_set1_ps(1.0f / (1 << left_of(FORMAT, K))));
    return _mm512_mul_ps(scale, _mm512_loadu_ps(row.factors + group));
}

// By assembly, since the compiler would spread the scale over a register of its own.
INLINE void add_scaled(__m512 sum, const float& scale, __m512& to) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(to) : "v"(sum), "m"(scale));
}

constexpr int64_t BLOCK_VECTORS = 64; // whose scales are decoded at a time

// U units times a row of activations, groups of 64 or 128: a register has one group's columns,
// whose scale is taken from memory.
template <int32_t FORMAT, bool META, int U, bool ALIGNED>
INLINE void multiply_long_groups(const Product& p, const int64_t* units, const Row& row,
                                 __m512 (*sums)[rows_per_unit(FORMAT)]) {
    constexpr int R = rows_per_unit(FORMAT);
    const int shift = p.matrix.group_size == 128 ? 1 : 0;
    Places from[U];
    each<U>([&](auto u) INLINE_LAMBDA { from[u] = places<FORMAT>(p.matrix, p.base, units[u]); });
    alignas(64) float scales[U][R][BLOCK_VECTORS];
    const int64_t whole = p.matrix.columns / COLUMNS;
    for (int64_t begin = 0; begin < whole; begin += BLOCK_VECTORS) {
        const int64_t end = std::min(whole, begin + BLOCK_VECTORS);
        const int64_t first = begin >> shift, count = (end >> shift) - first;
        const auto decode = [&](int64_t group, auto mask) INLINE_LAMBDA {
            each<U * R>([&](auto i) INLINE_LAMBDA {
                constexpr int u = i / R, k = i % R;
                const __m512 scale = decode_scales<FORMAT, META, ALIGNED, k>(
                    p, units[u], first + group, mask, row, sums[u][k]);
                _mm512_store_ps(scales[u][k] + group,
                                scale_of<FORMAT, k>(scale, row, first + group));
            });
        };
        int64_t group = 0;
        for (; group + 16 <= count; group += 16) decode(group, AllLanes());
        if (group < count) decode(group, first_lanes(count - group));
        const auto add = [&](int u, int k, int64_t vector, __m512 sum, __m512& to) INLINE_LAMBDA {
            const float& scale = scales[u][k][(vector - begin) >> shift];
            if (is_fixed(FORMAT)) add_scaled(sum, scale, to);
            else to = _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), to);
        };
        for (int64_t vector = begin; vector < end; ++vector)
            multiply_vector<FORMAT, U>(from, vector, ALL, row, add, sums);
    }
}

// The same for groups of 16 or 32: a register has the columns of PER_VECTOR groups, four columns
// to a lane, and scales are spread over lanes from the register that they were decoded to.
template <int32_t FORMAT, int PER_VECTOR, bool META, int U, bool ALIGNED>
INLINE void multiply_short_groups(const Product& p, const int64_t* units, const Row& row,
                                  __m512 (*sums)[rows_per_unit(FORMAT)]) {
    constexpr int R = rows_per_unit(FORMAT);
    constexpr int64_t AT_ONCE = 16 / PER_VECTOR; // vectors that have 16 groups
    Places from[U];
    each<U>([&](auto u) INLINE_LAMBDA { from[u] = places<FORMAT>(p.matrix, p.base, units[u]); });
    const __m512i spread =
        PER_VECTOR == 2 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                        : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const int64_t columns = p.matrix.columns, whole = columns / COLUMNS;
    __m512 scales[U][R];
    const auto decode = [&](int64_t vector, auto mask) INLINE_LAMBDA {
        each<U * R>([&](auto i) INLINE_LAMBDA {
            constexpr int u = i / R, k = i % R;
            const __m512 scale = decode_scales<FORMAT, META, ALIGNED, k>(
                p, units[u], vector * PER_VECTOR, mask, row, sums[u][k]);
            scales[u][k] = scale_of<FORMAT, k>(scale, row, vector * PER_VECTOR);
        });
    };
    int64_t vector = 0;
    // Spread over the lanes of vector `at`, from those that begin with `vector`.
    const auto add = [&](int u, int k, int64_t at, __m512 sum, __m512& to) INLINE_LAMBDA {
        const __m512i group = _mm512_set1_epi32(static_cast<int>((at - vector) * PER_VECTOR));
        const __m512 scale =
            _mm512_permutexvar_ps(_mm512_add_epi32(spread, group), scales[u][k]);
        to = _mm512_fmadd_ps(sum, scale, to);
    };
    for (; vector + AT_ONCE <= whole; vector += AT_ONCE) {
        decode(vector, AllLanes());
        each<AT_ONCE>([&](auto i) INLINE_LAMBDA {
            multiply_vector<FORMAT, U>(from, vector + i, ALL, row, add, sums);
        });
    }
    if (vector * COLUMNS == columns) return;
    decode(vector, first_lanes(p.groups - vector * PER_VECTOR));
    for (int64_t at = vector; at < whole; ++at)
        multiply_vector<FORMAT, U>(from, at, ALL, row, add, sums);
    if (const __mmask64 mask = (__mmask64{1} << columns % COLUMNS) - 1)
        multiply_vector<FORMAT, U>(from, whole, mask, row, add, sums);
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

// The sums' lanes added up, into the results of a unit's rows, which are `stride` apart.
template <int R> INLINE void add_up(const __m512* sums, float* out, int64_t stride) {
    if constexpr (R == 1) *out = _mm512_reduce_add_ps(sums[0]);
    else if constexpr (R == 2) {
        const __m128 both = add_lanes(add_pairs(sums[0], sums[1]));
        out[0] = both[0] + both[2];
        out[stride] = both[1] + both[3];
    } else each<R / 4>([&](auto i) INLINE_LAMBDA {
        const __m512* here = sums + 4 * i;
        const __m128 four =
            add_lanes(add_fours(add_pairs(here[0], here[1]), add_pairs(here[2], here[3])));
        for (int k = 0; k < 4; ++k) out[(4 * i + k) * stride] = four[k];
    });
}

// The units at `units` times a row of activations.
template <int32_t FORMAT, int PER_VECTOR, bool META, int U>
void multiply_few(const Product& p, const int64_t* units, const Row& row, float* result) {
    constexpr int R = rows_per_unit(FORMAT);
    __m512 sums[U][R];
    each<U * R>([&](auto i) INLINE_LAMBDA { sums[i / R][i % R] = _mm512_setzero_ps(); });
    each<U>([&](auto u) INLINE_LAMBDA { prefetch_scales<FORMAT, META>(p, units[u]); });
    const auto multiply = [&](auto aligned) INLINE_LAMBDA {
        if constexpr (PER_VECTOR == 1)
            multiply_long_groups<FORMAT, META, U, aligned>(p, units, row, sums);
        else multiply_short_groups<FORMAT, PER_VECTOR, META, U, aligned>(p, units, row, sums);
    };
    // Without meta groups it does not matter where a row begins.
    if (!META || p.groups % 16 == 0) multiply(std::true_type());
    else multiply(std::false_type());
    each<U>([&](auto u) INLINE_LAMBDA { add_up<R>(sums[u], result + units[u], p.units); });
}

// Of one row of activations two units are computed at once, in different places: memory answers
// two streams faster than one, and the activations are loaded once for both. Below 4 bit there are
// too few registers.
constexpr int units_at_once(int32_t format) { return is_fixed(format) || is_e2m1(format) ? 2 : 1; }

template <int32_t FORMAT, int PER_VECTOR, bool META>
void multiply_units(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                    const uint8_t* prepared, float* result) {
    const Row row = row_of(m, prepared);
    Product p(m, base);
    const int64_t at_once = META ? Metas::units_at_once(p.groups) : last - first;
    for (int64_t begin = first; begin < last; begin += at_once) {
        const int64_t end = std::min(last, begin + at_once);
        for (int k = 0; META && k < rows_per_unit(FORMAT); ++k) {
            const int64_t from = (begin + k * p.units) * p.groups;
            const int64_t to = from + (end - begin) * p.groups;
            p.metas[k].decode(m, base, from, to, excess(FORMAT, k));
        }
        const int64_t pairs = units_at_once(FORMAT) == 2 ? (end - begin) / 2 : 0;
        for (int64_t unit = begin; unit < begin + pairs; ++unit) {
            const int64_t both[] = {unit, unit + pairs};
            multiply_few<FORMAT, PER_VECTOR, META, units_at_once(FORMAT)>(p, both, row, result);
        }
        for (int64_t unit = begin + 2 * pairs; unit < end; ++unit)
            multiply_few<FORMAT, PER_VECTOR, META, 1>(p, &unit, row, result);
    }
}

template <int32_t FORMAT, bool META>
void multiply_groups(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                     const uint8_t* prepared, float* result) {
    if (m.group_size == 16)
        multiply_units<FORMAT, 4, META>(m, base, first, last, prepared, result);
    else if (m.group_size == 32)
        multiply_units<FORMAT, 2, META>(m, base, first, last, prepared, result);
    else multiply_units<FORMAT, 1, META>(m, base, first, last, prepared, result);
}

template <int32_t FORMAT>
void multiply_quantized(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                        const uint8_t* prepared, float* result) {
    if (m.meta_group_size)
        multiply_groups<FORMAT, true>(m, base, first, last, prepared, result);
    else multiply_groups<FORMAT, false>(m, base, first, last, prepared, result);
}

// A row of activations by itself.
void multiply_row(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                  const uint8_t* prepared, float* result) {
    switch (m.format) {
    case HQQ8: return multiply_quantized<HQQ8>(m, base, first, last, prepared, result);
    case HQQ4: return multiply_quantized<HQQ4>(m, base, first, last, prepared, result);
    case HQQ3: return multiply_quantized<HQQ3>(m, base, first, last, prepared, result);
    case HQQ2: return multiply_quantized<HQQ2>(m, base, first, last, prepared, result);
    case MXFP4: return multiply_units<MXFP4, 2, false>(m, base, first, last, prepared, result);
    default: return multiply_units<NVFP4, 4, false>(m, base, first, last, prepared, result);
    }
}

void multiply(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
              const uint8_t* const* prepared, float* const* results, int64_t num_rows,
              int32_t type, Form form) {
    if (!is_fast(m, type))
        return generic::multiply(m, base, first, last, prepared, results, num_rows, type, form);
    if (m.format == BF16)
        return plain::multiply_with<plain::ByPairs>(m, base, first, last, prepared, results,
                                                    num_rows);
    if (is_e4m3(m.format)) {
        const bool long_groups = m.group_size % 128 == 0 || m.group_size >= m.columns;
        const auto multiply_e4m3 = long_groups ? plain::multiply_e4m3<plain::E4m3ByPairs<2>>
                                               : plain::multiply_e4m3<plain::E4m3ByPairs<1>>;
        return multiply_e4m3(m, base, first, last, prepared, results, num_rows);
    }
    form = form_here(m, type, form);
    if (form != ONE_ROW)
        return multiply_quantized_rows(m, base, first, last, prepared, results, num_rows,
                                       form == TWO_PLANES ? 2 : 1);
    // More than one where an expert is chosen twice for a token.
    for (int64_t n = 0; n < num_rows; ++n)
        multiply_row(m, base, first, last, prepared[n], results[n]);
}

} // namespace

extern const Variant VARIANT_AVX512BF16;
const Variant VARIANT_AVX512BF16 = {
    prepared_bytes,
    prepare,
    multiply,
    generic::dequantize,
    generic::activate,
    widen,
    narrow,
    round_all,
    tile::attend_bf16,
    tile::fold_bf16,
};
