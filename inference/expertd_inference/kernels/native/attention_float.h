// Attention's products in float32, of any type.
#pragma once

#include "attention.h"
#include "lanes.h"
#include "values.h"

namespace {
namespace tile {

// A later block, to be asked for while one is computed; null: none.
struct Ahead {
    const uint8_t* next = nullptr;
};

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

} // namespace tile
} // namespace
