// Tiles (rows_tiles.h) times rows of activations: the integers of a group are added up exactly,
// then scaled and added to what the groups before it gave. So the bits of a row are those of one
// chain of operations, whatever is computed beside it.
#pragma once

#include "rows_ahead.h"
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
    int64_t num_tiles, apart; // of a vector; registers from one tile to the next, or to the second
                              // of two bytes
    Ahead ahead;
};

// Four products more in each lane of each field's sum, with the double word at `columns`.
template <Fields FIELDS>
INLINE void add_products(__m512i* sums, __m512i weights, __m512i second, const uint8_t* columns) {
    // By assembly: with the intrinsic GCC 12 copies sums around, and spills them. Loads are what
    // there is least room for, so two products share one.
    const auto& four = *reinterpret_cast<const int32_t*>(columns);
    if constexpr (FIELDS == WHOLE_BYTE) {
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums[0]) : "v"(weights), "m"(four));
    } else {
        const __m512i spread = _mm512_set1_epi32(four);
        asm("vpdpbusd %2, %1, %0" : "+v"(sums[0]) : "v"(weights), "v"(spread));
        asm("vpdpbusd %2, %1, %0" : "+v"(sums[1]) : "v"(second), "v"(spread));
    }
}

template <Fields FIELDS, int R> struct Integers {
    __m512i of[R][num_fields(FIELDS)];

    // f(sum) of each.
    template <class F> INLINE void each_sum(const F& f) {
        each<R * num_fields(FIELDS)>([&](auto i) INLINE_LAMBDA {
            f(of[i / num_fields(FIELDS)][i % num_fields(FIELDS)]);
        });
    }

    INLINE void clear() {
        each_sum([](__m512i& sum) INLINE_LAMBDA { sum = _mm512_setzero_si512(); });
    }

    INLINE void shift_left() {
        each_sum([](__m512i& sum) INLINE_LAMBDA { sum = _mm512_slli_epi32(sum, 8); });
    }

    INLINE void add(const Integers& other) {
        each<R * num_fields(FIELDS)>([&](auto i) INLINE_LAMBDA {
            constexpr int r = i / num_fields(FIELDS), f = i % num_fields(FIELDS);
            of[r][f] = _mm512_add_epi32(of[r][f], other.of[r][f]);
        });
    }
};

// `steps` registers of a tile, of one vector, times the columns at columns[r] + at, of P planes. In
// turn they go to S sums each.
template <Fields FIELDS, int R, int P, int S>
INLINE void multiply_steps(const __m512i* tile, int64_t apart, int64_t steps,
                           const uint8_t* const* columns, int64_t at,
                           Integers<FIELDS, R> (&sums)[P][S]) {
    _Pragma("GCC unroll 1") for (const __m512i* end = tile + steps; tile != end; tile += 4) {
        each<4>([&](auto k) INLINE_LAMBDA {
            const __m512i weights = tile[k];
            __m512i second = weights;
            if constexpr (FIELDS == NIBBLES)
                second = _mm512_and_si512(weights, _mm512_set1_epi8(0x0f));
            if constexpr (FIELDS == TWO_BYTES) second = tile[apart + k];
            each<R>([&](auto r) INLINE_LAMBDA {
                each<P>([&](auto plane) INLINE_LAMBDA {
                    add_products<FIELDS>(sums[plane][k % S].of[r], weights, second,
                                         columns[r] + at + plane * COLUMNS + k * 4);
                });
            });
        });
        at += 16;
    }
}

// A group's registers times its columns, of all planes: exactly.
template <Fields FIELDS, int PLANES, int R>
INLINE Integers<FIELDS, R> multiply_group(const __m512i* tile, int64_t apart, int64_t steps,
                                          const uint8_t* const* columns, int64_t at) {
    // Of a few rows there are more sums than one for each, since a sum waits for the one before:
    // the planes have their own, and if need be several in turn.
    constexpr int COUNT = R * num_fields(FIELDS);
    constexpr int OWN = COUNT <= 8 ? PLANES : 1;
    constexpr int TURNS = COUNT * OWN >= 4 ? 1 : 4 / (COUNT * OWN);
    Integers<FIELDS, R> sums[OWN][TURNS];
    each<OWN * TURNS>([&](auto i) INLINE_LAMBDA { sums[i / TURNS][i % TURNS].clear(); });
    const auto multiply = [&](int64_t plane) INLINE_LAMBDA {
        int64_t left = steps, from = at + plane * COLUMNS;
        const __m512i* registers = tile;
        for (; left > 16; left -= 16, registers += 16, from += PLANES * COLUMNS)
            multiply_steps(registers, apart, 16, columns, from, sums);
        multiply_steps(registers, apart, left, columns, from, sums);
    };
    multiply(0);
    if constexpr (OWN < PLANES) {
        sums[0][0].shift_left();
        multiply(1);
    }
    each<OWN*(TURNS - 1)>([&](auto i) INLINE_LAMBDA {
        sums[i / (TURNS - 1)][0].add(sums[i / (TURNS - 1)][i % (TURNS - 1) + 1]);
    });
    if constexpr (OWN == 2) {
        sums[0][0].shift_left();
        sums[0][0].add(sums[1][0]);
    }
    return sums[0][0];
}

// A group's scaled sum is (sum - zero * sum of activations) * scale; the row's unit is in both.
template <Fields FIELDS, int R>
INLINE void add_group(const Integers<FIELDS, R>& integers, const float* scales, const Row* rows,
                      int64_t group, __m512 (*sums)[num_fields(FIELDS)]) {
    constexpr int F = num_fields(FIELDS);
    __m512 scale[F], zero[F];
    each<F>([&](auto f) INLINE_LAMBDA {
        scale[f] = _mm512_load_ps(scales + f * 2 * LANES);
        zero[f] = _mm512_load_ps(scales + (f * 2 + 1) * LANES);
    });
    each<R>([&](auto r) INLINE_LAMBDA {
        const __m512 factor = _mm512_set1_ps(rows[r].factors[group]);
        const __m512 sum = _mm512_set1_ps(rows[r].sums[group]);
        each<F>([&](auto f) INLINE_LAMBDA {
            __m512i value = integers.of[r][f];
            if constexpr (FIELDS == NIBBLES && f == 0)
                value = _mm512_sub_epi32(value, integers.of[r][1]);
            __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(value), factor);
            part = _mm512_fnmadd_ps(zero[f], sum, part);
            sums[r][f] = _mm512_fmadd_ps(part, scale[f], sums[r][f]);
        });
    });
}

template <Fields FIELDS, int PLANES, int R>
__attribute__((noinline)) void multiply_piece(const Piece& piece) {
    constexpr int64_t VECTOR = PLANES * COLUMNS, F = num_fields(FIELDS);
    const Row* const rows = piece.rows;
    const uint8_t* columns[R];
    each<R>([&](auto r) INLINE_LAMBDA {
        columns[r] = reinterpret_cast<const uint8_t*>(rows[r].columns) + piece.vector * VECTOR;
    });
    const int64_t steps = piece.steps, end = piece.num_vectors * 16;
    Ahead ahead = piece.ahead;
    for (int64_t t = 0; t < piece.num_tiles; ++t) {
        const __m512i* tile = piece.tiles + t * piece.apart;
        const float* scales = piece.scales + t * F * 2 * LANES;
        auto* const memory = reinterpret_cast<__m512(*)[F]>(piece.sums + t * R * F * LANES);
        const auto multiply = [&](__m512(*sums)[F]) INLINE_LAMBDA {
            int64_t group = piece.group;
            for (int64_t step = 0; step < end; step += steps, ++group) {
                const int64_t at = step / 16 * VECTOR + step % 16 * 4;
                const auto integers = multiply_group<FIELDS, PLANES, R>(
                    tile + step, piece.apart, steps, columns, at);
                add_group(integers, scales, rows, group, sums);
                ahead.advance();
                scales += piece.num_tiles * F * 2 * LANES;
            }
        };
        if constexpr (R * F <= 8) { // there is room for them in registers
            __m512 sums[R][F];
            each<R * F>([&](auto i) INLINE_LAMBDA { sums[i / F][i % F] = memory[i / F][i % F]; });
            multiply(sums);
            each<R * F>([&](auto i) INLINE_LAMBDA { memory[i / F][i % F] = sums[i / F][i % F]; });
        } else multiply(memory);
    }
}

using MultiplyPiece = void (*)(const Piece&);

// What multiplies some rows together, and how many it takes: their sums stay in registers. Blocks
// of other sizes are filled up.
struct BlockKind {
    int rows;
    MultiplyPiece multiply;
};

// Of so many rows the integer sums of both planes stay in registers, too.
constexpr int most_rows(Fields fields) { return fields == WHOLE_BYTE ? 8 : 4; }
constexpr int MOST_ROWS = 8;

// The smallest kind that takes so many rows, at most most_rows.
template <Fields FIELDS, int PLANES> const BlockKind& kind_of(int64_t num_rows) {
    constexpr int MANY = most_rows(FIELDS);
    static constexpr BlockKind KINDS[] = {
        {1, multiply_piece<FIELDS, PLANES, 1>},
        {2, multiply_piece<FIELDS, PLANES, 2>},
        {3, multiply_piece<FIELDS, PLANES, 3>},
        {4, multiply_piece<FIELDS, PLANES, 4>},
        {MANY * 3 / 4, multiply_piece<FIELDS, PLANES, MANY * 3 / 4>},
        {MANY, multiply_piece<FIELDS, PLANES, MANY>}};
    const BlockKind* kind = KINDS;
    while (kind->rows < num_rows) ++kind;
    return *kind;
}

} // namespace
