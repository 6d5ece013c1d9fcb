// bfloat16 and float16 beside float32: the one conversion of each for all native code, one number at
// a time and without a branch, so that compilers vectorize loops of them. To the nearest, ties to
// even; NaN stays NaN.
//
// Everything stands in an unnamed namespace. A function that two sources for different instruction
// sets shared by its name would be compiled for one and called where that is not there.
#pragma once

#include <cstdint>
#include <cstring>

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

} // namespace
