// A MoE layer in one call, in phases that threads share: the activations are brought into the
// form that products want; gate and up; the activation; down, into the slots; the sum.

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "pool.h"
#include "tasks.h"
#include "variant.h"

namespace {

struct Pair {
    int64_t token, slot; // slot = token * k + position
};

// The pairs of one expert, in order of token and position. `form` is what its activations have: a
// single row is cheaper by itself, unless its bits must not depend on the number of rows.
struct Group {
    int64_t first, count;
    const uint8_t* record;
    Form form;
};

class ExpertsJob final : public Job {
  public:
    explicit ExpertsJob(const ExpertsCall& call)
        : call(call), layer(*call.layer), impl(variant()), hidden_size(layer.down.rows), inner(layer.down.columns),
          gate_up_rows(layer.gate_up.rows) {
        collect();
        const auto num_groups = static_cast<int64_t>(groups.size());
        gate_up_tasks = Chunks(layer.gate_up, num_groups, call.threads);
        down_tasks = Chunks(layer.down, num_groups, call.threads);
        prepare_hidden_end = call.tokens;
        gate_up_end = prepare_hidden_end + num_groups * gate_up_tasks.count;
        activate_end = gate_up_end + static_cast<int64_t>(pairs.size());
        down_end = activate_end + num_groups * down_tasks.count;
        sum_end = down_end + (call.out ? call.tokens : 0);
        const Form several = form_of(2, call.flags);
        hidden_bytes = impl.prepared_bytes(layer.gate_up, several);
        one_row_bytes = impl.prepared_bytes(layer.gate_up, ONE_ROW);
        inner_bytes = std::max(impl.prepared_bytes(layer.down, several),
                               impl.prepared_bytes(layer.down, ONE_ROW));
        own_floats = std::max(2 * hidden_size, gate_up_rows);
    }

    int64_t num_tasks() const { return sum_end; }

    int64_t scratch_bytes() const {
        const auto num_pairs = static_cast<int64_t>(pairs.size());
        return call.tokens * (hidden_bytes + one_row_bytes) +
               num_pairs * (inner_bytes + float_bytes(gate_up_rows) + float_bytes(hidden_size)) +
               call.threads * own_floats * 4;
    }

    void use_scratch(uint8_t* memory) {
        const auto num_pairs = static_cast<int64_t>(pairs.size());
        hidden = memory;
        hidden_of_one = hidden + call.tokens * hidden_bytes;
        activated = hidden_of_one + call.tokens * one_row_bytes;
        gate_up = activated + num_pairs * inner_bytes;
        down = gate_up + num_pairs * float_bytes(gate_up_rows);
        floats = reinterpret_cast<float*>(down + num_pairs * float_bytes(hidden_size));
    }

    int64_t barrier(int64_t task) const override {
        if (task < prepare_hidden_end) return 0;
        if (task < gate_up_end) return prepare_hidden_end;
        if (task < activate_end) return gate_up_end;
        if (task < down_end) return activate_end;
        return down_end;
    }

    void run(int64_t task, int32_t thread) override {
        float* const own = floats + thread * own_floats;
        if (task < prepare_hidden_end) run_prepare(task, own);
        else if (task < gate_up_end) run_gate_up(task - prepare_hidden_end);
        else if (task < activate_end) run_activate(task - gate_up_end, own);
        else if (task < down_end) run_down(task - activate_end, own);
        else run_sum(task - down_end, own);
    }

  private:
    static int64_t float_bytes(int64_t count) { return aligned(count * 4); }

    // Orders the (token, position) pairs by expert, in the order of the call's experts.
    void collect() {
        const int64_t num_pairs = call.tokens * call.k;
        int64_t highest = -1;
        for (int64_t e = 0; e < call.num_experts; ++e)
            highest = std::max(highest, call.experts[e]);
        std::vector<int64_t> place(highest + 1, -1), count(call.num_experts, 0);
        for (int64_t e = 0; e < call.num_experts; ++e) place[call.experts[e]] = e;
        const auto place_of = [&](int64_t i) {
            const int64_t expert = call.top_k_index[i];
            return expert < 0 || expert > highest ? -1 : place[expert];
        };
        int64_t total = 0;
        for (int64_t i = 0; i < num_pairs; ++i)
            if (const int64_t e = place_of(i); e >= 0) ++count[e], ++total;
        std::vector<int64_t> next(call.num_experts);
        int64_t first = 0;
        for (int64_t e = 0; e < call.num_experts; ++e) {
            next[e] = first;
            if (count[e])
                groups.push_back({first, count[e], call.arena + call.records[e],
                                  form_of(count[e], call.flags)});
            first += count[e];
        }
        pairs.resize(total);
        for (int64_t i = 0; i < num_pairs; ++i)
            if (const int64_t e = place_of(i); e >= 0) pairs[next[e]++] = {i / call.k, i};
        group_of.resize(total);
        for_several.resize(call.tokens);
        for_one.resize(call.tokens);
        for (size_t g = 0; g < groups.size(); ++g)
            for (int64_t i = groups[g].first; i < groups[g].first + groups[g].count; ++i) {
                group_of[i] = static_cast<int64_t>(g);
                (groups[g].form == ONE_ROW ? for_one : for_several)[pairs[i].token] = true;
            }
    }

    uint8_t* prepared_hidden(int64_t token, Form form) const {
        return form == ONE_ROW ? hidden_of_one + token * one_row_bytes
                               : hidden + token * hidden_bytes;
    }
    uint8_t* prepared_inner(int64_t pair) const { return activated + pair * inner_bytes; }
    float* gate_up_of(int64_t pair) const {
        return reinterpret_cast<float*>(gate_up + pair * float_bytes(gate_up_rows));
    }
    float* down_of(int64_t pair) const {
        return reinterpret_cast<float*>(down + pair * float_bytes(hidden_size));
    }

    void run_prepare(int64_t token, float* row) const {
        const int64_t bytes = hidden_size * size_of(call.type);
        impl.widen(static_cast<const uint8_t*>(call.hidden) + token * bytes, call.type,
                   hidden_size, row);
        const Form several = form_of(2, call.flags);
        if (for_several[token])
            impl.prepare(layer.gate_up, row, call.type, several, prepared_hidden(token, several));
        if (for_one[token])
            impl.prepare(layer.gate_up, row, call.type, ONE_ROW, prepared_hidden(token, ONE_ROW));
    }

    void run_gate_up(int64_t task) const {
        const Group& group = groups[task / gate_up_tasks.count];
        const auto [first, last] = gate_up_tasks.range(task % gate_up_tasks.count);
        multiply_in_blocks(impl, layer.gate_up, group.record, first, last, group.count, call.type,
                           group.form,
                           [&](int64_t i) {
                               return prepared_hidden(pairs[group.first + i].token, group.form);
                           },
                           [&](int64_t i) { return gate_up_of(group.first + i); });
    }

    void run_activate(int64_t pair, float* bias) const {
        const Group& group = groups[group_of[pair]];
        float* values = gate_up_of(pair);
        finish(impl, layer.gate_up, group.record, 0, gate_up_rows, call.type, values, bias);
        // Gate and up, or up alone.
        impl.activate(layer.activation, values, values + gate_up_rows - inner, inner, call.type,
                      values);
        impl.prepare(layer.down, values, call.type, group.form, prepared_inner(pair));
    }

    void run_down(int64_t task, float* bias) const {
        const Group& group = groups[task / down_tasks.count];
        const auto [first, last] = down_tasks.range(task % down_tasks.count);
        multiply_in_blocks(impl, layer.down, group.record, first, last, group.count, call.type,
                           group.form,
                           [&](int64_t i) { return prepared_inner(group.first + i); },
                           [&](int64_t i) { return down_of(group.first + i); });
        const int64_t units = num_units(layer.down);
        for (int64_t i = 0; i < group.count; ++i)
            for (int64_t k = 0; k < rows_per_unit(layer.down.format); ++k)
                store(group, group.first + i, first + k * units, last - first, bias);
    }

    // Rows [row, row + count) of a pair's result: rounded, biased, weighted, into its slot.
    void store(const Group& group, int64_t pair, int64_t row, int64_t count,
               float* bias) const {
        float* values = down_of(pair) + row;
        finish(impl, layer.down, group.record, row, count, call.type, values, bias);
        const int64_t slot = pairs[pair].slot;
        float weight;
        impl.widen(static_cast<const uint8_t*>(call.top_k_weights) +
                       slot * size_of(call.weights_type),
                   call.weights_type, 1, &weight);
        for (int64_t i = 0; i < count; ++i) values[i] *= weight;
        impl.narrow(values, count, call.slots_type,
                    static_cast<uint8_t*>(call.slots) +
                        (slot * hidden_size + row) * size_of(call.slots_type));
    }

    // As torch adds up fewer than 16 rows: one after the other, in float32.
    void run_sum(int64_t token, float* sum) const {
        float* const row = sum + hidden_size;
        std::fill(sum, sum + hidden_size, 0.0f);
        const int64_t bytes = hidden_size * size_of(call.slots_type);
        const auto* slots = static_cast<const uint8_t*>(call.slots) + token * call.k * bytes;
        for (int64_t position = 0; position < call.k; ++position) {
            impl.widen(slots + position * bytes, call.slots_type, hidden_size, row);
            for (int64_t i = 0; i < hidden_size; ++i) sum[i] += row[i];
        }
        // torch rounds the sum to the slots' type, and that to the result's.
        impl.round(sum, hidden_size, call.slots_type);
        impl.narrow(sum, hidden_size, call.type,
                    static_cast<uint8_t*>(call.out) + token * hidden_size * size_of(call.type));
    }

    const ExpertsCall& call;
    const Layer& layer;
    const Variant& impl;
    const int64_t hidden_size, inner, gate_up_rows;
    std::vector<Pair> pairs;
    std::vector<Group> groups;
    std::vector<int64_t> group_of;
    std::vector<uint8_t> for_several, for_one; // whether a token's row is wanted so
    Chunks gate_up_tasks, down_tasks;
    // Where the tasks of each phase end.
    int64_t prepare_hidden_end, gate_up_end, activate_end, down_end, sum_end;
    int64_t hidden_bytes, one_row_bytes, inner_bytes;
    uint8_t *hidden, *hidden_of_one, *activated, *gate_up, *down;
    int64_t own_floats; // of each thread
    float* floats;
};

} // namespace

EXPERTD_STRUCTURE(Activation)
EXPERTD_STRUCTURE(Layer)
EXPERTD_STRUCTURE(ExpertsCall)

// Fills the slots of the call's experts, and with `out` sums them. 0, or 1 without memory.
EXPERTD_API int32_t expertd_experts(const ExpertsCall* call) {
    return without_memory([=] {
        PoolLock lock;
        ExpertsJob job(*call);
        job.use_scratch(pool_scratch(job.scratch_bytes()));
        run_job(job, job.num_tasks(), call->threads);
    });
}
