// Attention of a batch of sequences whose keys and values lie in blocks of tokens.
//
// A row's length is divided into pieces of PIECE_TOKENS, counted from the sequence's start. A piece
// has its own softmax, by the largest of its scores, and pieces are folded one after the other. So
// the bits of a row depend on its sequence alone: not on how pieces are divided among tasks, nor on
// the rows beside it.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"

constexpr int64_t BLOCK_TOKENS = 64; // kernels/blocks.py has the same number
constexpr int64_t PIECE_TOKENS = 512;

// Keys and values are written once and read for each later token, so they lie as they are read: in
// words of 4 bytes, line after line. A block of keys is [BLOCK_TOKENS / KEY_TOKENS][words]
// [KEY_TOKENS] words, a float32 or two columns of a token. One of values is
// [value_width / columns][words][columns] words, a float32 or a column of two tokens, with as many
// columns as value_columns() says. kernels/block_order.py has the same.
constexpr int64_t KEY_TOKENS = 32;
constexpr int64_t VALUE_COLUMNS = 32;
inline int64_t value_columns(int64_t value_width) {
    return value_width % VALUE_COLUMNS ? value_width : VALUE_COLUMNS;
}

// The spans of a batch, for all layers. A span is consecutive rows of one sequence.
struct AttentionPlan {
    const int64_t* positions;    // [num_spans], of a span's first row in its sequence
    const int64_t* first_rows;   // [num_spans + 1]: rows of the batch before the span
    const int64_t* first_blocks; // [num_spans]: where its table begins in `blocks`
    const int32_t* blocks;       // the tables, one after the other
    int64_t num_spans;
};

// A layer's. Strides are in elements.
struct AttentionCall {
    const AttentionPlan* plan;
    const void* query; // [rows, heads, key_width]
    const void* key;   // [rows, kv_heads, key_width], or null: nothing is appended
    const void* value; // [rows, kv_heads, value_width], or null
    void* keys;        // [num_blocks, kv_heads], blocks of BLOCK_TOKENS * key_width: see KEY_TOKENS
    void* values;      // the same of value_width: see VALUE_COLUMNS
    void* out;         // [rows, heads, value_width]
    const float* sinks; // [heads]: logits that join the softmax's denominator; or null
    int64_t heads, kv_heads, key_width, value_width; // widths are even
    int64_t query_row, query_head, key_row, key_head, value_row, value_head, out_row, out_head;
    int64_t window; // a row sees so many last tokens, its own among them; 0: all
    float scale, softcap; // softcap: softcap * tanh(score / softcap); 0: none
    int32_t type, threads;
};

// Memory of one task at a time. Sizes are for the plan's largest tile; see Attend.
struct TileScratch {
    float* keys;     // a block, widened
    float* values;   // a block, widened: [padded width / VALUE_COLUMNS][tokens][VALUE_COLUMNS]
    float* queries;  // widened
    float* scores;   // [queries][SCORE_STRIDE]
    float* piece;    // a partial result
    float* folded;   // another
};

constexpr int64_t MAX_QUERIES = 64;               // of a tile
constexpr int64_t SCORE_STRIDE = PIECE_TOKENS + 16; // not a power of two: the cache's sets differ

// What one task computes: some rows times the heads that share keys.
struct AttentionTile {
    const AttentionCall* call;
    const int32_t* blocks;       // the sequence's table
    int64_t position;            // of its first row
    int64_t first_row, num_rows; // in the batch
    int64_t kv, first_head, num_heads;
    int64_t first_piece, last_piece;
    float* partials; // null: the task has all pieces and writes `out`
    TileScratch scratch;
    const AttentionTile* following; // what the thread will probably compute next, or null

    int64_t num_queries() const { return num_rows * num_heads; }
    int64_t first_seen() const { // the first token that its first row sees
        return call->window ? std::max<int64_t>(0, position + 1 - call->window) : 0;
    }
    int64_t first_block() const {
        return std::max(first_piece * PIECE_TOKENS, first_seen()) / BLOCK_TOKENS;
    }
};

// A partial result: [MAX_QUERIES] largest scores, [MAX_QUERIES] sums of powers, and per query the
// weighted sum of values, padded to this many columns.
inline int64_t padded_width(int64_t value_width) { return (value_width + 31) / 32 * 32; }
inline int64_t partial_floats(int64_t num_queries, int64_t value_width) {
    return 2 * MAX_QUERIES + num_queries * padded_width(value_width);
}

// Copies keys and values of rows [first_row, last_row) to their places in the blocks.
void append_rows(const AttentionCall& call, int64_t first_row, int64_t last_row);

// A call in tasks, which may run in any order, at most `threads` at once, after the rows that they
// see were appended. Planning may throw std::bad_alloc; tasks allocate nothing.
class Attend {
  public:
    Attend(const AttentionCall& call, int32_t threads);

    int64_t num_tasks() const { return static_cast<int64_t>(tasks.size()) - 1; }
    int64_t scratch_bytes() const;
    void use_scratch(uint8_t* bytes) { memory = bytes; } // 64-byte aligned
    void run(int64_t task);

    // Products of a query and a key, from which a caller sees whether threads are worth it.
    int64_t num_products() const { return products; }

  private:
    struct Part {
        int64_t tile, first_piece, last_piece;
    };
    struct Shared { // a tile of several parts, the last of which folds what they computed
        int64_t first_piece, last_piece, partials;
        std::atomic<int64_t> left;
    };

    void add_tiles(int64_t span);
    TileScratch scratch_of(int64_t slot) const;
    AttentionTile tile_of(const Part& part) const;
    void run(const Part& part, const AttentionTile* following, const TileScratch& scratch);

    const AttentionCall& call;
    const int32_t threads;
    std::vector<AttentionTile> tiles;
    std::vector<Part> parts;
    std::vector<int64_t> tasks; // the first part of each, and the number of parts
    std::unique_ptr<Shared[]> shared; // per tile
    std::unique_ptr<std::atomic<bool>[]> taken; // slots of scratch, one for each thread
    int64_t products = 0, most_queries = 1, partials_floats = 0;
    uint8_t* memory = nullptr;
};
