// Attention of one tile, for the instruction set of the file that includes this.
//
// A piece of the sequence at a time: all its scores, their softmax, then the sum of its values.
// Keys of a block are transposed, so that the lanes of a register are tokens, whose scores need no
// sum over lanes; of values the lanes are columns. Either way a query's arithmetic is one chain in
// one order, whatever other queries are computed beside it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention.h"
#include "values.h"

namespace {
namespace tile {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t LaneBits __attribute__((vector_size(4 * LANES)));

#define TILE_INLINE inline __attribute__((always_inline))
// One copy, so that products are fused with the same sums wherever it is called.
#define TILE_ONCE __attribute__((noinline))

constexpr float LOG2_E = 1.44269504088896340736f;

// A later block, to be asked for while one is computed; null: none.
struct Ahead {
    const uint8_t* next = nullptr;
};

TILE_INLINE Lanes load(const float* from) {
    Lanes lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

TILE_INLINE void store(float* to, Lanes lanes) { memcpy(to, &lanes, sizeof lanes); }

TILE_INLINE Lanes all(float value) { return value + Lanes{}; }

// 2^x of what is at most 0; below 2^-126 it is 0. A polynomial of 2^f on [-1/2, 1/2], fitted for
// the least relative error, 2e-9, and 1 at 0.
TILE_INLINE Lanes power(Lanes x) {
    const float magic = 0x1.8p23f; // a sum with it has no digits after the point
    const Lanes whole = x + magic;
    const Lanes f = x - (whole - magic);
    Lanes p = all(0x1.41fbbcp-13f);
    p = p * f + 0x1.5f3e52p-10f;
    p = p * f + 0x1.3b2d4cp-7f;
    p = p * f + 0x1.c6aee8p-5f;
    p = p * f + 0x1.ebfbdcp-3f;
    p = p * f + 0x1.62e430p-1f;
    p = p * f + 1.0f;
    const Lanes result = (Lanes)((LaneBits)p + ((LaneBits)whole << 23));
    return x >= -126.0f ? result : (x < -126.0f ? Lanes{} : x); // NaN stays NaN
}

TILE_INLINE Lanes greater(Lanes x, Lanes y) { return x > y ? x : y; }

template <class Operation> TILE_INLINE float reduce(Lanes lanes, const Operation& operation) {
    float values[LANES];
    memcpy(values, &lanes, sizeof lanes);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; ++i) values[i] = operation(values[i], values[i + n]);
    return values[0];
}

TILE_INLINE float largest_of(Lanes lanes) {
    return reduce(lanes, [](float x, float y) { return x > y ? x : y; });
}

TILE_INLINE float sum_of(Lanes lanes) {
    return reduce(lanes, [](float x, float y) { return x + y; });
}

// Queries of a tile, and what they see. Number i is of row i / num_heads.
struct View {
    const AttentionTile& t;
    const AttentionCall& c;

    explicit View(const AttentionTile& t) : t(t), c(*t.call) {}

    int64_t seen(int64_t query) const { return t.position + query / t.num_heads + 1; }
    int64_t before(int64_t query) const {
        return c.window ? std::max<int64_t>(0, seen(query) - c.window) : 0;
    }
    template <class T> const T* query(int64_t i) const {
        return static_cast<const T*>(c.query) + (t.first_row + i / t.num_heads) * c.query_row +
               (t.first_head + i % t.num_heads) * c.query_head;
    }
    int64_t out(int64_t i) const {
        return (t.first_row + i / t.num_heads) * c.out_row +
               (t.first_head + i % t.num_heads) * c.out_head;
    }
    int64_t slot(int64_t block) const {
        return (t.blocks[block] * c.kv_heads + t.kv) * BLOCK_TOKENS;
    }
};

// Calls `at` with as many queries of [first, last) as registers hold at once: AT_ONCE, or fewer.
template <int AT_ONCE, class Call>
TILE_INLINE void in_groups(int64_t first, int64_t last, const Call& call) {
    for (; first + AT_ONCE <= last; first += AT_ONCE)
        call(first, std::integral_constant<int, AT_ONCE>());
    if constexpr (AT_ONCE > 1) in_groups<AT_ONCE / 2>(first, last, call);
}

// Arithmetic in float32 of any type.
struct Generic {
    static constexpr int AT_ONCE = LANES == 16 ? 8 : 4; // queries
    static constexpr int FEW = 4; // up to which more is done for keys than with them

    const View view;
    const AttentionCall& c;
    const TileScratch& scratch;
    const int64_t size;

    explicit Generic(const AttentionTile& t)
        : view(t), c(*t.call), scratch(t.scratch), size(c.type == F32 ? 4 : 2) {}

    void load_queries() const {
        for (int64_t i = 0; i < view.t.num_queries(); ++i) {
            float* to = scratch.queries + i * c.key_width;
            if (c.type == F32) widen(view.query<float>(i), F32, c.key_width, to);
            else widen(view.query<uint16_t>(i), c.type, c.key_width, to);
        }
    }

    const uint8_t* key_block(int64_t block) const {
        return static_cast<const uint8_t*>(c.keys) + view.slot(block) * c.key_width * size;
    }
    const uint8_t* value_block(int64_t block) const {
        return static_cast<const uint8_t*>(c.values) + view.slot(block) * c.value_width * size;
    }

    // [key_width][BLOCK_TOKENS]
    void load_keys(int64_t block, int64_t tokens, Ahead) const {
        const uint8_t* from = key_block(block);
        auto* to = reinterpret_cast<float*>(scratch.keys);
        for (int64_t token = 0; token < tokens; ++token) {
            float* row = scratch.values; // the block of values comes later
            widen(from + token * c.key_width * size, c.type, c.key_width, row);
            for (int64_t k = 0; k < c.key_width; ++k) to[k * BLOCK_TOKENS + token] = row[k];
        }
    }

    void load_values(int64_t block, int64_t tokens) const {
        const int64_t width = padded_width(c.value_width);
        const uint8_t* from = value_block(block);
        for (int64_t token = 0; token < tokens; ++token) {
            float* to = scratch.values + token * width;
            widen(from + token * c.value_width * size, c.type, c.value_width, to);
            memset(to + c.value_width, 0, (width - c.value_width) * sizeof(float));
        }
    }

    // Scores of queries [first, first + Q) with tokens of the block that was loaded.
    template <int Q> void dots(int64_t first, int64_t tokens, float* scores, Ahead) const {
        const auto* keys = reinterpret_cast<const float*>(scratch.keys);
        const float* queries = scratch.queries + first * c.key_width;
        for (int64_t token = 0; token < tokens; token += 2 * LANES) {
            Lanes sums[Q][2] = {};
            for (int64_t k = 0; k < c.key_width; ++k) {
                const Lanes low = load(keys + k * BLOCK_TOKENS + token);
                const Lanes high = load(keys + k * BLOCK_TOKENS + token + LANES);
                for (int q = 0; q < Q; ++q) {
                    const float x = queries[q * c.key_width + k];
                    sums[q][0] += low * x;
                    sums[q][1] += high * x;
                }
            }
            for (int q = 0; q < Q; ++q) {
                store(scores + q * SCORE_STRIDE + token, sums[q][0]);
                store(scores + q * SCORE_STRIDE + token + LANES, sums[q][1]);
            }
        }
    }

    // Adds the values of tokens [from, to) of the block, times powers, to Q rows of sums.
    template <int Q>
    void mix(int64_t, int64_t from, int64_t to, const float* powers, float* sums, Ahead) const {
        const int64_t width = padded_width(c.value_width);
        for (int64_t column = 0; column < width; column += 2 * LANES) {
            Lanes mixed[Q][2];
            for (int q = 0; q < Q; ++q)
                for (int half = 0; half < 2; ++half)
                    mixed[q][half] = load(sums + q * width + column + half * LANES);
            for (int64_t token = from; token < to; ++token) {
                const float* values = scratch.values + token * width + column;
                const Lanes low = load(values), high = load(values + LANES);
                for (int q = 0; q < Q; ++q) {
                    const float p = powers[q * SCORE_STRIDE + token];
                    mixed[q][0] += low * p;
                    mixed[q][1] += high * p;
                }
            }
            for (int q = 0; q < Q; ++q)
                for (int half = 0; half < 2; ++half)
                    store(sums + q * width + column + half * LANES, mixed[q][half]);
        }
    }

    // A row of sums, times `factor`, to its place; `sums` may be changed.
    void write(int64_t query, float* sums, float factor) const {
        for (int64_t i = 0; i < padded_width(c.value_width); i += LANES)
            store(sums + i, load(sums + i) * factor + 0.0f); // -0 becomes 0: see attend()
        void* to = c.type == F32
                       ? static_cast<void*>(static_cast<float*>(c.out) + view.out(query))
                       : static_cast<void*>(static_cast<uint16_t*>(c.out) + view.out(query));
        narrow(sums, c.value_width, c.type, to);
    }
};

// Of queries: largest score and sum of powers of 2, scores being logarithms to base 2.
struct Partial {
    float *largest, *totals, *sums;

    explicit Partial(float* floats)
        : largest(floats), totals(floats + MAX_QUERIES), sums(floats + 2 * MAX_QUERIES) {}
};

// softcap * tanh(score / softcap), in logarithms to base 2.
TILE_INLINE void cap_scores(float* scores, int64_t count, const AttentionCall& c) {
    const float inner = c.scale / c.softcap * 2 * LOG2_E, outer = c.softcap * LOG2_E;
    for (int64_t i = 0; i < count; i += LANES) {
        const Lanes x = load(scores + i) * inner;
        const Lanes small = power(x < 0.0f ? x : -x);
        const Lanes size = (1.0f - small) / (1.0f + small) * outer;
        store(scores + i, x < 0.0f ? -size : size);
    }
}

// Scores [0, count) of the tokens from `start` on become powers; what the query does not see, 0.
TILE_INLINE void soften(float* scores, int64_t start, int64_t count, int64_t before, int64_t seen,
                        const AttentionCall& c, float& largest, float& total) {
    float factor = c.scale * LOG2_E;
    if (c.softcap != 0) {
        cap_scores(scores, count, c);
        factor = 1;
    }
    LaneBits numbers;
    for (int i = 0; i < LANES; ++i) numbers[i] = i;
    const auto first = static_cast<int32_t>(std::max<int64_t>(before - start, 0));
    const auto last = static_cast<int32_t>(std::min<int64_t>(seen - start, count));
    Lanes most = all(-INFINITY);
    for (int64_t i = 0; i < count; i += LANES) {
        Lanes x = load(scores + i) * factor;
        if (i < first || i + LANES > last) {
            const LaneBits token = numbers + static_cast<int32_t>(i);
            x = ((token >= first) & (token < last)) ? x : all(-INFINITY);
        }
        store(scores + i, x);
        most = greater(x, most);
    }
    largest = largest_of(most);
    const float base = largest == -INFINITY ? 0 : largest;
    Lanes sum = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const Lanes p = power(load(scores + i) - base);
        store(scores + i, p);
        sum += p;
    }
    total = sum_of(sum);
}

// All tokens of piece `piece` that a query of the tile sees.
template <class Ops>
TILE_ONCE void attend_piece(const AttentionTile& t, const Ops& ops, int64_t piece, Partial result) {
    const View& view = ops.view;
    const int64_t num = t.num_queries(), width = padded_width(ops.c.value_width);
    const int64_t start = piece * PIECE_TOKENS;
    const int64_t end = std::min(view.seen(num - 1), start + PIECE_TOKENS);
    const int64_t first_block = std::max(start, t.first_seen()) / BLOCK_TOKENS;
    const int64_t last_block = (end + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    const auto in_block = [](int64_t token, int64_t block) {
        return std::clamp<int64_t>(token - block * BLOCK_TOKENS, 0, BLOCK_TOKENS);
    };
    // Blocks are asked for two before their turn: keys, values, and then what comes after.
    const int64_t num_blocks = last_block - first_block;
    const auto key_block_of = [](const Ops& its, int64_t block) -> const uint8_t* {
        const int64_t last = its.view.seen(its.view.t.num_queries() - 1) - 1;
        return block * BLOCK_TOKENS <= last ? its.key_block(block) : nullptr;
    };
    const auto after = [&](int64_t turn) -> const uint8_t* {
        turn += 2;
        if (turn < num_blocks) return ops.key_block(first_block + turn);
        turn -= num_blocks;
        if (turn < num_blocks) return ops.value_block(first_block + turn);
        turn -= num_blocks;
        if (piece + 1 < t.last_piece) return key_block_of(ops, last_block + turn);
        if (!t.following) return nullptr;
        return key_block_of(Ops(*t.following), t.following->first_block() + turn);
    };
    const int64_t begin = first_block * BLOCK_TOKENS;
    float* scores = t.scratch.scores; // of the tokens from `begin` on
    for (int64_t block = first_block; block < last_block; ++block) {
        const Ahead next = {after(block - first_block)};
        ops.load_keys(block, in_block(end, block), num > Ops::FEW ? Ahead() : next);
        in_groups<Ops::AT_ONCE>(0, num, [&](int64_t q, auto count) {
            const int64_t needed = in_block(view.seen(q + count - 1), block);
            if (!needed) return;
            float* to = scores + q * SCORE_STRIDE + block * BLOCK_TOKENS - begin;
            const bool last = num > Ops::FEW && q + count == num;
            ops.template dots<count>(q, needed, to, last ? next : Ahead());
        });
    }
    const int64_t length = (end - begin + LANES - 1) / LANES * LANES;
    for (int64_t q = 0; q < num; ++q)
        soften(scores + q * SCORE_STRIDE, begin, length, view.before(q), view.seen(q), ops.c,
               result.largest[q], result.totals[q]);
    memset(result.sums, 0, num * width * sizeof(float));
    for (int64_t block = first_block; block < last_block; ++block) {
        ops.load_values(block, in_block(end, block));
        const Ahead next = {after(num_blocks + block - first_block)};
        in_groups<Ops::AT_ONCE>(0, num, [&](int64_t q, auto count) {
            const int64_t from = in_block(view.before(q), block);
            const int64_t to = in_block(view.seen(q + count - 1), block);
            const float* powers = scores + q * SCORE_STRIDE + block * BLOCK_TOKENS - begin;
            if (from < to)
                ops.template mix<count>(block, from, to, powers, result.sums + q * width,
                                        q + count == num ? next : Ahead());
        });
    }
}

// What was computed of more tokens, `more`, joins `all`.
TILE_ONCE void fold(Partial all, Partial more, int64_t num, int64_t width) {
    for (int64_t q = 0; q < num; ++q) {
        const float most = std::max(all.largest[q], more.largest[q]);
        const float base = most == -INFINITY ? 0 : most;
        const float a = power(tile::all(all.largest[q] - base))[0];
        const float b = power(tile::all(more.largest[q] - base))[0];
        all.largest[q] = most;
        all.totals[q] = all.totals[q] * a + more.totals[q] * b;
        for (int64_t i = q * width; i < (q + 1) * width; i += LANES)
            store(all.sums + i, load(all.sums + i) * a + load(more.sums + i) * b);
    }
}

template <class Ops>
TILE_ONCE void finish(const AttentionTile& t, const Ops& ops, Partial result) {
    const int64_t width = padded_width(ops.c.value_width);
    for (int64_t q = 0; q < t.num_queries(); ++q) {
        float total = result.totals[q], factor = 1;
        if (ops.c.sinks) {
            const float sink = ops.c.sinks[t.first_head + q % t.num_heads] * LOG2_E;
            const float most = std::max(result.largest[q], sink);
            factor = power(all(result.largest[q] - most))[0];
            total = total * factor + power(all(sink - most))[0];
        }
        ops.write(q, result.sums + q * width, factor / total);
    }
}

// Tokens that a query does not see, in the blocks of another query of its tile, are added to it
// times 0: this changes no bit but the sign of a zero, which write() takes away.
template <class Ops> void attend(const AttentionTile& t) {
    const Ops ops(t);
    const int64_t num = t.num_queries(), width = padded_width(ops.c.value_width);
    const int64_t each = partial_floats(num, ops.c.value_width);
    ops.load_queries();
    if (t.partials) {
        for (int64_t piece = t.first_piece; piece < t.last_piece; ++piece)
            attend_piece(t, ops, piece, Partial(t.partials + (piece - t.first_piece) * each));
        return;
    }
    const Partial folded(t.scratch.folded), another(t.scratch.piece);
    attend_piece(t, ops, t.first_piece, folded);
    for (int64_t piece = t.first_piece + 1; piece < t.last_piece; ++piece) {
        attend_piece(t, ops, piece, another);
        fold(folded, another, num, width);
    }
    finish(t, ops, folded);
}

// Of the partial results of all the tile's pieces.
template <class Ops> void fold_partials(const AttentionTile& t) {
    const Ops ops(t);
    const int64_t num = t.num_queries(), width = padded_width(ops.c.value_width);
    const int64_t each = partial_floats(num, ops.c.value_width);
    const Partial folded(t.partials);
    for (int64_t piece = 1; piece < t.last_piece - t.first_piece; ++piece)
        fold(folded, Partial(t.partials + piece * each), num, width);
    finish(t, ops, folded);
}

} // namespace tile
} // namespace
