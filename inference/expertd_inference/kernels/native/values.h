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

// Of four bits of exponent, three of mantissa, without a product of subnormal floats, which may take
// long.
inline float from_e4m3(uint8_t code) {
    const uint32_t size = code & 0x7f;
    const uint32_t small = to_bits(static_cast<float>(static_cast<int32_t>(size)) * 0x1p-9f);
    const uint32_t bits = size < 8 ? small : (size << 20) + (120u << 23);
    return from_bits((size == 0x7f ? 0x7fc00000u : bits) | (code & 0x80u) << 24);
}

// A power of two by its exponent.
inline float from_e8m0(uint8_t exponent) {
    const uint32_t bits = exponent ? static_cast<uint32_t>(exponent) << 23 : 0x00400000u;
    return from_bits(exponent == 255 ? 0x7fc00000u : bits);
}

constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

} // namespace
