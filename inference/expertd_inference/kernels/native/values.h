// The types of weights and activations, for every variant: loops that any compiler vectorizes.
// Everything stands in an unnamed namespace. A function that two variants shared by its name
// would be compiled for one instruction set and called where that is not there.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace {

inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float from_bf16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_bf16(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return static_cast<uint16_t>(nan ? 0x7fc0 : rounded);
}

inline float from_f16(uint16_t bits) {
    // The exponent's bias is adjusted by a product, which also makes small numbers normal.
    const uint32_t rest = static_cast<uint32_t>(bits & 0x7fff) << 13;
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    return from_bits(to_bits(from_bits(rest) * 0x1p112f) | special | sign);
}

inline uint16_t to_f16(float value) {
    const uint32_t sign = to_bits(value) >> 16 & 0x8000;
    const float size = from_bits(to_bits(value) & 0x7fffffff);
    // Below the least normal number the sum with 0.5 rounds to multiples of 2^-24.
    const uint32_t small = to_bits(size + 0.5f) - to_bits(0.5f);
    const uint32_t bits = to_bits(size);
    const uint32_t normal = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
    uint32_t result = size < 0x1p-14f ? small : normal;
    result = size >= 65520.0f ? 0x7c00 : result;
    result = size != size ? 0x7e00 : result;
    return static_cast<uint16_t>(sign | result);
}

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
