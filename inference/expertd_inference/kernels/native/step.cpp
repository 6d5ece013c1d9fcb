// The small operations between the matrices of a decoding step, each one call instead of the
// several of torch, every one of which costs more than its arithmetic when there is one token.
//
// They run on the calling thread: waking another costs more than they take. Results are rounded where
// torch rounds them.

#include <algorithm>
#include <cmath>
#include <utility>

#include "pool.h"
#include "steps.h"
#include "tasks.h"

namespace {

typedef std::pair<float, int64_t> Choice;

// The k likeliest of n by softmax. Equal ones are told apart as by torch.topk on a CPU
// (aten/src/ATen/native/TopKImpl.h: nth_element or partial_sort by size, NaN first).
void choose(const float* logits, int64_t n, int64_t k, bool normalize, Choice* choices,
            float* weights, int64_t* index) {
    const auto before = [](const Choice& x, const Choice& y) {
        return (std::isnan(x.first) && !std::isnan(y.first)) || x.first > y.first;
    };
    float most = -INFINITY;
    for (int64_t i = 0; i < n; ++i) most = logits[i] <= most ? most : logits[i];
    float total = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float power = std::exp(logits[i] - most);
        total += power;
        choices[i] = Choice(power, i);
    }
    for (int64_t i = 0; i < n; ++i) choices[i].first /= total;
    Choice* kth = choices + k;
    if (k * 64 <= n) {
        std::partial_sort(choices, kth, choices + n, before);
    } else {
        std::nth_element(choices, kth - 1, choices + n, before);
        std::sort(choices, kth - 1, before);
    }
    float chosen = 0;
    for (int64_t i = 0; i < k; ++i) chosen += choices[i].first;
    for (int64_t i = 0; i < k; ++i) {
        weights[i] = normalize ? choices[i].first / chosen : choices[i].first;
        index[i] = choices[i].second;
    }
}

} // namespace

EXPERTD_API void expertd_rms_norm(const void* x, const void* weight, void* y, int64_t rows,
                                  int64_t n, float eps, int32_t round_first, int32_t type) {
    steps().rms_norm(x, weight, y, rows, n, eps, round_first, type);
}

// Queries and keys of one token; the results are [heads, d] without gaps.
EXPERTD_API void expertd_rotate(const void* q, const void* k, const void* cos, const void* sin,
                                void* q_out, void* k_out, int64_t heads, int64_t kv_heads,
                                int64_t d, int64_t q_head, int64_t k_head, int32_t type) {
    steps().rotate_heads(q, q_head, heads, d, cos, sin, q_out, type);
    steps().rotate_heads(k, k_head, kv_heads, d, cos, sin, k_out, type);
}

// Of each row the k likeliest of n by softmax, with their probabilities, in the logits' dtype or in
// float32. 0, or 1 without memory.
EXPERTD_API int32_t expertd_route(const void* logits, int64_t rows, int64_t n, int64_t k,
                                  int32_t normalize, int32_t float_weights, void* weights,
                                  int64_t* index, int32_t type) {
    return without_memory([=] {
        PoolLock lock;
        const Variant& impl = variant();
        const int32_t weights_type = float_weights ? int32_t{F32} : type;
        const int64_t choices_bytes = aligned(n * static_cast<int64_t>(sizeof(Choice)));
        uint8_t* scratch = pool_scratch(choices_bytes + aligned(n * 4) + k * 4);
        auto* choices = reinterpret_cast<Choice*>(scratch);
        auto* values = reinterpret_cast<float*>(scratch + choices_bytes);
        auto* chosen = reinterpret_cast<float*>(scratch + choices_bytes + aligned(n * 4));
        for (int64_t row = 0; row < rows; ++row) {
            impl.widen(static_cast<const uint8_t*>(logits) + row * n * size_of(type), type, n,
                       values);
            choose(values, n, k, normalize, choices, chosen, index + row * k);
            impl.narrow(chosen, k, weights_type,
                        static_cast<uint8_t*>(weights) + row * k * size_of(weights_type));
        }
    });
}
