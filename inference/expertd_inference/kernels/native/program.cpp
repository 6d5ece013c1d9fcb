// A program's operations as one job of the pool, so that between two of them there is a barrier at
// most, instead of a return to Python.
//
// Operations that need nothing but their row are done together, a few rows at a time; products are
// divided by outputs; attention as it divides itself. A row's results do not depend on the others.

#include "program.h"

#include <algorithm>
#include <vector>

#include "attention.h"
#include "pool.h"
#include "row_steps.h"
#include "tasks.h"
#include "variant.h"

namespace {

template <class Call> const Call& call_of(const Operation& operation) {
    return *static_cast<const Call*>(operation.call);
}

// Rows of one task where there are many: their activations stay in the first cache.
constexpr int64_t ROWS_PER_TASK = 8;

class Program final : public Job {
  public:
    Program(const Operation* first, int64_t count)
        : operations(first, first + count), impl(variant()) {
        for (int64_t i = 0; i < count;) i = add(i, count);
        calls.resize(attends.size());
        planned.reserve(attends.size());
    }

    // All that a run needs to know before its tasks. The pool's lock is held.
    void begin(const StepCall& call) {
        step = &call;
        tasks = 0;
        int64_t bytes = 0;
        planned.clear();
        for (Piece& piece : pieces) plan(piece, bytes);
        own_floats = 0;
        for (const Prepared& input : prepared)
            own_floats = std::max(own_floats, input.call->matrix->columns);
        for (const Piece& piece : pieces) own_floats = std::max(own_floats, piece.chunks.units_each);
        own_floats = aligned(own_floats * 4) / 4;
        const int64_t own = bytes;
        bytes += call.threads * own_floats * 4;
        uint8_t* memory = pool_scratch(bytes);
        for (Piece& piece : pieces) piece.memory = memory + piece.place;
        floats = reinterpret_cast<float*>(memory + own);
        for (Piece& piece : pieces)
            if (piece.kind == Piece::ATTENTION) attend_of(piece).use_scratch(piece.memory);
    }

    int64_t num_tasks() const { return tasks; }

    int64_t barrier(int64_t task) const override { return piece_of(task).barrier; }

    void run(int64_t task, int32_t thread) override {
        float* const own = floats + thread * own_floats;
        const Piece& piece = piece_of(task);
        const int64_t part = task - piece.first;
        if (piece.kind == Piece::ROWS) run_rows(piece, part, own);
        else if (piece.kind == Piece::PRODUCT) run_product(piece, part, own);
        else attend_of(piece).run(part);
    }

  private:
    // Tasks [first, first of the next) of a run, which need all tasks below `barrier`.
    struct Piece {
        enum Kind { ROWS, PRODUCT, ATTENTION } kind;
        bool wanted, beside;
        int64_t operation, end;          // ROWS do [operation, end) and then
        int64_t prepare, prepare_end;    // bring rows into the form that products want
        int64_t input, attention;        // of a PRODUCT: the piece that prepares for it; which
        int64_t first, barrier;          // of a run, and all below
        int64_t rows, rows_each, place;
        Chunks chunks;
        uint8_t* memory;
    };

    // Activations in the form that products want, which those of equal form share.
    struct Prepared {
        const ProductCall* call;
        int64_t piece, row_bytes, place;
    };

    int64_t add(int64_t i, int64_t count) {
        const Operation& operation = operations[i];
        if (operation.kind == ATTEND) {
            rows_piece(i).end = i + 1; // where keys and values are appended
            Piece& piece = new_piece(Piece::ATTENTION, i);
            piece.attention = static_cast<int64_t>(attends.size());
            attends.push_back(&call_of<AttentionCall>(operation));
            return i + 1;
        }
        if (operation.kind != LINEAR) {
            if (operation.kind == ROUTE)
                route_bytes = std::max(route_bytes, route_scratch(call_of<RouteCall>(operation)));
            rows_piece(i).end = i + 1;
            return i + 1;
        }
        int64_t end = i + 1;
        while (end < count && operations[end].kind == LINEAR && operations[end].beside) ++end;
        rows_piece(i);
        const auto before = static_cast<int64_t>(pieces.size()) - 1;
        const auto first = static_cast<int64_t>(prepared.size());
        for (int64_t j = i; j < end; ++j) {
            const int64_t input = input_of(call_of<ProductCall>(operations[j]), first, before);
            Piece& piece = new_piece(Piece::PRODUCT, j);
            piece.beside = j > i;
            piece.input = input;
        }
        pieces[before].prepare = first;
        pieces[before].prepare_end = static_cast<int64_t>(prepared.size());
        return end;
    }

    Piece& new_piece(decltype(Piece::kind) kind, int64_t operation) {
        Piece piece = {};
        piece.kind = kind;
        piece.wanted = operations[operation].wanted;
        piece.operation = piece.end = operation;
        pieces.push_back(piece);
        return pieces.back();
    }

    // The last one if it can take operation `i` too.
    Piece& rows_piece(int64_t i) {
        if (!pieces.empty()) {
            Piece& last = pieces.back();
            if (last.kind == Piece::ROWS && last.wanted == bool(operations[i].wanted) &&
                last.prepare == last.prepare_end)
                return last;
        }
        return new_piece(Piece::ROWS, i);
    }

    int64_t input_of(const ProductCall& call, int64_t first, int64_t piece) {
        const Matrix& matrix = *call.matrix;
        const auto end = static_cast<int64_t>(prepared.size());
        for (int64_t i = first; i < end; ++i) {
            const ProductCall& other = *prepared[i].call;
            if (other.x == call.x && other.type == call.type &&
                other.matrix->columns == matrix.columns && other.matrix->format == matrix.format &&
                other.matrix->group_size == matrix.group_size)
                return i;
        }
        prepared.push_back({&call, piece, 0, 0});
        return end;
    }

    void plan(Piece& piece, int64_t& bytes) {
        piece.rows = piece.wanted ? step->num_wanted : step->rows;
        piece.first = piece.barrier = tasks;
        piece.place = bytes;
        const int32_t threads = step->threads;
        if (piece.kind == Piece::ROWS) {
            const int64_t share = (piece.rows + threads - 1) / threads;
            piece.rows_each = std::clamp<int64_t>(share, 1, ROWS_PER_TASK);
            const int64_t count = (piece.rows + piece.rows_each - 1) / piece.rows_each;
            tasks += count;
            bytes += count * aligned(route_bytes);
            for (int64_t i = piece.prepare; i < piece.prepare_end; ++i) {
                Prepared& input = prepared[i];
                input.row_bytes = impl.prepared_bytes(*input.call->matrix, form_of(piece));
                input.place = bytes - piece.place;
                bytes += piece.rows * input.row_bytes;
            }
            return;
        }
        if (piece.kind == Piece::PRODUCT) {
            const Matrix& matrix = *call_of<ProductCall>(operations[piece.operation]).matrix;
            if (piece.beside) piece.barrier = (&piece)[-1].barrier;
            piece.chunks = Chunks(matrix, 1, threads);
            tasks += piece.rows ? piece.chunks.count : 0;
            bytes += piece.rows * aligned(matrix.rows * 4);
            return;
        }
        AttentionCall& call = calls[piece.attention] = *attends[piece.attention];
        call.plan = step->plan;
        call.threads = threads;
        planned.emplace_back(call, threads);
        tasks += attend_of(piece).num_tasks();
        bytes += aligned(attend_of(piece).scratch_bytes());
    }

    Form form_of(const Piece& piece) const { return ::form_of(piece.rows, step->flags); }

    Attend& attend_of(const Piece& piece) { return planned[piece.attention]; }

    const Piece& piece_of(int64_t task) const {
        size_t i = pieces.size() - 1;
        while (pieces[i].first > task) --i;
        return pieces[i];
    }

    void run_rows(const Piece& piece, int64_t part, float* own) {
        const int64_t first = part * piece.rows_each;
        const int64_t last = std::min(first + piece.rows_each, piece.rows);
        uint8_t* memory = piece.memory + part * aligned(route_bytes);
        for (int64_t row = first; row < last; ++row) {
            for (int64_t i = piece.operation; i < piece.end; ++i)
                run_row(operations[i], row, memory);
            for (int64_t i = piece.prepare; i < piece.prepare_end; ++i)
                prepare(prepared[i], piece, row, own);
        }
        for (int64_t i = piece.operation; i < piece.end; ++i)
            if (operations[i].kind == ATTEND) append(i, first, last);
    }

    void append(int64_t i, int64_t first, int64_t last) {
        AttentionCall call = call_of<AttentionCall>(operations[i]);
        call.plan = step->plan;
        append_rows(call, first, last);
    }

    void run_row(const Operation& operation, int64_t row, uint8_t* memory) const {
        switch (operation.kind) {
        case EMBED: return run_embed(call_of<EmbedCall>(operation), step->tokens[row], row);
        case GATHER: return run_gather(call_of<GatherCall>(operation), step->wanted[row], row);
        case ADD: return run_add(call_of<AddCall>(operation), row);
        case SCALE: return run_scale(call_of<ScaleCall>(operation), row);
        case NORM: return run_norm(call_of<NormCall>(operation), row);
        case ROTATE:
            return run_rotate(call_of<RotateCall>(operation), step->positions[row], row);
        case ROUTE:
            run_route(call_of<RouteCall>(operation), row, reinterpret_cast<float*>(memory));
            if (step->most_experts)
                step->kept[row] += keep_fewer(call_of<RouteCall>(operation), row,
                                              step->most_experts[row], step->least_share[row]);
            return;
        case ACTIVATE: return run_activate(call_of<ActivateCall>(operation), row);
        case GATE: return run_gate(call_of<GateCall>(operation), row);
        }
    }

    void prepare(const Prepared& input, const Piece& piece, int64_t row, float* values) const {
        const ProductCall& call = *input.call;
        const int64_t columns = call.matrix->columns;
        impl.widen(static_cast<const uint8_t*>(call.x) + row * columns * size_of(call.type),
                   call.type, columns, values);
        impl.prepare(*call.matrix, values, call.type, form_of(piece),
                     piece.memory + input.place + row * input.row_bytes);
    }

    void run_product(const Piece& piece, int64_t part, float* bias) const {
        const ProductCall& call = call_of<ProductCall>(operations[piece.operation]);
        const Prepared& input = prepared[piece.input];
        const uint8_t* rows = pieces[input.piece].memory + input.place;
        const auto [first, last] = piece.chunks.range(part);
        const int64_t result_bytes = aligned(call.matrix->rows * 4);
        const auto result = [&](int64_t row) {
            return reinterpret_cast<float*>(piece.memory + row * result_bytes);
        };
        multiply_in_blocks(impl, *call.matrix, nullptr, first, last, piece.rows, call.type,
                           form_of(piece), [&](int64_t row) { return rows + row * input.row_bytes; }, result);
        LinearCall finished = {};
        finished.matrix = call.matrix;
        finished.out = call.out;
        finished.type = call.out_type;
        for (int64_t row = 0; row < piece.rows; ++row)
            finish_linear(impl, finished, first, last, row, result(row), bias);
    }

    const std::vector<Operation> operations;
    const Variant& impl;
    std::vector<Piece> pieces;
    std::vector<Prepared> prepared;
    std::vector<const AttentionCall*> attends;
    std::vector<AttentionCall> calls; // of this run
    std::vector<Attend> planned;
    const StepCall* step = nullptr;
    int64_t tasks = 0, route_bytes = 0, own_floats = 0;
    float* floats = nullptr; // own_floats of each thread
};

} // namespace

EXPERTD_STRUCTURE(Operation)
EXPERTD_STRUCTURE(EmbedCall)
EXPERTD_STRUCTURE(GatherCall)
EXPERTD_STRUCTURE(AddCall)
EXPERTD_STRUCTURE(ScaleCall)
EXPERTD_STRUCTURE(NormCall)
EXPERTD_STRUCTURE(ProductCall)
EXPERTD_STRUCTURE(RotateCall)
EXPERTD_STRUCTURE(RouteCall)
EXPERTD_STRUCTURE(ActivateCall)
EXPERTD_STRUCTURE(GateCall)
EXPERTD_STRUCTURE(StepCall)

// A program of `count` operations; null without memory. Its structures must outlive it.
EXPERTD_API void* expertd_program_make(const Operation* operations, int64_t count) {
    Program* made = nullptr;
    without_memory([&] { made = new Program(operations, count); });
    return made;
}

EXPERTD_API void expertd_program_free(void* program) { delete static_cast<Program*>(program); }

// Runs it for the rows of `step`. 0, or 1 without memory.
EXPERTD_API int32_t expertd_program_run(void* program, const StepCall* step) {
    return without_memory([=] {
        PoolLock lock;
        auto& job = *static_cast<Program*>(program);
        job.begin(*step);
        run_job(job, job.num_tasks(), step->threads);
    });
}
