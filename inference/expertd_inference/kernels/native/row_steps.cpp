// What a program does with a row: that of one operation after the other.

#include "row_steps.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "steps.h"
#include "tasks.h"
#include "values.h"

namespace {

const uint8_t* at(const void* x, int64_t elements, int32_t type) {
    return static_cast<const uint8_t*>(x) + elements * size_of(type);
}
uint8_t* at(void* x, int64_t elements, int32_t type) {
    return static_cast<uint8_t*>(x) + elements * size_of(type);
}

void copy_row(const void* from, int64_t row, void* to, int64_t to_row, int64_t bytes) {
    memcpy(static_cast<uint8_t*>(to) + to_row * bytes,
           static_cast<const uint8_t*>(from) + row * bytes, bytes);
}

struct Choice {
    float value;
    int64_t index;
};

// NaN first, as torch has it; of equals the first.
bool before(const Choice& x, const Choice& y) {
    const bool x_nan = x.value != x.value, y_nan = y.value != y.value;
    if (x_nan != y_nan) return x_nan;
    if (x.value != y.value && !x_nan) return x.value > y.value;
    return x.index < y.index;
}

// The k first of n.
void choose(Choice* choices, int64_t n, int64_t k) {
    std::partial_sort(choices, choices + k, choices + n, before);
}

float largest(const float* x, int64_t n) {
    float most = -INFINITY;
    for (int64_t i = 0; i < n; ++i) most = x[i] <= most ? most : x[i]; // NaN gets through
    return most;
}

// x becomes its softmax.
void softmax(float* x, int64_t n) {
    const float most = largest(x, n);
    float total = 0;
    for (int64_t i = 0; i < n; ++i) total += x[i] = std::exp(x[i] - most);
    for (int64_t i = 0; i < n; ++i) x[i] /= total;
}

// By Phi-MoE's rule: of `scores` the likeliest, among those near it; -INFINITY is left out.
int64_t mix_sparsely(const float* scores, const float* all, int64_t n, float jitter, int32_t type,
                     float* weight) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; ++i)
        if (!(scores[i] <= scores[best])) best = i;
    const float most = scores[best];
    float total = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float factor = std::max(std::fabs(all[i]), most);
        const float distance = round_to(round_to(most - all[i], type) / factor, type);
        if (scores[i] == -INFINITY || distance > 2 * jitter) continue;
        total += std::exp(scores[i] - most);
    }
    *weight = round_to(1.0f / total, type);
    return best;
}

void route(const RouteCall& c, float* logits, Choice* choices, float* weights) {
    const int64_t n = c.n, k = c.k;
    if (c.kind == SPARSE_MIXER) {
        int64_t index[2];
        auto* left = reinterpret_cast<float*>(choices);
        memcpy(left, logits, n * sizeof(float));
        for (int64_t i = 0; i < 2; ++i) {
            index[i] = mix_sparsely(left, logits, n, c.scale, c.type, weights + i);
            left[index[i]] = -INFINITY;
        }
        for (int64_t i = 0; i < 2; ++i) choices[i] = {0, index[i]};
        return;
    }
    if (c.kind == SOFTMAX) softmax(logits, n);
    if (c.kind == SIGMOID)
        for (int64_t i = 0; i < n; ++i) logits[i] = 1.0f / (1.0f + std::exp(-logits[i]));
    for (int64_t i = 0; i < n; ++i)
        choices[i] = {c.bias ? logits[i] + c.bias[i] : logits[i], i};
    if (c.groups > 1) {
        // A group is as good as its two best together; what is in none of the best cannot win.
        const int64_t size = n / c.groups;
        Choice* best = choices + n;
        for (int64_t g = 0; g < c.groups; ++g) {
            float first = -INFINITY, second = -INFINITY;
            for (int64_t i = g * size; i < (g + 1) * size; ++i) {
                const float value = choices[i].value;
                if (value > first) second = first, first = value;
                else if (value > second) second = value;
            }
            best[g] = {first + second, g};
        }
        choose(best, c.groups, c.top_groups);
        for (int64_t g = c.top_groups; g < c.groups; ++g)
            for (int64_t i = 0; i < size; ++i)
                choices[best[g].index * size + i].value = -INFINITY;
    }
    choose(choices, n, k);
    float total = 0;
    for (int64_t i = 0; i < k; ++i) weights[i] = logits[choices[i].index];
    if (c.kind == TOP_SOFTMAX) softmax(weights, k);
    for (int64_t i = 0; i < k; ++i) total += weights[i];
    if (c.kind == SIGMOID) total += 1e-20f;
    for (int64_t i = 0; i < k; ++i) {
        if (c.normalize) weights[i] /= total;
        if (c.kind == SIGMOID) weights[i] *= c.scale;
    }
}

} // namespace

void run_gather(const GatherCall& c, int64_t from, int64_t row) {
    copy_row(c.x, from, c.out, row, c.row_bytes);
}

void run_embed(const EmbedCall& c, int64_t token, int64_t row) {
    copy_row(c.table, token, c.out, row, c.row_bytes);
}

void run_add(const AddCall& c, int64_t row) {
    const int64_t x = row * c.n, y = row * c.y_row;
    steps().add(c, at(c.x, x, c.type), at(c.y, y, c.type), at(c.out, x, c.type));
}

void run_scale(const ScaleCall& c, int64_t row) {
    const int64_t x = row * c.n;
    steps().scale(c, at(c.x, x, c.type), at(c.out, x, c.type));
}

void run_norm(const NormCall& c, int64_t row) {
    for (int64_t group = 0; group < c.groups; ++group) {
        const int64_t x = (row * c.groups + group) * c.n;
        steps().norm(c, at(c.x, x, c.type), at(c.out, x, c.type));
    }
}

void run_rotate(const RotateCall& c, int64_t position, int64_t row) {
    const int64_t angle = position * (c.turned / 2);
    steps().rotate(c, static_cast<const float*>(c.cos) + angle,
                   static_cast<const float*>(c.sin) + angle,
                   at(c.x, row * c.heads * c.d, c.type));
}

void run_gate(const GateCall& c, int64_t row) {
    const int64_t x = row * c.n;
    steps().gate(c, at(c.x, x, c.type), at(c.gate, row * c.gate_n, c.type),
                 at(c.out, x, c.type));
}

void run_activate(const ActivateCall& c, int64_t row) {
    constexpr int64_t BLOCK = 1024;
    float gate[BLOCK], up[BLOCK];
    const Variant& impl = variant();
    const int64_t size = size_of(c.type);
    const uint8_t *gates = at(c.gate, row * c.n, c.type), *ups = at(c.up, row * c.n, c.type);
    uint8_t* out = at(c.out, row * c.n, c.type);
    for (int64_t i = 0; i < c.n; i += BLOCK) {
        const int64_t count = std::min(BLOCK, c.n - i);
        impl.widen(gates + i * size, c.type, count, gate);
        impl.widen(ups + i * size, c.type, count, up);
        impl.activate(c.activation, gate, up, count, c.type, gate);
        impl.narrow(gate, count, c.type, out + i * size);
    }
}

int64_t route_scratch(const RouteCall& c) {
    return round_up((c.n + c.k + 1) * 4, 8) + (c.n + c.groups) * sizeof(Choice);
}

void run_route(const RouteCall& c, int64_t row, float* scratch) {
    float *logits = scratch, *weights = logits + c.n;
    auto* choices = reinterpret_cast<Choice*>(reinterpret_cast<uint8_t*>(scratch) +
                                              round_up((c.n + c.k + 1) * 4, 8));
    widen(at(c.logits, row * c.n, c.type), c.type, c.n, logits);
    route(c, logits, choices, weights);
    for (int64_t i = 0; i < c.k; ++i) c.index[row * c.k + i] = choices[i].index;
    narrow(weights, c.k, c.weights_type, at(c.weights, row * c.k, c.weights_type));
}

int64_t keep_fewer(const RouteCall& c, int64_t row, int64_t most, float least) {
    int64_t* const index = c.index + row * c.k;
    std::vector<float> weights(c.k);
    std::vector<Choice> order(c.k);
    widen(at(c.weights, row * c.k, c.weights_type), c.weights_type, c.k, weights.data());
    float total = 0;
    for (int64_t i = 0; i < c.k; ++i) order[i] = {weights[i], i}, total += weights[i];
    choose(order.data(), c.k, c.k);
    int64_t kept = 1;
    for (int64_t rank = 1; rank < c.k; ++rank) {
        const int64_t i = order[rank].index;
        if (rank >= most || weights[i] < least * total) index[i] = c.n;
        else ++kept;
    }
    return kept;
}
