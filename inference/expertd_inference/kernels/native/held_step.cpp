// While a lease is held, what the directory says of an expert stays true, so it can be read here.

#include "held_step.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.h"
#include "tasks.h"

EXPERTD_API int32_t expertd_program_run(void* program, const StepCall* step);
EXPERTD_API int32_t expertd_experts(const ExpertsCall* call);

namespace {

// expertstore/shared/directory.py: a word is 0, or has in its low half a page's number plus 1.
constexpr int64_t PAGE_BYTES = 4096;

// The experts that the routing names, in rising order, and their records; false if one is absent, or
// has more rows than are computed here.
bool find(const HeldSegment& segment, const ExpertsCall& call, std::vector<int64_t>& named,
          std::vector<int64_t>& experts, std::vector<int64_t>& records) {
    named.assign(segment.num_experts, 0);
    for (int64_t i = 0; i < call.tokens * call.k; ++i) {
        const int64_t expert = call.top_k_index[i];
        if (expert >= 0 && expert < segment.num_experts) ++named[expert];
    }
    experts.clear();
    records.clear();
    for (int64_t expert = 0; expert < segment.num_experts; ++expert) {
        if (!named[expert]) continue;
        if (named[expert] > segment.most_rows) return false;
        const uint64_t word = __atomic_load_n(segment.words + expert, __ATOMIC_ACQUIRE);
        if (!word) return false;
        experts.push_back(expert);
        records.push_back((static_cast<int64_t>(word & 0xffffffff) - 1) * PAGE_BYTES);
    }
    return true;
}

// Where the routing names none, the slot has what a layer before left there.
void clear_unused(const HeldSegment& segment, const ExpertsCall& call) {
    const int64_t bytes = call.layer->down.rows * size_of(call.slots_type);
    for (int64_t i = 0; i < call.tokens * call.k; ++i)
        if (call.top_k_index[i] < 0 || call.top_k_index[i] >= segment.num_experts)
            memset(static_cast<uint8_t*>(call.slots) + i * bytes, 0, bytes);
}

int64_t run(HeldStep& held) {
    std::vector<int64_t> named, experts, records;
    for (int64_t i = held.first; i < held.num_segments; ++i) {
        const HeldSegment& segment = held.segments[i];
        if (expertd_program_run(segment.program, held.step)) return -1;
        ExpertsCall call = *segment.call;
        call.tokens = held.step->rows;
        call.threads = held.step->threads;
        call.flags = held.step->flags;
        call.arena = held.arena;
        if (!find(segment, call, named, experts, records)) return i;
        if (held.step->most_experts) clear_unused(segment, call);
        call.experts = experts.data();
        call.records = records.data();
        call.num_experts = static_cast<int64_t>(experts.size());
        if (expertd_experts(&call)) return -1;
        for (const int64_t expert : experts)
            held.used[held.num_used++] = segment.first_entry + expert;
    }
    return held.num_segments;
}

} // namespace

EXPERTD_STRUCTURE(HeldSegment)
EXPERTD_STRUCTURE(HeldStep)

// Runs segments from the first on. The number of that whose program ran and whose experts are not
// all in RAM, or have too many rows; of all if there is none, or -1 without memory.
EXPERTD_API int64_t expertd_held_step(HeldStep* held) {
    int64_t reached = -1;
    without_memory([&] { reached = run(*held); });
    return reached;
}
