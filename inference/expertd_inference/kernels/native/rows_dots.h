// Tiles (rows_tiles.h) times rows of activations: the integers of a group are added up exactly,
// then scaled and added to what the groups before it gave. So the bits of a row are those of one
// chain of operations, whatever is computed beside it.
#pragma once

#include "rows_scales.h"

namespace {

// Some vectors of 16 units, and the rows that they are multiplied with.
struct Piece {
    const __m512i* tiles; // [tile][vector][16]
    const float* scales;  // of the first group on, as rows_scales.h has them
    const Row* rows;
    float* sums; // [tile][row][field][unit], added to
    int64_t vector, num_vectors, group;
    int64_t steps;            // registers of a group: 4, 8, 16, or 32 of two vectors
    int64_t num_tiles, apart; // of a vector; registers from one tile to the next
};

// Four products more in each lane, with the double word at `columns`.
INLINE void add_products(__m512i& sum, __m512i weights, const uint8_t* columns) {
    // By assembly: with the intrinsic GCC 12 copies sums around, and spills them.
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(sum)
        : "v"(weights), "m"(*reinterpret_cast<const int32_t*>(columns)));
}

template <int FIELDS, int R> using Integers = __m512i[R][FIELDS];

// `steps` registers of a tile, of one vector, times the columns at columns[r] + at.
template <int FIELDS, int R, class... Sums>
INLINE void multiply_steps(const __m512i* tile, int64_t steps, const uint8_t* const* columns,
                           int64_t at, Sums&... planes) {
    _Pragma("GCC unroll 1") for (const __m512i* end = tile + steps; tile != end; tile += 4) {
        each<4>([&](auto k) INLINE_LAMBDA {
            const __m512i weights = tile[k];
            const __m512i low = _mm512_and_si512(weights, _mm512_set1_epi8(0x0f));
            each<R>([&](auto r) INLINE_LAMBDA {
                const uint8_t* here = columns[r] + at + k * 4;
                const auto add = [&](auto& sums, const uint8_t* from) INLINE_LAMBDA {
                    add_products(sums[r][0], weights, from);
                    if constexpr (FIELDS == 2) add_products(sums[r][1], low, from);
                };
                int64_t plane = 0;
                (add(planes, here + COLUMNS * plane++), ...);
            });
        });
        at += 16;
    }
}

// A group's registers times its columns, of all planes: exactly.
template <int FIELDS, int PLANES, int R>
INLINE void multiply_group(const __m512i* tile, int64_t steps, const uint8_t* const* columns,
                           int64_t at, Integers<FIELDS, R>& sums) {
    const auto each_sum = [&](const auto& f) INLINE_LAMBDA {
        each<R * FIELDS>([&](auto i) INLINE_LAMBDA {
            f(std::integral_constant<int, i / FIELDS>(), std::integral_constant<int, i % FIELDS>());
        });
    };
    each_sum([&](auto r, auto f) INLINE_LAMBDA { sums[r][f] = _mm512_setzero_si512(); });
    const auto both = [&](auto&... planes) INLINE_LAMBDA {
        for (; steps > 16; steps -= 16, tile += 16, at += PLANES * COLUMNS)
            multiply_steps<FIELDS, R>(tile, 16, columns, at, planes...);
        multiply_steps<FIELDS, R>(tile, steps, columns, at, planes...);
    };
    if constexpr (PLANES == 2 && R * FIELDS < 8) {
        // Of a few rows each plane has sums of its own, since a sum waits for the one before.
        Integers<FIELDS, R> upper;
        each_sum([&](auto r, auto f) INLINE_LAMBDA { upper[r][f] = _mm512_setzero_si512(); });
        both(upper, sums);
        each_sum([&](auto r, auto f) INLINE_LAMBDA {
            sums[r][f] = _mm512_add_epi32(sums[r][f], _mm512_slli_epi32(upper[r][f], 8));
        });
    } else if constexpr (PLANES == 2) {
        const int64_t all = steps, from = at;
        const __m512i* const first = tile;
        both(sums);
        each_sum([&](auto r, auto f) INLINE_LAMBDA {
            sums[r][f] = _mm512_slli_epi32(sums[r][f], 8);
        });
        steps = all, at = from + COLUMNS, tile = first;
        both(sums);
    } else both(sums);
}

// A group's scaled sum is (sum - zero * sum of activations) * scale; the row's unit is in both.
template <int FIELDS, int R>
INLINE void add_group(const Integers<FIELDS, R>& integers, const float* scales, const Row* rows,
                      int64_t group, float* sums) {
    __m512 scale[FIELDS], zero[FIELDS];
    each<FIELDS>([&](auto f) INLINE_LAMBDA {
        scale[f] = _mm512_load_ps(scales + f * 2 * LANES);
        zero[f] = _mm512_load_ps(scales + (f * 2 + 1) * LANES);
    });
    each<R>([&](auto r) INLINE_LAMBDA {
        const __m512 factor = _mm512_set1_ps(rows[r].factors[group]);
        const __m512 sum = _mm512_set1_ps(rows[r].sums[group]);
        each<FIELDS>([&](auto f) INLINE_LAMBDA {
            __m512i value = integers[r][f];
            if constexpr (FIELDS == 2 && f == 0) value = _mm512_sub_epi32(value, integers[r][1]);
            float* const to = sums + (r * FIELDS + f) * LANES;
            __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(value), factor);
            part = _mm512_fnmadd_ps(zero[f], sum, part);
            _mm512_store_ps(to, _mm512_fmadd_ps(part, scale[f], _mm512_load_ps(to)));
        });
    });
}

template <int FIELDS, int PLANES, int R>
__attribute__((noinline)) void multiply_piece(const Piece& piece) {
    constexpr int64_t VECTOR = PLANES * COLUMNS;
    const Row* const rows = piece.rows;
    const uint8_t* columns[R];
    each<R>([&](auto r) INLINE_LAMBDA {
        columns[r] = reinterpret_cast<const uint8_t*>(rows[r].columns) + piece.vector * VECTOR;
    });
    const int64_t steps = piece.steps, end = piece.num_vectors * 16;
    for (int64_t t = 0; t < piece.num_tiles; ++t) {
        const __m512i* tile = piece.tiles + t * piece.apart;
        const float* scales = piece.scales + t * FIELDS * 2 * LANES;
        float* sums = piece.sums + t * R * FIELDS * LANES;
        int64_t group = piece.group;
        for (int64_t step = 0; step < end; step += steps, ++group) {
            Integers<FIELDS, R> integers;
            const int64_t at = step / 16 * VECTOR + step % 16 * 4;
            multiply_group<FIELDS, PLANES, R>(tile + step, steps, columns, at, integers);
            add_group<FIELDS, R>(integers, scales, rows, group, sums);
            scales += piece.num_tiles * FIELDS * 2 * LANES;
        }
    }
}

using MultiplyPiece = void (*)(const Piece&);

// What multiplies some rows together, and how many it takes: their sums stay in registers. Blocks
// of other sizes are filled up.
struct BlockKind {
    int rows;
    MultiplyPiece multiply;
};

constexpr int MOST_ROWS = 8;

// The smallest kind that takes so many rows, at most MOST_ROWS.
template <int FIELDS, int PLANES> const BlockKind& kind_of(int64_t num_rows) {
    static constexpr BlockKind KINDS[] = {
        {1, multiply_piece<FIELDS, PLANES, 1>}, {2, multiply_piece<FIELDS, PLANES, 2>},
        {3, multiply_piece<FIELDS, PLANES, 3>}, {4, multiply_piece<FIELDS, PLANES, 4>},
        {6, multiply_piece<FIELDS, PLANES, 6>}, {8, multiply_piece<FIELDS, PLANES, 8>}};
    const BlockKind* kind = KINDS;
    while (kind->rows < num_rows) ++kind;
    return *kind;
}

} // namespace
