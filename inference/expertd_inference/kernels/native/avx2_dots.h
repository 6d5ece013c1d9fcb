// Tiles (avx2_tiles.h) times rows of activations, in the order of rows_dots.h, so with its bits: the
// integers of a group are added up exactly, then scaled and added to what the groups before gave.
//
// Activations of 16 bits are words, and so become weights, of the even columns and of the odd ones:
// vpmaddwd adds up pairs of their products in 32 bits. Those of 8 bits are bytes, and vpmaddubsw adds
// up pairs of products in 16 bits, which have room for some of them; but of 8-bit weights not for
// one pair, so there they are words, too.
#pragma once

#include "avx2_scales.h"
#include "rows_ahead.h"

namespace {

// Some vectors of 16 units, and the rows that they are multiplied with.
struct Piece {
    const Line* tiles;   // [tile][vector][16]
    const float* scales; // of the first group on, as avx2_scales.h has them
    const Row* rows;
    float* sums; // [tile][row][unit], added to
    int64_t vector, num_vectors, group;
    int64_t steps;            // lines of a group: 4, 8, 16, or 32 of two vectors
    int64_t num_tiles, apart; // of a vector; lines from one tile to the next
    Ahead ahead;
};

// Sums of 16 units for each of some rows.
template <int R> using Integers = __m256i[R][2];

INLINE __m256i four_bytes(const uint8_t* columns) {
    int32_t value;
    memcpy(&value, columns, 4);
    return _mm256_set1_epi32(value);
}

// Two products more in each lane, or by bytes in each half of one. By assembly: GCC 12 puts products
// aside, for which there are too few registers, and adds them up later.
INLINE void add_products(__m256i& sum, __m256i weights, __m256i columns) {
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
        : "+x"(sum), "=&x"(products)
        : "x"(weights), "x"(columns));
}

INLINE void add_byte_products(__m256i& sum, __m256i weights, __m256i columns) {
    __m256i products;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
        : "+x"(sum), "=&x"(products)
        : "x"(weights), "x"(columns));
}

template <int R>
INLINE void multiply_words(const Line* tile, int64_t steps, const uint8_t* const* columns,
                           int64_t at, Integers<R>& sums) {
    const auto add = [&](__m256i first, __m256i second, int64_t here) INLINE_LAMBDA {
        each<R>([&](auto r) INLINE_LAMBDA {
            const __m256i x = four_bytes(columns[r] + here);
            add_products(sums[r][0], first, x);
            add_products(sums[r][1], second, x);
        });
    };
    const __m256i even = _mm256_set1_epi16(0xff);
    for (const Line* const end = tile + steps; tile != end; ++tile, at += 8) {
        const __m256i first = tile->half[0], second = tile->half[1];
        add(_mm256_and_si256(first, even), _mm256_and_si256(second, even), at);
        add(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8), at + 4);
    }
}

// As many steps as 16 bits have room for, a power of two: each adds two products to them.
constexpr int64_t steps_of_bytes(Fields largest) {
    int64_t steps = 32;
    while (steps * 2 * 127 * largest > 32767) steps /= 2;
    return steps;
}

template <Fields LARGEST, int R>
INLINE void multiply_bytes(const Line* tile, int64_t steps, const uint8_t* const* columns,
                           int64_t at, Integers<R>& sums) {
    constexpr int64_t MOST = steps_of_bytes(LARGEST);
    static_assert(MOST >= 4, "a group's steps are multiples of 4");
    const int64_t at_once = steps < MOST ? steps : MOST;
    for (const Line* const end = tile + steps; tile != end;) {
        Integers<R> words;
        each<R * 2>([&](auto i) INLINE_LAMBDA { words[i / 2][i % 2] = _mm256_setzero_si256(); });
        for (const Line* const some = tile + at_once; tile != some; ++tile, at += 4) {
            const __m256i first = tile->half[0], second = tile->half[1];
            each<R>([&](auto r) INLINE_LAMBDA {
                const __m256i x = four_bytes(columns[r] + at);
                add_byte_products(words[r][0], first, x);
                add_byte_products(words[r][1], second, x);
            });
        }
        each<R * 2>([&](auto i) INLINE_LAMBDA {
            __m256i& sum = sums[i / 2][i % 2];
            sum = _mm256_add_epi32(
                sum, _mm256_madd_epi16(words[i / 2][i % 2], _mm256_set1_epi16(1)));
        });
    }
}

// A group's scaled sum is (sum - zero * sum of activations) * scale; the row's unit is in both.
template <int R>
INLINE void add_group(const Integers<R>& integers, const float* scales, const Row* rows,
                      int64_t group, float* sums) {
    each<2>([&](auto half) INLINE_LAMBDA {
        const __m256 scale = _mm256_load_ps(scales + half * 8);
        const __m256 zero = _mm256_load_ps(scales + LANES + half * 8);
        each<R>([&](auto r) INLINE_LAMBDA {
            const __m256 factor = _mm256_set1_ps(rows[r].factors[group]);
            const __m256 sum = _mm256_set1_ps(rows[r].sums[group]);
            __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(integers[r][half]), factor);
            part = _mm256_fnmadd_ps(zero, sum, part);
            float* const to = sums + r * LANES + half * 8;
            _mm256_store_ps(to, _mm256_fmadd_ps(part, scale, _mm256_load_ps(to)));
        });
    });
}

template <Fields LARGEST, bool WORDS, int R>
__attribute__((noinline)) void multiply_piece(const Piece& piece) {
    constexpr int64_t STEP = WORDS ? 8 : 4; // bytes of activations
    const uint8_t* columns[R];
    each<R>([&](auto r) INLINE_LAMBDA {
        columns[r] = reinterpret_cast<const uint8_t*>(piece.rows[r].columns) +
                     piece.vector * 16 * STEP;
    });
    const int64_t steps = piece.steps, end = piece.num_vectors * 16;
    Ahead ahead = piece.ahead;
    for (int64_t t = 0; t < piece.num_tiles; ++t) {
        const Line* const tile = piece.tiles + t * piece.apart;
        const float* scales = piece.scales + t * 2 * LANES;
        int64_t group = piece.group;
        for (int64_t step = 0; step < end; step += steps, ++group) {
            Integers<R> sums;
            each<R * 2>([&](auto i) INLINE_LAMBDA { sums[i / 2][i % 2] = _mm256_setzero_si256(); });
            if constexpr (WORDS) multiply_words<R>(tile + step, steps, columns, step * STEP, sums);
            else multiply_bytes<LARGEST, R>(tile + step, steps, columns, step * STEP, sums);
            add_group<R>(sums, scales, piece.rows, group, piece.sums + t * R * LANES);
            ahead.advance();
            scales += piece.num_tiles * 2 * LANES;
        }
    }
}

using MultiplyPiece = void (*)(const Piece&);

// What multiplies some rows together, and how many it takes: their sums stay in registers.
struct BlockKind {
    int rows;
    MultiplyPiece multiply;
};

constexpr int MOST_ROWS = 4;
constexpr int most_rows(Fields) { return MOST_ROWS; }

// The kind for so many rows, at most MOST_ROWS.
template <Fields LARGEST, int PLANES> const BlockKind& kind_of(int64_t num_rows) {
    constexpr bool WORDS = PLANES == 2 || LARGEST == EIGHT_BITS;
    constexpr Fields FIELDS = WORDS ? EIGHT_BITS : LARGEST; // words are alike
    static constexpr BlockKind KINDS[] = {
        {1, multiply_piece<FIELDS, WORDS, 1>}, {2, multiply_piece<FIELDS, WORDS, 2>},
        {3, multiply_piece<FIELDS, WORDS, 3>}, {4, multiply_piece<FIELDS, WORDS, 4>}};
    return KINDS[num_rows - 1];
}

// As rows_few.h's: there is none, since sums take half of the registers that it would need.
using MultiplyFew = void (*)(const Matrix&, const uint8_t*, int64_t, const Row*, float*);
template <int32_t FORMAT, int PLANES> MultiplyFew few_of(const Matrix&, const BlockKind&) {
    return nullptr;
}

} // namespace
