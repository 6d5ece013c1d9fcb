// A head of the gated delta rule, for the instruction set of the file that includes this; after
// steps_loops.h, whose rounding it shares. Each column of a state is one chain of sums over its
// keys, so that bits depend on nothing beside the head.
#pragma once

#include <cstring>

#include "delta.h"
#include "steps_loops.h"

namespace {
namespace loops {

// MOST columns at once: two sums of each are in registers.
#if defined(__AVX512F__)
constexpr int MOST = 8;
typedef float Column __attribute__((vector_size(64)));
#elif defined(__AVX__)
constexpr int MOST = 4;
typedef float Column __attribute__((vector_size(32)));
#else
constexpr int MOST = 4;
typedef float Column __attribute__((vector_size(16)));
#endif

// Of a head: rows of its old and new state, and what is common to all columns.
struct DeltaHead {
    const float* from;
    float* to;
    int64_t keys, values;
    float beta;
    float query[MAX_DELTA_WIDTH], key[MAX_DELTA_WIDTH], decay[MAX_DELTA_WIDTH];
};

// COUNT times V at `column`.
template <typename V, int COUNT>
INLINE void delta_columns(const DeltaHead& head, int64_t column, const float* value, float* out) {
    constexpr int64_t LANES_EACH = sizeof(V) / sizeof(float);
    V seen[COUNT], made[COUNT];
    each<COUNT>([&](auto n) INLINE_LAMBDA { seen[n] = made[n] = V{}; });
    const float* from = head.from + column;
    float* to = head.to + column;
    for (int64_t i = 0; i < head.keys; ++i, from += head.values) {
        const float factor = head.decay[i] * head.key[i];
        each<COUNT>([&](auto n) INLINE_LAMBDA {
            V x;
            memcpy(&x, from + n * LANES_EACH, sizeof x);
            seen[n] += x * factor;
        });
    }
    each<COUNT>([&](auto n) INLINE_LAMBDA {
        V wanted;
        memcpy(&wanted, value + column + n * LANES_EACH, sizeof wanted);
        seen[n] = (wanted - seen[n]) * head.beta;
    });
    from = head.from + column;
    for (int64_t i = 0; i < head.keys; ++i, from += head.values, to += head.values) {
        const float decay = head.decay[i], key = head.key[i], query = head.query[i];
        each<COUNT>([&](auto n) INLINE_LAMBDA {
            V x;
            memcpy(&x, from + n * LANES_EACH, sizeof x);
            x = x * decay + seen[n] * key;
            memcpy(to + n * LANES_EACH, &x, sizeof x);
            made[n] += x * query;
        });
    }
    each<COUNT>([&](auto n) INLINE_LAMBDA {
        memcpy(out + column + n * LANES_EACH, &made[n], sizeof made[n]);
    });
}

// `x` by its length, times `factor`.
template <typename T> INLINE void unit(const T* x, int64_t n, float factor, float* out) {
    factor *= 1.0f / std::sqrt(sum_squares(x, n, 0.0f) + 1e-6f);
    for (int64_t i = 0; i < n; ++i) out[i] = get(x, i) * factor;
}

void delta(const DeltaCall& c, int64_t sequence, int64_t number) {
    const int64_t row = sequence * c.heads + number;
    const int64_t key_row = sequence * c.key_heads + number / (c.heads / c.key_heads);
    const int64_t size = c.keys * c.values;
    DeltaHead head;
    head.from = c.states + (c.from[sequence] * c.heads + number) * size;
    head.to = c.states + (c.to[sequence] * c.heads + number) * size;
    head.keys = c.keys;
    head.values = c.values;
    const float* decay = c.decay + row * c.decays;
    for (int64_t i = 0; i < c.keys; ++i)
        head.decay[i] = c.decays > 1 || i == 0 ? std::exp(decay[i]) : head.decay[0];
    typed(c.type, [&](const auto* query, const auto* key, const auto* value, const auto* beta,
                      auto* out) INLINE_LAMBDA {
        unit(query + key_row * c.keys, c.keys, 1.0f / std::sqrt(float(c.keys)), head.query);
        unit(key + key_row * c.keys, c.keys, 1.0f, head.key);
        head.beta = get(beta, row);
        float wanted[MAX_DELTA_WIDTH], made[MAX_DELTA_WIDTH];
        for (int64_t i = 0; i < c.values; ++i) wanted[i] = get(value, row * c.values + i);
        constexpr int64_t LANES_EACH = sizeof(Column) / sizeof(float);
        int64_t column = 0;
        for (; column + MOST * LANES_EACH <= c.values; column += MOST * LANES_EACH)
            delta_columns<Column, MOST>(head, column, wanted, made);
        for (; column + LANES_EACH <= c.values; column += LANES_EACH)
            delta_columns<Column, 1>(head, column, wanted, made);
        for (; column < c.values; ++column) delta_columns<float, 1>(head, column, wanted, made);
        for (int64_t i = 0; i < c.values; ++i) put(out, row * c.values + i, made[i]);
    }, c.query, c.key, c.value, c.beta, c.out);
}

} // namespace loops
} // namespace

#define STEPS_OF_THIS_FILE                                                                        \
    {loops::norm, loops::add, loops::scale, loops::gate, loops::rotate, loops::delta}
