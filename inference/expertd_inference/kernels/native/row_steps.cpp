// Rounded where torch rounds, and otherwise different by the order of float32 sums. A row's result
// depends on that row alone, and on no instruction set: no product is fused with a sum.

#include "row_steps.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "values.h"
#include "variant.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t LANES = 16;

INLINE float get(const uint16_t* x, int64_t i) { return from_bf16(x[i]); }
INLINE float get(const float* x, int64_t i) { return x[i]; }
INLINE void put(uint16_t* x, int64_t i, float value) { x[i] = to_bf16(value); }
INLINE void put(float* x, int64_t i, float value) { x[i] = value; }
INLINE float rounded(const uint16_t*, float value) { return from_bf16(to_bf16(value)); }
INLINE float rounded(const float*, float value) { return value; }

// Always the same order of additions.
INLINE float sum_lanes(float* lanes) {
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

template <typename T> INLINE float sum_squares(const T* x, int64_t n, float mean) {
    float lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t j = 0; j < LANES; ++j) {
            const float value = get(x, i + j) - mean;
            lanes[j] += value * value;
        }
    for (int64_t j = 0; i < n; ++i, ++j) {
        const float value = get(x, i) - mean;
        lanes[j] += value * value;
    }
    return sum_lanes(lanes);
}

template <typename T> INLINE float sum_of(const T* x, int64_t n) {
    float lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t j = 0; j < LANES; ++j) lanes[j] += get(x, i + j);
    for (int64_t j = 0; i < n; ++i, ++j) lanes[j] += get(x, i);
    return sum_lanes(lanes);
}

template <typename T>
INLINE void norm(const NormCall& c, const T* x, T* out) {
    const float *weight = c.weight, *bias = c.bias;
    const int64_t n = c.n;
    if (c.kind == LAYER) {
        const float mean = sum_of(x, n) / float(n);
        const float factor = 1.0f / std::sqrt(sum_squares(x, n, mean) / float(n) + c.eps);
        if (bias)
            for (int64_t i = 0; i < n; ++i)
                put(out, i, (get(x, i) - mean) * factor * weight[i] + bias[i]);
        else
            for (int64_t i = 0; i < n; ++i) put(out, i, (get(x, i) - mean) * factor * weight[i]);
        return;
    }
    const float factor = 1.0f / std::sqrt(sum_squares(x, n, 0.0f) / float(n) + c.eps);
    if (c.kind == RMS_ROUND)
        for (int64_t i = 0; i < n; ++i)
            put(out, i, weight[i] * rounded(x, get(x, i) * factor));
    else
        for (int64_t i = 0; i < n; ++i) put(out, i, weight[i] * (get(x, i) * factor));
}

template <typename T> INLINE void add(const T* x, const T* y, T* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) put(out, i, get(x, i) + get(y, i));
}

template <typename T> INLINE void scale(const ScaleCall& c, const T* x, T* out) {
    if (c.divide)
        for (int64_t i = 0; i < c.n; ++i) put(out, i, get(x, i) / c.factor);
    else
        for (int64_t i = 0; i < c.n; ++i) put(out, i, get(x, i) * c.factor);
}

// Each product is rounded, and then their sum, as torch does it.
template <typename T>
INLINE void rotate(const RotateCall& c, const float* cos, const float* sin, T* x) {
    const int64_t half = c.turned / 2;
    for (int64_t head = 0; head < c.heads; ++head, x += c.d) {
        if (c.pairs)
            for (int64_t i = 0; i < half; ++i) {
                const float a = get(x, 2 * i), b = get(x, 2 * i + 1);
                put(x, 2 * i, rounded(x, a * cos[i]) + rounded(x, -b * sin[i]));
                put(x, 2 * i + 1, rounded(x, b * cos[i]) + rounded(x, a * sin[i]));
            }
        else
            for (int64_t i = 0; i < half; ++i) {
                const float a = get(x, i), b = get(x, i + half);
                put(x, i, rounded(x, a * cos[i]) + rounded(x, -b * sin[i]));
                put(x, i + half, rounded(x, b * cos[i]) + rounded(x, a * sin[i]));
            }
    }
}

CLONES void norm_bf16(const NormCall& c, const uint16_t* x, uint16_t* out) { norm(c, x, out); }
CLONES void norm_f32(const NormCall& c, const float* x, float* out) { norm(c, x, out); }
CLONES void add_bf16(const uint16_t* x, const uint16_t* y, uint16_t* out, int64_t n) {
    add(x, y, out, n);
}
CLONES void add_f32(const float* x, const float* y, float* out, int64_t n) { add(x, y, out, n); }
CLONES void scale_bf16(const ScaleCall& c, const uint16_t* x, uint16_t* out) { scale(c, x, out); }
CLONES void scale_f32(const ScaleCall& c, const float* x, float* out) { scale(c, x, out); }
CLONES void rotate_bf16(const RotateCall& c, const float* cos, const float* sin, uint16_t* x) {
    rotate(c, cos, sin, x);
}
CLONES void rotate_f32(const RotateCall& c, const float* cos, const float* sin, float* x) {
    rotate(c, cos, sin, x);
}

template <typename T> void gate(const GateCall& c, const T* x, const T* by, T* out) {
    for (int64_t i = 0; i < c.n; ++i) {
        const float value = get(by, c.gate_n == 1 ? 0 : i);
        put(out, i, get(x, i) * rounded(x, 1.0f / (1.0f + std::exp(-value))));
    }
}

const uint16_t* halves(const void* x, int64_t elements) {
    return static_cast<const uint16_t*>(x) + elements;
}
uint16_t* halves(void* x, int64_t elements) { return static_cast<uint16_t*>(x) + elements; }
const float* floats(const void* x, int64_t elements) {
    return static_cast<const float*>(x) + elements;
}
float* floats(void* x, int64_t elements) { return static_cast<float*>(x) + elements; }

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
    if (c.type == BF16) add_bf16(halves(c.x, x), halves(c.y, y), halves(c.out, x), c.n);
    else add_f32(floats(c.x, x), floats(c.y, y), floats(c.out, x), c.n);
}

void run_scale(const ScaleCall& c, int64_t row) {
    const int64_t x = row * c.n;
    if (c.type == BF16) scale_bf16(c, halves(c.x, x), halves(c.out, x));
    else scale_f32(c, floats(c.x, x), floats(c.out, x));
}

void run_norm(const NormCall& c, int64_t row) {
    for (int64_t group = 0; group < c.groups; ++group) {
        const int64_t x = (row * c.groups + group) * c.n;
        if (c.type == BF16) norm_bf16(c, halves(c.x, x), halves(c.out, x));
        else norm_f32(c, floats(c.x, x), floats(c.out, x));
    }
}

void run_rotate(const RotateCall& c, int64_t position, int64_t row) {
    const int64_t x = row * c.heads * c.d, angle = position * (c.turned / 2);
    const float *cos = floats(c.cos, angle), *sin = floats(c.sin, angle);
    if (c.type == BF16) rotate_bf16(c, cos, sin, halves(c.x, x));
    else rotate_f32(c, cos, sin, floats(c.x, x));
}

void run_gate(const GateCall& c, int64_t row) {
    const int64_t x = row * c.n, by = row * c.gate_n;
    if (c.type == BF16) gate(c, halves(c.x, x), halves(c.gate, by), halves(c.out, x));
    else gate(c, floats(c.x, x), floats(c.gate, by), floats(c.out, x));
}

void run_activate(const ActivateCall& c, int64_t row) {
    constexpr int64_t BLOCK = 1024;
    float gate[BLOCK], up[BLOCK];
    const Variant& impl = variant();
    const int64_t size = c.type == BF16 ? 2 : 4;
    const auto* gates = static_cast<const uint8_t*>(c.gate) + row * c.n * size;
    const auto* ups = static_cast<const uint8_t*>(c.up) + row * c.n * size;
    auto* out = static_cast<uint8_t*>(c.out) + row * c.n * size;
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
    const int64_t size = c.type == BF16 ? 2 : 4;
    widen(static_cast<const uint8_t*>(c.logits) + row * c.n * size, c.type, c.n, logits);
    route(c, logits, choices, weights);
    for (int64_t i = 0; i < c.k; ++i) c.index[row * c.k + i] = choices[i].index;
    const int64_t weight_size = c.weights_type == BF16 ? 2 : 4;
    narrow(weights, c.k, c.weights_type,
           static_cast<uint8_t*>(c.weights) + row * c.k * weight_size);
}
