// Attention's products in float32, of any type.
#pragma once

#include "attention.h"
#include "lanes.h"
#include "values.h"

namespace {
namespace tile {

// Some place of a later block, into the second cache.
TILE_INLINE void ask_for(const uint8_t* place) { __builtin_prefetch(place, 0, 2); }

// Of words the numbers in their low halves, and those in their high halves.
inline void widen_words(const uint32_t* words, int64_t count, int32_t type, float* low,
                        float* high) {
    for (int64_t i = 0; i < count; ++i) {
        const auto one = static_cast<uint16_t>(words[i]);
        const auto other = static_cast<uint16_t>(words[i] >> 16);
        low[i] = type == BF16 ? from_bf16(one) : from_f16(one);
        high[i] = type == BF16 ? from_bf16(other) : from_f16(other);
    }
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

// Arithmetic in float32 of any type.
struct Generic {
    static constexpr int AT_ONCE = LANES == 16 ? 8 : 4; // queries
    using Power = float;

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

    // [BLOCK_TOKENS / KEY_TOKENS][key_width][KEY_TOKENS] numbers
    void load_keys(int64_t block, int64_t tokens) const {
        if (c.type == F32) return;
        const int64_t num_words = (tokens + KEY_TOKENS - 1) / KEY_TOKENS * c.key_width / 2;
        const auto* words = reinterpret_cast<const uint32_t*>(key_block(block));
        float* to = scratch.keys;
        for (int64_t i = 0; i < num_words; ++i, words += KEY_TOKENS, to += 2 * KEY_TOKENS)
            widen_words(words, KEY_TOKENS, c.type, to, to + KEY_TOKENS);
    }

    void load_values(int64_t block, int64_t tokens) const {
        if (values_as_they_are()) return;
        const int64_t columns = value_columns(c.value_width), each = 4 / size;
        const auto* words = reinterpret_cast<const uint32_t*>(value_block(block));
        for (int64_t column = 0; column < c.value_width; column += VALUE_COLUMNS) {
            const int64_t count = std::min(VALUE_COLUMNS, c.value_width - column);
            const uint32_t* from = words + column / columns * columns * (BLOCK_TOKENS / each) +
                                   column % columns;
            float* to = scratch.values + column * BLOCK_TOKENS;
            for (int64_t token = 0; token < tokens; token += each, from += columns) {
                if (c.type == F32) memcpy(to, from, count * sizeof(float));
                else widen_words(from, count, c.type, to, to + VALUE_COLUMNS);
                for (int64_t i = 0; i < each; ++i, to += VALUE_COLUMNS)
                    memset(to + count, 0, (VALUE_COLUMNS - count) * sizeof(float));
            }
        }
    }

    // Whether a block lies as TileScratch::values does.
    bool values_as_they_are() const {
        return c.type == F32 && c.value_width % VALUE_COLUMNS == 0;
    }

    // Scores of queries [first, first + Q) with tokens of the block that was loaded.
    template <int Q>
    void dots(int64_t block, int64_t first, int64_t tokens, float* scores, const uint8_t*) const {
        const auto* keys =
            c.type == F32 ? reinterpret_cast<const float*>(key_block(block)) : scratch.keys;
        const auto at = [&](int64_t token) {
            return keys + token / KEY_TOKENS * KEY_TOKENS * c.key_width + token % KEY_TOKENS;
        };
        const float* queries = scratch.queries + first * c.key_width;
        for (int64_t token = 0; token < tokens; token += 2 * LANES) {
            const float *low_at = at(token), *high_at = at(token + LANES);
            Lanes sums[Q][2] = {};
            for (int64_t k = 0; k < c.key_width; ++k) {
                const Lanes low = load(low_at + k * KEY_TOKENS);
                const Lanes high = load(high_at + k * KEY_TOKENS);
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

    // Of scores their powers, in the same place; their sum.
    static TILE_INLINE float raise(float* scores, int64_t count, float base) {
        Lanes sum = {};
        for (int64_t i = 0; i < count; i += LANES) {
            const Lanes p = power(load(scores + i) - base);
            store(scores + i, p);
            sum += p;
        }
        return sum_of(sum);
    }

    // Adds the values of tokens [from, to) of the block, times powers, to Q rows of sums.
    template <int Q>
    void mix(int64_t block, int64_t from, int64_t to, const float* powers, float* sums,
             const uint8_t*) const {
        const int64_t width = padded_width(c.value_width);
        const float* all = values_as_they_are()
                               ? reinterpret_cast<const float*>(value_block(block))
                               : scratch.values;
        for (int64_t column = 0; column < width; column += 2 * LANES) {
            Lanes mixed[Q][2];
            for (int q = 0; q < Q; ++q)
                for (int half = 0; half < 2; ++half)
                    mixed[q][half] = load(sums + q * width + column + half * LANES);
            const float* place = all + column / VALUE_COLUMNS * VALUE_COLUMNS * BLOCK_TOKENS +
                                 column % VALUE_COLUMNS;
            for (int64_t token = from; token < to; ++token) {
                const float* values = place + token * VALUE_COLUMNS;
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

} // namespace tile
} // namespace
