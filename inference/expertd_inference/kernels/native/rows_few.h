// Products with a few rows of activations: registers of a tile are multiplied as soon as the
// transposition yields them, by both planes, so that no tile is stored. The sums of integers are
// exact, and what follows is rows_dots.h's add_group, group by group: the bits are those of any
// number of rows.
#pragma once

#include "rows_dots.h"

namespace {

// Formats whose groups are whole halves of a transposition, and whose tile is made of one.
constexpr bool has_few(int32_t format) {
    return format == HQQ8 || format == HQQ4 || is_e2m1(format);
}

// Or half of a half.
constexpr bool has_two_groups(int32_t format) { return format == NVFP4; }

// Register k of a vector's half, which is at columns[r] + at, times R rows.
template <int32_t FORMAT, int PLANES, int R>
INLINE void multiply_register(__m512i value, int k, const uint8_t* const* columns, int64_t at,
                              Integers<fields_of(FORMAT), R> (&sums)[PLANES]) {
    constexpr Fields FIELDS = fields_of(FORMAT);
    __m512i weights = value, second = value;
    if constexpr (FIELDS == NIBBLES) second = _mm512_and_si512(value, _mm512_set1_epi8(0x0f));
    if constexpr (FIELDS == TWO_BYTES) {
        weights = doubled_e2m1(_mm512_srli_epi16(value, 4));
        second = doubled_e2m1(value);
    }
    each<R>([&](auto r) INLINE_LAMBDA {
        each<PLANES>([&](auto plane) INLINE_LAMBDA {
            add_products<FIELDS>(sums[plane].of[r], weights, second,
                                 columns[r] + at + plane * COLUMNS + k * 4);
        });
    });
}

// Integers of a group in one sum for each row and field.
template <Fields FIELDS, int PLANES, int R>
INLINE const Integers<FIELDS, R>& join_planes(Integers<FIELDS, R> (&sums)[PLANES]) {
    if constexpr (PLANES == 2) {
        sums[0].shift_left();
        sums[0].add(sums[1]);
    }
    return sums[0];
}

// The groups of a strip, `num` of them from `group` on, of 16 units.
template <int32_t FORMAT, int PLANES, int R>
INLINE void multiply_few_groups(const uint8_t* from, int64_t stride, int64_t halves,
                                int64_t group, int64_t num, const float* scales, const Row* rows,
                                const uint8_t* const* columns, const uint8_t* ahead,
                                __m512 (*sums)[num_fields(FORMAT)]) {
    using Sums = Integers<fields_of(FORMAT), R>;
    const auto clear = [](Sums(&integers)[PLANES]) INLINE_LAMBDA {
        each<PLANES>([&](auto plane) INLINE_LAMBDA { integers[plane].clear(); });
    };
    const auto place_of_half = [](int64_t half) INLINE_LAMBDA {
        return half / 2 * PLANES * COLUMNS + half % 2 * (COLUMNS / 2);
    };
    const auto load_half = [&](int64_t half) INLINE_LAMBDA {
        each<LANES / 2>([&](auto line) INLINE_LAMBDA {
            __builtin_prefetch(ahead + half * (LANES * COLUMNS / 2) + line * 64, 0, 2);
        });
        const uint8_t* here = from + half * (COLUMNS / 2);
        return [here, stride](int i) INLINE_LAMBDA {
            return load_pair(here + i * stride, here + (i + 4) * stride);
        };
    };
    const int64_t end = group + num;
    if constexpr (has_two_groups(FORMAT)) {
        _Pragma("GCC unroll 1") for (int64_t half = group / 2; group < end; ++half) {
            __m512i pairs[8];
            transpose_pairs(load_half(half), pairs);
            each<2>([&](auto part) INLINE_LAMBDA {
                Sums integers[PLANES];
                clear(integers);
                each<4>([&](auto j) INLINE_LAMBDA {
                    multiply_register<FORMAT, PLANES, R>(
                        _mm512_shuffle_i32x4(pairs[j], pairs[4 + j], part ? 0xdd : 0x88),
                        part * 4 + j, columns, place_of_half(half), integers);
                });
                add_group(join_planes(integers), scales, rows, group, sums);
                scales += floats_per_group<FORMAT>;
                ++group;
            });
        }
        return;
    }
    int64_t half = group * halves;
    for (; group < end; ++group) {
        Sums integers[PLANES];
        clear(integers);
        _Pragma("GCC unroll 1") for (int64_t i = 0; i < halves; ++i, ++half)
            transpose_half(load_half(half), [&](auto k, __m512i value) INLINE_LAMBDA {
                multiply_register<FORMAT, PLANES, R>(value, k, columns, place_of_half(half),
                                                     integers);
            });
        add_group(join_planes(integers), scales, rows, group, sums);
        scales += floats_per_group<FORMAT>;
    }
}

// 16 units from `unit` on times R rows: added to sums, [row][field][unit].
template <int32_t FORMAT, int PLANES, int R>
__attribute__((noinline)) void multiply_few(const Matrix& m, const uint8_t* base, int64_t unit,
                                            const Row* rows, float* memory) {
    constexpr int F = num_fields(FORMAT);
    alignas(64) float scales[STRIP * floats_per_group<FORMAT>];
    StripMetas<FORMAT> metas;
    const uint8_t* columns[R];
    each<R>([&](auto r) INLINE_LAMBDA {
        columns[r] = reinterpret_cast<const uint8_t*>(rows[r].columns);
    });
    const uint8_t* from = places<FORMAT>(m, base, unit).low;
    const int64_t groups = num_groups(m), halves = m.group_size / (COLUMNS / 2);
    __m512 sums[R][F];
    each<R * F>([&](auto i) INLINE_LAMBDA { sums[i / F][i % F] = _mm512_setzero_ps(); });
    for (int64_t group = 0; group < groups; group += STRIP) {
        const int64_t num = std::min(STRIP, groups - group);
        decode_strip<FORMAT>(m, base, unit, LANES, group, num, metas, scales);
        prefetch_strip<FORMAT>(m, base, unit, group, num);
        multiply_few_groups<FORMAT, PLANES, R>(from, m.columns, halves, group, num, scales, rows,
                                               columns, from + LANES * m.columns, sums);
    }
    each<R * F>([&](auto i) INLINE_LAMBDA {
        _mm512_store_ps(memory + i * LANES, sums[i / F][i % F]);
    });
}

using MultiplyFew = void (*)(const Matrix&, const uint8_t*, int64_t, const Row*, float*);

// What multiplies rows as a block of that kind does; null if that is not done here.
template <int32_t FORMAT, int PLANES>
MultiplyFew few_of(const Matrix& m, const BlockKind& kind) {
    if constexpr (has_few(FORMAT)) {
        constexpr int MANY = most_rows(fields_of(FORMAT));
        static constexpr MultiplyFew FEW[] = {
            multiply_few<FORMAT, PLANES, 1>, multiply_few<FORMAT, PLANES, 2>,
            multiply_few<FORMAT, PLANES, 3>, multiply_few<FORMAT, PLANES, 4>,
            multiply_few<FORMAT, PLANES, MANY * 3 / 4>, multiply_few<FORMAT, PLANES, MANY>};
        const bool whole = m.columns % (COLUMNS / 2) == 0; // of two groups both are there
        if (has_two_groups(FORMAT) ? whole : m.group_size >= COLUMNS / 2)
            return FEW[kind.rows <= 4 ? kind.rows - 1 : kind.rows / 2 + 1];
    }
    return nullptr;
}

} // namespace
