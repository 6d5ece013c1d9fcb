// Attention of one tile, for the instruction set of the file that includes this.
//
// A piece of the sequence at a time: all its scores, their softmax, then the sum of its values.
// Of keys the lanes of a register are tokens, whose scores need no sum over lanes; of values the
// lanes are columns. Either way a query's arithmetic is one chain in
// one order, whatever other queries are computed beside it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_float.h"
#include "attention_softmax.h"

namespace {
namespace tile {

// Calls `at` with as many queries of [first, last) as registers hold at once: AT_ONCE, or fewer.
template <int AT_ONCE, class Call>
TILE_INLINE void in_groups(int64_t first, int64_t last, const Call& call) {
    for (; first + AT_ONCE <= last; first += AT_ONCE)
        call(first, std::integral_constant<int, AT_ONCE>());
    if constexpr (AT_ONCE > 1) in_groups<AT_ONCE / 2>(first, last, call);
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
        const uint8_t* next = after(block - first_block);
        ops.load_keys(block, in_block(end, block));
        in_groups<Ops::AT_ONCE>(0, num, [&](int64_t q, auto count) {
            const int64_t needed = in_block(view.seen(q + count - 1), block);
            if (!needed) return;
            float* to = scores + q * SCORE_STRIDE + block * BLOCK_TOKENS - begin;
            const bool last = next && q + count == num;
            ops.template dots<count>(block, q, needed, to, last ? next : ops.key_block(block));
        });
    }
    const int64_t length = (end - begin + 31) / 32 * 32;
    // Sums over lanes are slow: those of several queries are under way at a time.
    in_groups<Ops::AT_ONCE>(0, num, [&](int64_t first, auto count) {
        for (int64_t q = first; q < first + count; ++q)
            result.largest[q] = scale_scores(scores + q * SCORE_STRIDE, begin, length,
                                             view.before(q), view.seen(q), ops.c);
        for (int64_t q = first; q < first + count; ++q) {
            const float base = result.largest[q] == -INFINITY ? 0 : result.largest[q];
            result.totals[q] = Ops::raise(scores + q * SCORE_STRIDE, length, base);
        }
    });
    memset(result.sums, 0, num * width * sizeof(float));
    for (int64_t block = first_block; block < last_block; ++block) {
        ops.load_values(block, in_block(end, block));
        const uint8_t* next = after(num_blocks + block - first_block);
        in_groups<Ops::AT_ONCE>(0, num, [&](int64_t q, auto count) {
            const int64_t from = in_block(view.before(q), block);
            const int64_t to = in_block(view.seen(q + count - 1), block);
            const auto* powers =
                reinterpret_cast<const typename Ops::Power*>(scores + q * SCORE_STRIDE) +
                block * BLOCK_TOKENS - begin;
            const bool last = next && q + count == num;
            if (from < to)
                ops.template mix<count>(block, from, to, powers, result.sums + q * width,
                                        last ? next : ops.value_block(block));
        });
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
