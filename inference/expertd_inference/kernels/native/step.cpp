// The small operations between the matrices of a decoding step, each one call instead of the
// several of torch, every one of which costs more than its arithmetic when there is one token.
//
// They run on the calling thread: waking another costs more than they take. Results are rounded
// where torch rounds them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"

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

INLINE float sum(const Floats &lanes) {
    float parts[LANES];
    std::memcpy(parts, &lanes, sizeof parts);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
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

// Rows of d, strided by the given counts of elements.
struct Attention {
    int64_t heads, kv_heads, length, d;
    int64_t q_head, k_head, k_row, v_head, v_row;
    float scale;
};

template <typename T>
INLINE void attend(const T *q, const T *k, const T *v, T *out, const Attention &a) {
    const int64_t group = a.heads / a.kv_heads;
    std::vector<float> scores(size_t(group * a.length));
    std::vector<float> sums(size_t(a.d));
    std::vector<float> queries(size_t(group * a.d));
    for (int64_t kv = 0; kv < a.kv_heads; kv++) {
        for (int64_t g = 0; g < group; g++)
            for (int64_t i = 0; i < a.d; i++)
                queries[size_t(g * a.d + i)] = widen(q[(kv * group + g) * a.q_head + i]);
        for (int64_t n = 0; n < a.length; n++) {
            const T *key = k + kv * a.k_head + n * a.k_row;
            for (int64_t g = 0; g < group; g++) {
                const float *query = queries.data() + g * a.d;
                Floats dots = {};
                int64_t i = 0;
                for (; i + LANES <= a.d; i += LANES) {
                    Floats left, right;
                    load(query + i, left);
                    load(key + i, right);
                    dots += left * right;
                }
                float dot = sum(dots);
                for (; i < a.d; i++) dot += query[i] * widen(key[i]);
                scores[size_t(g * a.length + n)] = dot * a.scale;
            }
        }
        for (int64_t g = 0; g < group; g++) {
            float *row = scores.data() + g * a.length;
            float most = -INFINITY;
            // Not std::max: NaN must get through.
            for (int64_t n = 0; n < a.length; n++) most = row[n] <= most ? most : row[n];
            float total = 0;
            for (int64_t n = 0; n < a.length; n++) total += row[n] = std::exp(row[n] - most);
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int64_t n = 0; n < a.length; n++) {
                const T *value = v + kv * a.v_head + n * a.v_row;
                const float weight = row[n];
                int64_t i = 0;
                for (; i + LANES <= a.d; i += LANES) {
                    Floats old, add;
                    load(sums.data() + i, old);
                    load(value + i, add);
                    old += weight * add;
                    std::memcpy(sums.data() + i, &old, sizeof old);
                }
                for (; i < a.d; i++) sums[size_t(i)] += weight * widen(value[i]);
            }
            T *result = out + (kv * group + g) * a.d;
            for (int64_t i = 0; i < a.d; i++) narrow(sums[size_t(i)] / total, result[i]);
        }
    }
}

// Rotary position embedding in halves, rounded after each product and the sum as torch does it.
template <typename T>
void rotate(const T *x, int64_t head_stride, int64_t heads, int64_t d, const T *cos, const T *sin,
            T *out) {
    const int64_t half = d / 2;
    for (int64_t head = 0; head < heads; head++, x += head_stride, out += d)
        for (int64_t i = 0; i < d; i++) {
            const float turned = i < half ? -widen(x[i + half]) : widen(x[i - half]);
            narrow(rounded<T>(widen(x[i]) * widen(cos[i])) + rounded<T>(turned * widen(sin[i])),
                   out[i]);
        }
}

// torch.topk's own choice on CPU, so that equal probabilities are told apart as there
// (aten/src/ATen/native/TopKImpl.h: nth_element or partial_sort by size, NaN first).
template <typename T>
void route(const T *logits, int64_t rows, int64_t n, int64_t k, bool normalize, T *as_logits,
           float *as_float, int64_t *index) {
    typedef std::pair<float, int64_t> Choice;
    std::vector<Choice> choices(static_cast<size_t>(n));
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
            choices[size_t(i)] = Choice(power, i);
        }
        for (auto &choice : choices) choice.first /= total;
        auto kth = choices.begin() + k;
        if (k * 64 <= n) {
            std::partial_sort(choices.begin(), kth, choices.end(), before);
        } else {
            std::nth_element(choices.begin(), kth - 1, choices.end(), before);
            std::sort(choices.begin(), kth - 1, before);
        }
        float chosen = 0;
        for (int64_t i = 0; i < k; i++) chosen += choices[size_t(i)].first;
        for (int64_t i = 0; i < k; i++) {
            float weight = choices[size_t(i)].first;
            if (normalize) weight /= chosen;
            index[row * k + i] = choices[size_t(i)].second;
            if (as_float) as_float[row * k + i] = weight;
            if (as_logits) narrow(weight, as_logits[row * k + i]);
        }
    }
}

CLONES void rms_norm_bf16(const Bf16 *x, const Bf16 *weight, Bf16 *y, int64_t rows, int64_t n,
                          float eps, bool round_first) {
    rms_norm(x, weight, y, rows, n, eps, round_first);
}
CLONES void rms_norm_f32(const float *x, const float *weight, float *y, int64_t rows, int64_t n,
                         float eps, bool round_first) {
    rms_norm(x, weight, y, rows, n, eps, round_first);
}
CLONES void attend_bf16(const Bf16 *q, const Bf16 *k, const Bf16 *v, Bf16 *out,
                        const Attention &a) {
    attend(q, k, v, out, a);
}
CLONES void attend_f32(const float *q, const float *k, const float *v, float *out,
                       const Attention &a) {
    attend(q, k, v, out, a);
}

}  // namespace

EXPERTD_API void expertd_rms_norm(const void *x, const void *weight, void *y, int64_t rows,
                                  int64_t n, float eps, int32_t round_first, int32_t type) {
    if (type == BF16)
        rms_norm_bf16(static_cast<const Bf16 *>(x), static_cast<const Bf16 *>(weight),
                      static_cast<Bf16 *>(y), rows, n, eps, round_first);
    else
        rms_norm_f32(static_cast<const float *>(x), static_cast<const float *>(weight),
                     static_cast<float *>(y), rows, n, eps, round_first);
}

// One query per head over `length` keys and values; out is [heads, d] without gaps.
EXPERTD_API void expertd_attend(const void *q, const void *k, const void *v, void *out,
                                int64_t heads, int64_t kv_heads, int64_t length, int64_t d,
                                int64_t q_head, int64_t k_head, int64_t k_row, int64_t v_head,
                                int64_t v_row, float scale, int32_t type) {
    const Attention a = {heads, kv_heads, length, d, q_head, k_head, k_row, v_head, v_row, scale};
    if (type == BF16)
        attend_bf16(static_cast<const Bf16 *>(q), static_cast<const Bf16 *>(k),
                    static_cast<const Bf16 *>(v), static_cast<Bf16 *>(out), a);
    else
        attend_f32(static_cast<const float *>(q), static_cast<const float *>(k),
                   static_cast<const float *>(v), static_cast<float *>(out), a);
}

// Queries and keys of one token; the results are [heads, d] without gaps.
EXPERTD_API void expertd_rotate(const void *q, const void *k, const void *cos, const void *sin,
                                void *q_out, void *k_out, int64_t heads, int64_t kv_heads,
                                int64_t d, int64_t q_head, int64_t k_head, int32_t type) {
    if (type == BF16) {
        auto c = static_cast<const Bf16 *>(cos), s = static_cast<const Bf16 *>(sin);
        rotate(static_cast<const Bf16 *>(q), q_head, heads, d, c, s, static_cast<Bf16 *>(q_out));
        rotate(static_cast<const Bf16 *>(k), k_head, kv_heads, d, c, s,
               static_cast<Bf16 *>(k_out));
    } else {
        auto c = static_cast<const float *>(cos), s = static_cast<const float *>(sin);
        rotate(static_cast<const float *>(q), q_head, heads, d, c, s,
               static_cast<float *>(q_out));
        rotate(static_cast<const float *>(k), k_head, kv_heads, d, c, s,
               static_cast<float *>(k_out));
    }
}

// The k likeliest of n by softmax, with their probabilities, in the logits' dtype or in float32.
EXPERTD_API void expertd_route(const void *logits, int64_t rows, int64_t n, int64_t k,
                               int32_t normalize, int32_t float_weights, void *weights,
                               int64_t *index, int32_t type) {
    float *as_float = float_weights ? static_cast<float *>(weights) : nullptr;
    if (type == BF16)
        route(static_cast<const Bf16 *>(logits), rows, n, k, normalize,
              float_weights ? nullptr : static_cast<Bf16 *>(weights), as_float, index);
    else
        route(static_cast<const float *>(logits), rows, n, k, normalize,
              float_weights ? nullptr : static_cast<float *>(weights), as_float, index);
}
