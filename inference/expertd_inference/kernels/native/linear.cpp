// A linear layer, and weights by themselves.

#include <new>

#include "pool.h"
#include "tasks.h"
#include "variant.h"

namespace {

class LinearJob final : public Job {
  public:
    explicit LinearJob(const LinearCall& call)
        : call(call), matrix(*call.matrix), impl(variant()), form(form_of(call.tokens, call.flags)),
          chunks(matrix, 1, call.threads), row_bytes(impl.prepared_bytes(matrix, form)),
          own_floats(std::max(matrix.columns, chunks.units_each)) {}

    int64_t num_tasks() const { return call.tokens + chunks.count; }

    int64_t scratch_bytes() const {
        return call.tokens * (row_bytes + result_bytes()) + call.threads * own_floats * 4;
    }

    void use_scratch(uint8_t* memory) {
        prepared = memory;
        results = prepared + call.tokens * row_bytes;
        floats = reinterpret_cast<float*>(results + call.tokens * result_bytes());
    }

    int64_t barrier(int64_t task) const override { return task < call.tokens ? 0 : call.tokens; }

    void run(int64_t task, int32_t thread) override {
        float* const own = floats + thread * own_floats;
        if (task < call.tokens) prepare(task, own);
        else multiply(task - call.tokens, own);
    }

  private:
    int64_t result_bytes() const { return aligned(matrix.rows * 4); }

    float* result(int64_t token) const {
        return reinterpret_cast<float*>(results + token * result_bytes());
    }

    void prepare(int64_t token, float* row) const {
        const int64_t bytes = matrix.columns * size_of(call.type);
        impl.widen(static_cast<const uint8_t*>(call.x) + token * bytes, call.type, matrix.columns,
                   row);
        impl.prepare(matrix, row, call.type, form, prepared + token * row_bytes);
    }

    void multiply(int64_t task, float* bias) const {
        const auto [first, last] = chunks.range(task);
        multiply_in_blocks(impl, matrix, nullptr, first, last, call.tokens, call.type, form,
                           [&](int64_t i) { return prepared + i * row_bytes; },
                           [&](int64_t i) { return result(i); });
        for (int64_t token = 0; token < call.tokens; ++token)
            finish_linear(impl, call, first, last, token, result(token), bias);
    }

    const LinearCall& call;
    const Matrix& matrix;
    const Variant& impl;
    const Form form;
    const Chunks chunks;
    const int64_t row_bytes, own_floats; // the latter of each thread
    uint8_t *prepared, *results;
    float* floats;
};

class DequantizeJob final : public Job {
  public:
    DequantizeJob(const Matrix& matrix, const uint8_t* base, int64_t first, int64_t last,
                  void* out, int32_t type, int64_t num_tasks)
        : matrix(matrix), base(base), first(first), last(last), out(static_cast<uint8_t*>(out)),
          type(type), num_tasks(num_tasks) {}

    int64_t barrier(int64_t) const override { return 0; }

    void run(int64_t task, int32_t) override {
        const int64_t units = last - first;
        const int64_t begin = units * task / num_tasks, end = units * (task + 1) / num_tasks;
        const int64_t row = matrix.columns * size_of(type);
        impl.dequantize(matrix, base, first + begin, first + end, out + begin * row, units * row,
                        type);
    }

  private:
    const Variant& impl = variant();
    const Matrix& matrix;
    const uint8_t* base;
    const int64_t first, last;
    uint8_t* out;
    const int32_t type;
    const int64_t num_tasks;
};

} // namespace

EXPERTD_STRUCTURE(Matrix)
EXPERTD_STRUCTURE(LinearCall)

// out = x times the matrix, transposed, whose places are addresses. 0, or 1 without memory.
EXPERTD_API int32_t expertd_linear(const LinearCall* call) {
    return without_memory([=] {
        PoolLock lock;
        LinearJob job(*call);
        job.use_scratch(pool_scratch(job.scratch_bytes()));
        run_job(job, job.num_tasks(), call->threads);
    });
}

// The weights of units [first, last) in `type`: [rows per unit][last - first][columns]. 0, or 1
// without memory.
EXPERTD_API int32_t expertd_dequantize(const Matrix* matrix, const uint8_t* base, int64_t first,
                                       int64_t last, void* out, int32_t type, int32_t threads) {
    return without_memory([=] {
        PoolLock lock;
        const int64_t num_tasks = std::min<int64_t>(last - first, threads * 4);
        DequantizeJob job(*matrix, base, first, last, out, type, num_tasks);
        run_job(job, num_tasks, threads);
    });
}
