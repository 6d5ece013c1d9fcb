#include "attention.h"

#include <algorithm>
#include <cstring>

#include "pool.h"
#include "tasks.h"
#include "variant.h"

namespace {

// So that a thread which comes late, or is held up, leaves little to wait for.
constexpr int64_t TASKS_PER_THREAD = 6;

// Below so many products of queries and keys, times 64, a second thread would come too late.
constexpr int64_t MIN_SHARED_PRODUCTS = 1 << 11;

constexpr int64_t APPEND_ROWS = 8; // of a task: few, since a row's keys are as many lines as words

int64_t pad(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Of a tile: its rows and heads, of `group` that share keys.
struct Shares {
    int64_t group, heads, rows;

    explicit Shares(const AttentionCall& call)
        : group(call.heads / call.kv_heads), heads(std::min(group, MAX_QUERIES)),
          rows(MAX_QUERIES / heads) {}
};

int64_t num_tiles(const AttentionCall& call) {
    const AttentionPlan& plan = *call.plan;
    const Shares shares(call);
    int64_t count = 0;
    for (int64_t span = 0; span < plan.num_spans; ++span)
        count += (plan.first_rows[span + 1] - plan.first_rows[span] + shares.rows - 1) / shares.rows;
    return count * call.kv_heads * ((shares.group + shares.heads - 1) / shares.heads);
}

// To a block of values, that of a token. T is as wide as a number.
template <class T>
void append_value(const T* value, int64_t value_width, int64_t token, T* block) {
    constexpr int64_t TOKENS = 4 / sizeof(T); // of a word
    const int64_t columns = value_columns(value_width);
    T* to = block + token / TOKENS * TOKENS * columns + token % TOKENS;
    for (int64_t first = 0; first < value_width; first += columns, to += BLOCK_TOKENS * columns)
        for (int64_t i = 0; i < columns; ++i) to[i * TOKENS] = value[first + i];
}

int64_t pieces_of(int64_t tokens) { return (tokens + PIECE_TOKENS - 1) / PIECE_TOKENS; }

} // namespace

void append_rows(const AttentionCall& call, int64_t first_row, int64_t last_row) {
    if (!call.key) return;
    const AttentionPlan& plan = *call.plan;
    const int64_t size = size_of(call.type);
    const int64_t key_bytes = call.key_width * size;
    const int64_t* after =
        std::upper_bound(plan.first_rows, plan.first_rows + plan.num_spans + 1, first_row);
    int64_t span = after - plan.first_rows - 1;
    for (int64_t row = first_row; row < last_row; ++row) {
        while (row >= plan.first_rows[span + 1]) ++span;
        const int64_t token = plan.positions[span] + row - plan.first_rows[span];
        const int64_t block = plan.blocks[plan.first_blocks[span] + token / BLOCK_TOKENS];
        const int64_t in_block = token % BLOCK_TOKENS;
        const auto keys_of = [&](int64_t kv) {
            return static_cast<uint8_t*>(call.keys) +
                   (block * call.kv_heads + kv) * BLOCK_TOKENS * key_bytes +
                   in_block / KEY_TOKENS * KEY_TOKENS * key_bytes + in_block % KEY_TOKENS * 4;
        };
        for (int64_t kv = 0; kv < call.kv_heads; ++kv) {
            const int64_t slot = (block * call.kv_heads + kv) * BLOCK_TOKENS;
            const uint8_t* key = static_cast<const uint8_t*>(call.key) +
                                 (row * call.key_row + kv * call.key_head) * size;
            uint8_t* keys = keys_of(kv);
            for (int64_t at = 0; at < key_bytes; at += 4)
                memcpy(keys + at * KEY_TOKENS, key + at, 4);
            const int64_t value = row * call.value_row + kv * call.value_head;
            const int64_t values = slot * call.value_width;
            if (call.type == F32)
                append_value(static_cast<const uint32_t*>(call.value) + value, call.value_width,
                             in_block, static_cast<uint32_t*>(call.values) + values);
            else
                append_value(static_cast<const uint16_t*>(call.value) + value, call.value_width,
                             in_block, static_cast<uint16_t*>(call.values) + values);
        }
    }
}

Attend::Attend(const AttentionCall& call, int32_t threads) : call(call), threads(threads) {
    tiles.reserve(num_tiles(call));
    for (int64_t span = 0; span < call.plan->num_spans; ++span) add_tiles(span);
    // How tiles are divided changes no bit, so it may depend on all of them.
    int64_t work = 0;
    for (const AttentionTile& tile : tiles)
        work += (tile.last_piece - tile.first_piece) * tile.num_queries();
    const int64_t share = std::max<int64_t>(1, work / (threads * TASKS_PER_THREAD));
    shared = std::make_unique<Shared[]>(tiles.size());
    for (size_t i = 0; i < tiles.size(); ++i) {
        const AttentionTile& tile = tiles[i];
        const int64_t pieces = tile.last_piece - tile.first_piece;
        const int64_t each =
            threads == 1 ? pieces : std::max<int64_t>(1, share / tile.num_queries());
        shared[i].first_piece = tile.first_piece;
        shared[i].last_piece = tile.last_piece;
        shared[i].partials = -1;
        shared[i].left = (pieces + each - 1) / each;
        if (each < pieces) {
            shared[i].partials = partials_floats;
            partials_floats += pieces * partial_floats(tile.num_queries(), call.value_width);
        }
        for (int64_t first = tile.first_piece; first < tile.last_piece; first += each)
            parts.push_back({static_cast<int64_t>(i), first,
                             std::min(first + each, tile.last_piece)});
    }
    // A task has parts in a row, so that a thread knows what to ask memory for next: at first many,
    // at last one, so that no thread waits long for another's.
    int64_t left = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
        const Part& part = parts[i];
        const int64_t needed =
            (part.last_piece - part.first_piece) * tiles[part.tile].num_queries();
        if (left < needed) {
            tasks.push_back(static_cast<int64_t>(i));
            left = std::max(needed, work / (2 * threads));
        }
        left -= needed;
        work -= needed;
    }
    tasks.push_back(static_cast<int64_t>(parts.size()));
    taken = std::make_unique<std::atomic<bool>[]>(threads);
    for (int32_t i = 0; i < threads; ++i) taken[i] = false;
}

void Attend::add_tiles(int64_t span) {
    const AttentionPlan& plan = *call.plan;
    const int64_t num_rows = plan.first_rows[span + 1] - plan.first_rows[span];
    const Shares shares(call);
    const int64_t group = shares.group, heads_each = shares.heads;
    for (int64_t row = 0; row < num_rows; row += shares.rows) {
        const int64_t rows = std::min(shares.rows, num_rows - row);
        const int64_t position = plan.positions[span] + row;
        const int64_t seen = position + rows;
        const int64_t before = call.window ? std::max<int64_t>(0, position + 1 - call.window) : 0;
        for (int64_t kv = 0; kv < call.kv_heads; ++kv)
            for (int64_t head = 0; head < group; head += heads_each) {
                const int64_t heads = std::min(heads_each, group - head);
                tiles.push_back({&call, plan.blocks + plan.first_blocks[span], position,
                                 plan.first_rows[span] + row, rows, kv, kv * group + head, heads,
                                 before / PIECE_TOKENS, pieces_of(seen), nullptr, {}, nullptr});
                products += rows * heads * (seen - before);
                most_queries = std::max(most_queries, rows * heads);
            }
    }
}

namespace {

struct Sizes {
    int64_t keys, values, queries, scores, partial;

    Sizes(const AttentionCall& call, int64_t num_queries)
        : keys(pad(call.key_width * BLOCK_TOKENS * 4)),
          values(pad(padded_width(call.value_width) * BLOCK_TOKENS * 4)),
          queries(pad(num_queries * call.key_width * 4)),
          scores(pad(num_queries * SCORE_STRIDE * 4)),
          partial(pad(partial_floats(num_queries, call.value_width) * 4)) {}

    int64_t all() const { return keys + values + queries + scores + 2 * partial; }
};

} // namespace

int64_t Attend::scratch_bytes() const {
    return threads * Sizes(call, most_queries).all() + partials_floats * 4;
}

TileScratch Attend::scratch_of(int64_t slot) const {
    const Sizes sizes(call, most_queries);
    uint8_t* at = memory + slot * sizes.all();
    const auto next = [&at](int64_t bytes) {
        uint8_t* place = at;
        at += bytes;
        return place;
    };
    const auto floats = [&next](int64_t bytes) { return reinterpret_cast<float*>(next(bytes)); };
    TileScratch scratch;
    scratch.keys = floats(sizes.keys);
    scratch.values = floats(sizes.values);
    scratch.queries = floats(sizes.queries);
    scratch.scores = floats(sizes.scores);
    scratch.piece = floats(sizes.partial);
    scratch.folded = floats(sizes.partial);
    return scratch;
}

AttentionTile Attend::tile_of(const Part& part) const {
    AttentionTile tile = tiles[part.tile];
    tile.first_piece = part.first_piece;
    tile.last_piece = part.last_piece;
    return tile;
}

void Attend::run(int64_t task) {
    int32_t slot = 0; // as many as threads, so one is free
    while (taken[slot].exchange(true, std::memory_order_acquire)) slot = (slot + 1) % threads;
    const TileScratch scratch = scratch_of(slot);
    for (int64_t i = tasks[task]; i < tasks[task + 1]; ++i) {
        // After its last part the thread probably takes the task after those of the others.
        const int64_t last = std::min(task + threads, num_tasks());
        const size_t next = i + 1 < tasks[task + 1] ? i + 1 : tasks[last];
        AttentionTile following;
        if (next < parts.size()) following = tile_of(parts[next]);
        run(parts[i], next < parts.size() ? &following : nullptr, scratch);
    }
    taken[slot].store(false, std::memory_order_release);
}

void Attend::run(const Part& part, const AttentionTile* following, const TileScratch& scratch) {
    Shared& all = shared[part.tile];
    AttentionTile tile = tile_of(part);
    tile.scratch = scratch;
    tile.following = following;
    const int64_t each = partial_floats(tile.num_queries(), call.value_width);
    const int64_t before = (part.first_piece - all.first_piece) * each;
    if (all.partials >= 0) {
        auto* partials =
            reinterpret_cast<float*>(memory + threads * Sizes(call, most_queries).all());
        tile.partials = partials + all.partials + before;
    }
    variant().attend(tile);
    if (all.partials >= 0 && all.left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        tile.partials -= before;
        tile.first_piece = all.first_piece;
        tile.last_piece = all.last_piece;
        variant().fold(tile);
    }
}

namespace {

class AttendJob final : public Job {
  public:
    AttendJob(const AttentionCall& call, int32_t threads)
        : call(call), num_rows(call.plan->first_rows[call.plan->num_spans]),
          appends(call.key ? (num_rows + APPEND_ROWS - 1) / APPEND_ROWS : 0),
          attend(call, threads) {}

    int64_t barrier(int64_t task) const override { return task < appends ? 0 : appends; }

    void run(int64_t task, int32_t) override {
        if (task >= appends) return attend.run(task - appends);
        const int64_t first = task * APPEND_ROWS;
        append_rows(call, first, std::min(num_rows, first + APPEND_ROWS));
    }

    int64_t num_tasks() const { return appends + attend.num_tasks(); }
    int32_t threads_for(int32_t threads) const {
        return attend.num_products() < MIN_SHARED_PRODUCTS ? 1 : threads;
    }
    void use(uint8_t* bytes) { attend.use_scratch(bytes); }
    int64_t scratch_bytes() const { return attend.scratch_bytes(); }

  private:
    const AttentionCall& call;
    const int64_t num_rows, appends;
    Attend attend;
};

} // namespace

EXPERTD_STRUCTURE(AttentionPlan)
EXPERTD_STRUCTURE(AttentionCall)

// Appends the rows' keys and values to their blocks; then each row attends to its own sequence up
// to itself. 0, or 1 without memory.
EXPERTD_API int32_t expertd_attend_rows(const AttentionCall* call) {
    return without_memory([=] {
        PoolLock lock;
        AttendJob job(*call, call->threads);
        job.use(pool_scratch(job.scratch_bytes()));
        run_job(job, job.num_tasks(), job.threads_for(call->threads));
    });
}
