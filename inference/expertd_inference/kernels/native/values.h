// The types of weights and activations, for every variant: loops that any compiler vectorizes, in
// an unnamed namespace as expertstore/cpp/numbers.h says.
#pragma once

#include "expertstore/cpp/numbers.h"
#include "kernels.h"

namespace {

inline float round_to(float value, int32_t type) {
    if (type == BF16) return from_bf16(to_bf16(value));
    if (type == F16) return from_f16(to_f16(value));
    return value;
}

void widen(const void* values, int32_t type, int64_t count, float* out) {
    const auto* halves = static_cast<const uint16_t*>(values);
    if (type == BF16) {
        for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(halves[i]);
    } else if (type == F16) {
        for (int64_t i = 0; i < count; ++i) out[i] = from_f16(halves[i]);
    } else {
        memcpy(out, values, count * sizeof(float));
    }
}

void narrow(const float* values, int64_t count, int32_t type, void* out) {
    auto* halves = static_cast<uint16_t*>(out);
    if (type == BF16) {
        for (int64_t i = 0; i < count; ++i) halves[i] = to_bf16(values[i]);
    } else if (type == F16) {
        for (int64_t i = 0; i < count; ++i) halves[i] = to_f16(values[i]);
    } else {
        memcpy(out, values, count * sizeof(float));
    }
}

void round_all(float* values, int64_t count, int32_t type) {
    if (type == BF16) {
        for (int64_t i = 0; i < count; ++i) values[i] = from_bf16(to_bf16(values[i]));
    } else if (type == F16) {
        for (int64_t i = 0; i < count; ++i) values[i] = from_f16(to_f16(values[i]));
    }
}

constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

} // namespace
