// Small operations over loops that the compiler vectorizes for the instruction set of the file that
// includes this. Rounded where torch rounds, and otherwise different by the order of float32 sums.
//
// A row's result depends on that row alone, and on no instruction set: no product is fused with a
// sum, as torch, which computes one after the other, cannot do it either. So this comes first in a
// file, and nothing that is to be fused beside it.
#pragma once

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <cmath>

#include "expertstore/cpp/numbers.h"
#include "steps.h"
#include "unroll.h"

namespace {
namespace loops {

constexpr int64_t LANES = 16;

INLINE float get(const uint16_t* x, int64_t i) { return from_bf16(x[i]); }
INLINE float get(const float* x, int64_t i) { return x[i]; }
INLINE void put(uint16_t* x, int64_t i, float value) { x[i] = to_bf16(value); }
INLINE void put(float* x, int64_t i, float value) { x[i] = value; }
INLINE float rounded(const uint16_t*, float value) { return from_bf16(to_bf16(value)); }
INLINE float rounded(const float*, float value) { return value; }

// f(p...), of pointers to elements of `type`.
template <class F, class... P> INLINE void typed(int32_t type, const F& f, P*... p) {
    using std::is_const_v;
    if (type == BF16) f(static_cast<std::conditional_t<is_const_v<P>, const uint16_t, uint16_t>*>(p)...);
    else f(static_cast<std::conditional_t<is_const_v<P>, const float, float>*>(p)...);
}

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

template <typename T, typename W>
INLINE void norm_by_root(const T* x, const W* weight, T* out, int64_t n, float eps,
                         bool round_first) {
    const float factor = 1.0f / std::sqrt(sum_squares(x, n, 0.0f) / float(n) + eps);
    if (round_first)
        for (int64_t i = 0; i < n; ++i)
            put(out, i, get(weight, i) * rounded(x, get(x, i) * factor));
    else
        for (int64_t i = 0; i < n; ++i) put(out, i, get(weight, i) * (get(x, i) * factor));
}

template <typename T> INLINE void norm_by_deviation(const NormCall& c, const T* x, T* out) {
    const float *weight = c.weight, *bias = c.bias;
    const int64_t n = c.n;
    const float mean = sum_of(x, n) / float(n);
    const float factor = 1.0f / std::sqrt(sum_squares(x, n, mean) / float(n) + c.eps);
    if (bias)
        for (int64_t i = 0; i < n; ++i)
            put(out, i, (get(x, i) - mean) * factor * weight[i] + bias[i]);
    else
        for (int64_t i = 0; i < n; ++i) put(out, i, (get(x, i) - mean) * factor * weight[i]);
}

void norm(const NormCall& c, const void* x, void* out) {
    typed(c.type, [&](const auto* x, auto* out) INLINE_LAMBDA {
        if (c.kind == LAYER) norm_by_deviation(c, x, out);
        else norm_by_root(x, c.weight, out, c.n, c.eps, c.kind == RMS_ROUND);
    }, x, out);
}

void add(const AddCall& c, const void* x, const void* y, void* out) {
    typed(c.type, [&](const auto* x, const auto* y, auto* out) INLINE_LAMBDA {
        for (int64_t i = 0; i < c.n; ++i) put(out, i, get(x, i) + get(y, i));
    }, x, y, out);
}

void scale(const ScaleCall& c, const void* x, void* out) {
    typed(c.type, [&](const auto* x, auto* out) INLINE_LAMBDA {
        if (c.divide)
            for (int64_t i = 0; i < c.n; ++i) put(out, i, get(x, i) / c.factor);
        else
            for (int64_t i = 0; i < c.n; ++i) put(out, i, get(x, i) * c.factor);
    }, x, out);
}

void gate(const GateCall& c, const void* x, const void* by, void* out) {
    typed(c.type, [&](const auto* x, const auto* by, auto* out) INLINE_LAMBDA {
        for (int64_t i = 0; i < c.n; ++i) {
            const float value = get(by, c.gate_n == 1 ? 0 : i);
            put(out, i, get(x, i) * rounded(x, 1.0f / (1.0f + std::exp(-value))));
        }
    }, x, by, out);
}

// Each product is rounded, and then their sum, as torch does it.
void rotate(const RotateCall& c, const float* cos, const float* sin, void* x) {
    const int64_t half = c.turned / 2;
    typed(c.type, [&](auto* x) INLINE_LAMBDA {
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
    }, x);
}

} // namespace loops
} // namespace
