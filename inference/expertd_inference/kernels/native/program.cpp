// A sequence of operations on one token as one job of the pool, so that between two of them there
// is a barrier at most, instead of a return to Python.
//
// Each operation gives the bits that it gives when called alone: products do not depend on how
// rows are divided, and heads that share no keys do not meet.

#include "program.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "pool.h"
#include "step.h"
#include "tasks.h"
#include "variant.h"

namespace {

template <class Call> const Call& call_of(const Operation& operation) {
    return *static_cast<const Call*>(operation.call);
}

uint8_t* at(void* start, int64_t elements, int32_t type) {
    return static_cast<uint8_t*>(start) + elements * size_of(type);
}

const uint8_t* at(const void* start, int64_t elements, int32_t type) {
    return static_cast<const uint8_t*>(start) + elements * size_of(type);
}

class ProgramJob final : public Job {
  public:
    ProgramJob(const Operation* operations, int64_t count, int64_t token, int64_t position,
               int32_t threads)
        : operations(operations), token(token), position(position), threads(threads),
          impl(variant()) {
        pieces.reserve(2 * count + 1);
        for (int64_t i = 0; i < count;) i = add(i, count);
        own_place = take_scratch(threads * own_bytes);
    }

    int64_t num_tasks() const { return tasks; }
    int64_t scratch_bytes() const { return scratch; }
    void use_scratch(uint8_t* bytes) { memory = bytes; }

    int64_t barrier(int64_t task) const override { return piece_of(task).barrier; }

    void run(int64_t task, int32_t thread) override {
        uint8_t* const own = memory + own_place + thread * own_bytes;
        const Piece& piece = piece_of(task);
        if (!piece.serial) return run_part(piece, task - piece.first, own);
        for (int64_t i = piece.operation; i < piece.end; ++i) run_whole(operations[i], own);
        for (int64_t i = piece.prepare; i < piece.prepare_end; ++i) prepare(prepared[i], own);
    }

  private:
    // Tasks [first, first of the next) that need all tasks below `barrier`. A serial one is one
    // task, which does operations [operation, end) in turn, and then brings activations into
    // the form that the products after it want; others divide one operation.
    struct Piece {
        int64_t first, barrier, operation, end, prepare, prepare_end;
        int64_t input, result; // of a product: which of `prepared`, and where in the scratch
        Chunks chunks;
        bool serial;
    };

    struct Prepared {
        const LinearCall* call;
        int64_t place;
    };

    const Piece& piece_of(int64_t task) const {
        size_t i = pieces.size() - 1;
        while (pieces[i].first > task) --i;
        return pieces[i];
    }

    // Plans the operations that begin with number `i`; the number of the first that it does not.
    int64_t add(int64_t i, int64_t count) {
        if (operations[i].kind == ATTEND) {
            Piece& piece = new_piece(i, false);
            const auto& call = call_of<AttendCall>(operations[i]);
            tasks += call.kv_heads;
            need(normed_bytes(call) + step_attend_bytes(shape_of(call)));
            piece.end = i + 1;
            return i + 1;
        }
        if (operations[i].kind != LINEAR) {
            if (operations[i].kind == ROUTE)
                need(step_route_bytes(call_of<RouteCall>(operations[i]).n));
            Piece& piece = serial_piece(i);
            piece.end = i + 1;
            return i + 1;
        }
        int64_t end = i + 1;
        while (end < count && operations[end].kind == LINEAR && operations[end].beside) ++end;
        Piece& before = serial_piece(i);
        const auto first = static_cast<int64_t>(prepared.size());
        before.prepare = first;
        std::vector<int64_t> inputs;
        for (int64_t j = i; j < end; ++j)
            inputs.push_back(input_of(call_of<LinearCall>(operations[j]), first));
        before.prepare_end = static_cast<int64_t>(prepared.size());
        const int64_t barrier = tasks;
        for (int64_t j = i; j < end; ++j) {
            const LinearCall& call = call_of<LinearCall>(operations[j]);
            Piece& piece = new_piece(j, false);
            piece.barrier = barrier;
            piece.chunks = Chunks(*call.matrix, 1, threads);
            need(4 * std::max(call.matrix->columns, piece.chunks.units_each));
            piece.input = inputs[j - i];
            piece.result = take_scratch(call.matrix->rows * 4);
            tasks += piece.chunks.count;
        }
        return end;
    }

    Piece& new_piece(int64_t operation, bool serial) {
        pieces.push_back({tasks, tasks, operation, operation, 0, 0, 0, 0, Chunks(), serial});
        return pieces.back();
    }

    // The last one if it is serial and nothing was prepared by it.
    Piece& serial_piece(int64_t operation) {
        if (!pieces.empty() && pieces.back().serial && !pieces.back().prepare_end)
            return pieces.back();
        Piece& piece = new_piece(operation, true);
        ++tasks;
        return piece;
    }

    // Products of equal form share the activations that they have in common.
    int64_t input_of(const LinearCall& call, int64_t first) {
        const Matrix& matrix = *call.matrix;
        const auto end = static_cast<int64_t>(prepared.size());
        for (int64_t i = first; i < end; ++i) {
            const LinearCall& other = *prepared[i].call;
            if (other.x == call.x && other.type == call.type &&
                other.matrix->columns == matrix.columns && other.matrix->format == matrix.format &&
                other.matrix->group_size == matrix.group_size && other.flags == call.flags)
                return i;
        }
        const int64_t bytes = impl.prepared_bytes(matrix, form_of(1, call.flags));
        prepared.push_back({&call, take_scratch(bytes)});
        return end;
    }

    // Of each thread's own scratch, which no two tasks use at the same time.
    void need(int64_t bytes) { own_bytes = std::max(own_bytes, aligned(bytes)); }

    int64_t take_scratch(int64_t bytes) {
        const int64_t place = scratch;
        scratch += aligned(bytes);
        return place;
    }

    void prepare(const Prepared& input, uint8_t* own) const {
        const LinearCall& call = *input.call;
        auto* row = reinterpret_cast<float*>(own);
        impl.widen(call.x, call.type, call.matrix->columns, row);
        impl.prepare(*call.matrix, row, call.type, form_of(1, call.flags),
                     memory + input.place);
    }

    void run_part(const Piece& piece, int64_t part, uint8_t* own) const {
        const Operation& operation = operations[piece.operation];
        if (operation.kind == ATTEND) return attend(call_of<AttendCall>(operation), part, own);
        const LinearCall& call = call_of<LinearCall>(operation);
        const auto [first, last] = piece.chunks.range(part);
        auto* result = reinterpret_cast<float*>(memory + piece.result);
        const uint8_t* input = memory + prepared[piece.input].place;
        impl.multiply(*call.matrix, nullptr, first, last, &input, &result, 1, call.type,
                      form_of(1, call.flags));
        finish_linear(impl, call, first, last, 0, result, reinterpret_cast<float*>(own));
    }

    void run_whole(const Operation& operation, uint8_t* own) const {
        switch (operation.kind) {
        case EMBED: {
            const auto& c = call_of<EmbedCall>(operation);
            memcpy(c.out, static_cast<const uint8_t*>(c.table) + token * c.row_bytes,
                   c.row_bytes);
            break;
        }
        case ADD: {
            const auto& c = call_of<AddCall>(operation);
            step_add(c.x, c.y, c.out, c.n, c.type);
            break;
        }
        case NORM: {
            const auto& c = call_of<NormCall>(operation);
            expertd_rms_norm(c.x, c.weight, c.out, c.rows, c.n, c.eps, c.round_first, c.type);
            break;
        }
        case ROUTE: {
            const auto& c = call_of<RouteCall>(operation);
            step_route(c.logits, 1, c.n, c.k, c.normalize, c.float_weights, c.weights, c.index,
                       c.type, own);
            break;
        }
        }
    }

    // The heads that share keys `kv`.
    static int64_t normed_bytes(const AttendCall& c) { // more than enough
        return aligned((c.heads / c.kv_heads + 1) * c.d * 4);
    }

    Attention shape_of(const AttendCall& c) const {
        const int64_t stride = c.room * c.d;
        return {c.heads, c.kv_heads, position + 1, c.d, c.d, stride, c.d, stride, c.d, c.scale};
    }

    void attend(const AttendCall& c, int64_t kv, uint8_t* own) const {
        const int64_t group = c.heads / c.kv_heads, head = kv * group, d = c.d;
        const int64_t row = (kv * c.room + position) * d;
        uint8_t* turned = at(c.turned, head * d, c.type);
        uint8_t* key = at(c.keys, row, c.type);
        const uint8_t* q = at(c.q, head * d, c.type);
        const uint8_t* k = at(c.k, kv * d, c.type);
        auto* normed = reinterpret_cast<float*>(own);
        if (c.q_weight) {
            expertd_rms_norm(q, c.q_weight, normed, group, d, c.eps, c.round_first, c.type);
            q = reinterpret_cast<uint8_t*>(normed);
        }
        if (c.k_weight) {
            auto* out = normed + group * d;
            expertd_rms_norm(k, c.k_weight, out, 1, d, c.eps, c.round_first, c.type);
            k = reinterpret_cast<uint8_t*>(out);
        }
        step_rotate(q, d, group, d, c.cos, c.sin, turned, d, c.type);
        step_rotate(k, d, 1, d, c.cos, c.sin, key, d, c.type);
        memcpy(at(c.values, row, c.type), at(c.v, kv * d, c.type), d * size_of(c.type));
        step_attend(c.turned, c.keys, c.values, c.out, shape_of(c), kv, kv + 1, c.type,
                    reinterpret_cast<float*>(own + normed_bytes(c)));
    }

    const Operation* const operations;
    const int64_t token, position;
    const int32_t threads;
    const Variant& impl;
    std::vector<Piece> pieces;
    std::vector<Prepared> prepared;
    int64_t tasks = 0, scratch = 0, own_bytes = 0, own_place = 0;
    uint8_t* memory = nullptr;
};

} // namespace

EXPERTD_STRUCTURE(Operation)
EXPERTD_STRUCTURE(EmbedCall)
EXPERTD_STRUCTURE(AddCall)
EXPERTD_STRUCTURE(NormCall)
EXPERTD_STRUCTURE(AttendCall)
EXPERTD_STRUCTURE(RouteCall)

// Runs `count` operations for `token`, which is number `position` of its sequence. What an
// operation reads was made by one before it, or before the call. 0, or 1 without memory.
EXPERTD_API int32_t expertd_program(const Operation* operations, int64_t count, int64_t token,
                                    int64_t position, int32_t threads) {
    return without_memory([=] {
        PoolLock lock;
        ProgramJob job(operations, count, token, position, threads);
        job.use_scratch(pool_scratch(job.scratch_bytes()));
        run_job(job, job.num_tasks(), threads);
    });
}
