// The small operations between the matrices of a decoding step, each one call instead of the
// several of torch, every one of which costs more than its arithmetic when there is one token.
//
// They run on the calling thread: waking another costs more than they take. Results are rounded where
// torch rounds them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "pool.h"
#include "step.h"
#include "tasks.h"

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

#define INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

struct Bf16 {
    uint16_t bits;
};

INLINE float widen(Bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
INLINE float widen(float value) { return value; }

// To the nearest, ties to even; NaN stays NaN.
INLINE void narrow(float value, Bf16 &result) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    result.bits = uint16_t(nan ? 0x7fc0 : rounded);
}
INLINE void narrow(float value, float &result) { result = value; }

template <typename T> INLINE float rounded(float value) {
    T result;
    narrow(value, result);
    return widen(result);
}

INLINE void load(const float *from, Floats &to) { std::memcpy(&to, from, sizeof to); }
INLINE void load(const Bf16 *from, Floats &to) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    Words words = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(&to, &words, sizeof to);
}

// Halves are added until one is left.
INLINE float sum(const Floats &lanes) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eights[2];
    std::memcpy(eights, &lanes, sizeof eights);
    eights[0] += eights[1];
    Four fours[2];
    std::memcpy(fours, eights, sizeof fours);
    fours[0] += fours[1];
    return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

// y = weight * x / sqrt(mean(x^2) + eps), per row of n. Either the quotient is rounded before it
// meets the weight, or the product only.
template <typename T>
INLINE void rms_norm(const T *x, const T *weight, T *y, int64_t rows, int64_t n, float eps,
                     bool round_first) {
    for (int64_t row = 0; row < rows; row++, x += n, y += n) {
        Floats squares = {};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            Floats values;
            load(x + i, values);
            squares += values * values;
        }
        float total = sum(squares);
        for (; i < n; i++) total += widen(x[i]) * widen(x[i]);
        const float factor = 1.0f / std::sqrt(total / float(n) + eps);
        if (round_first)
            for (i = 0; i < n; i++)
                narrow(widen(weight[i]) * rounded<T>(widen(x[i]) * factor), y[i]);
        else
            for (i = 0; i < n; i++) narrow(widen(weight[i]) * (widen(x[i]) * factor), y[i]);
    }
}

// Rotary position embedding in halves, rounded after each product and the sum as torch does it.
template <typename T>
INLINE void rotate(const T *x, int64_t head_stride, int64_t heads, int64_t d, const T *cos,
                   const T *sin, T *out, int64_t out_stride) {
    const int64_t half = d / 2;
    for (int64_t head = 0; head < heads; head++, x += head_stride, out += out_stride) {
        for (int64_t i = 0; i < half; i++)
            narrow(rounded<T>(widen(x[i]) * widen(cos[i])) +
                       rounded<T>(-widen(x[i + half]) * widen(sin[i])),
                   out[i]);
        for (int64_t i = half; i < d; i++)
            narrow(rounded<T>(widen(x[i]) * widen(cos[i])) +
                       rounded<T>(widen(x[i - half]) * widen(sin[i])),
                   out[i]);
    }
}

// torch.topk's own choice on CPU, so that equal probabilities are told apart as there
// (aten/src/ATen/native/TopKImpl.h: nth_element or partial_sort by size, NaN first).
typedef std::pair<float, int64_t> Choice;

template <typename T>
void route(const T *logits, int64_t rows, int64_t n, int64_t k, bool normalize, T *as_logits,
           float *as_float, int64_t *index, Choice *choices) {
    auto before = [](const Choice &x, const Choice &y) {
        return (std::isnan(x.first) && !std::isnan(y.first)) || x.first > y.first;
    };
    for (int64_t row = 0; row < rows; row++, logits += n) {
        float most = -INFINITY;
        for (int64_t i = 0; i < n; i++) {
            float logit = widen(logits[i]);
            most = logit <= most ? most : logit;
        }
        float total = 0;
        for (int64_t i = 0; i < n; i++) {
            float power = std::exp(widen(logits[i]) - most);
            total += power;
            choices[i] = Choice(power, i);
        }
        for (int64_t i = 0; i < n; i++) choices[i].first /= total;
        Choice *kth = choices + k;
        if (k * 64 <= n) {
            std::partial_sort(choices, kth, choices + n, before);
        } else {
            std::nth_element(choices, kth - 1, choices + n, before);
            std::sort(choices, kth - 1, before);
        }
        float chosen = 0;
        for (int64_t i = 0; i < k; i++) chosen += choices[i].first;
        for (int64_t i = 0; i < k; i++) {
            float weight = choices[i].first;
            if (normalize) weight /= chosen;
            index[row * k + i] = choices[i].second;
            if (as_float) as_float[row * k + i] = weight;
            if (as_logits) narrow(weight, as_logits[row * k + i]);
        }
    }
}

// The first of the largest, or the first NaN, as torch.argmax.
template <typename T> INLINE int64_t argmax(const T *x, int64_t n) {
    Floats most;
    for (int i = 0; i < LANES; i++) most[i] = -INFINITY;
    Floats sums = {}; // NaN where any value is
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Floats values;
        load(x + i, values);
        most = values > most ? values : most;
        sums += values * 0.0f; // of an infinity, too
    }
    float largest = -INFINITY;
    bool nan = false;
    for (int lane = 0; lane < LANES; lane++) {
        largest = std::max(largest, most[lane]);
        nan |= std::isnan(sums[lane]);
    }
    for (; i < n; i++) {
        largest = std::max(largest, widen(x[i]));
        nan |= std::isnan(widen(x[i]));
    }
    if (nan)
        for (i = 0; i < n; i++)
            if (std::isnan(widen(x[i]))) return i;
    for (i = 0; i < n; i++)
        if (widen(x[i]) == largest) return i;
    return 0;
}

CLONES void rms_norm_bf16(const Bf16 *x, const Bf16 *weight, Bf16 *y, int64_t rows, int64_t n,
                          float eps, bool round_first) {
    rms_norm(x, weight, y, rows, n, eps, round_first);
}
CLONES void rms_norm_f32(const float *x, const float *weight, float *y, int64_t rows, int64_t n,
                         float eps, bool round_first) {
    rms_norm(x, weight, y, rows, n, eps, round_first);
}
CLONES void rotate_bf16(const Bf16 *x, int64_t head_stride, int64_t heads, int64_t d,
                        const Bf16 *cos, const Bf16 *sin, Bf16 *out, int64_t out_stride) {
    rotate(x, head_stride, heads, d, cos, sin, out, out_stride);
}
CLONES void rotate_f32(const float *x, int64_t head_stride, int64_t heads, int64_t d,
                       const float *cos, const float *sin, float *out, int64_t out_stride) {
    rotate(x, head_stride, heads, d, cos, sin, out, out_stride);
}

CLONES int64_t argmax_bf16(const Bf16 *x, int64_t n) { return argmax(x, n); }
CLONES int64_t argmax_f32(const float *x, int64_t n) { return argmax(x, n); }

}  // namespace

void step_rotate(const void *x, int64_t head_stride, int64_t heads, int64_t d, const void *cos,
                 const void *sin, void *out, int64_t out_stride, int32_t type) {
    if (type == BF16)
        rotate_bf16(static_cast<const Bf16 *>(x), head_stride, heads, d,
                    static_cast<const Bf16 *>(cos), static_cast<const Bf16 *>(sin),
                    static_cast<Bf16 *>(out), out_stride);
    else
        rotate_f32(static_cast<const float *>(x), head_stride, heads, d,
                   static_cast<const float *>(cos), static_cast<const float *>(sin),
                   static_cast<float *>(out), out_stride);
}

EXPERTD_API void expertd_rms_norm(const void *x, const void *weight, void *y, int64_t rows,
                                  int64_t n, float eps, int32_t round_first, int32_t type) {
    if (type == BF16)
        rms_norm_bf16(static_cast<const Bf16 *>(x), static_cast<const Bf16 *>(weight),
                      static_cast<Bf16 *>(y), rows, n, eps, round_first);
    else
        rms_norm_f32(static_cast<const float *>(x), static_cast<const float *>(weight),
                     static_cast<float *>(y), rows, n, eps, round_first);
}

// Queries and keys of one token; the results are [heads, d] without gaps.
EXPERTD_API void expertd_rotate(const void *q, const void *k, const void *cos, const void *sin,
                                void *q_out, void *k_out, int64_t heads, int64_t kv_heads,
                                int64_t d, int64_t q_head, int64_t k_head, int32_t type) {
    step_rotate(q, q_head, heads, d, cos, sin, q_out, d, type);
    step_rotate(k, k_head, kv_heads, d, cos, sin, k_out, d, type);
}

int64_t step_route_bytes(int64_t n) { return aligned(n * int64_t(sizeof(Choice))); }

void step_route(const void *logits, int64_t rows, int64_t n, int64_t k, int32_t normalize,
                int32_t float_weights, void *weights, int64_t *index, int32_t type,
                uint8_t *scratch) {
    float *as_float = float_weights ? static_cast<float *>(weights) : nullptr;
    auto *choices = reinterpret_cast<Choice *>(scratch);
    if (type == BF16)
        route(static_cast<const Bf16 *>(logits), rows, n, k, normalize,
              float_weights ? nullptr : static_cast<Bf16 *>(weights), as_float, index, choices);
    else
        route(static_cast<const float *>(logits), rows, n, k, normalize,
              float_weights ? nullptr : static_cast<float *>(weights), as_float, index, choices);
}

// The k likeliest of n by softmax, with their probabilities, in the logits' dtype or in float32.
// 0, or 1 without memory.
EXPERTD_API int32_t expertd_route(const void *logits, int64_t rows, int64_t n, int64_t k,
                                  int32_t normalize, int32_t float_weights, void *weights,
                                  int64_t *index, int32_t type) {
    return without_memory([=] {
        PoolLock lock;
        step_route(logits, rows, n, k, normalize, float_weights, weights, index, type,
                   pool_scratch(step_route_bytes(n)));
    });
}

// The index of the largest of n.
EXPERTD_API int64_t expertd_argmax(const void *x, int64_t n, int32_t type) {
    return type == BF16 ? argmax_bf16(static_cast<const Bf16 *>(x), n)
                        : argmax_f32(static_cast<const float *>(x), n);
}
