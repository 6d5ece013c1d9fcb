// The quantizer's C interface, and its portable variant.

#define LANES 4
#include "hqq_lanes.h"

#include <cmath>

namespace expertd {

void hqq_units_portable(const HqqMatrix& matrix, int64_t begin, int64_t end) {
    quantize_units(matrix, begin, end);
}

namespace {

struct Variant {
    const char* name;
    HqqUnits units;
    bool usable;
};

// The fastest first.
const Variant* variants() {
    static const Variant all[] = {
#if defined(WITH_AVX512)
        {"avx512", hqq_units_avx512,
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
#endif
#if defined(WITH_AVX2)
        {"avx2", hqq_units_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {"portable", hqq_units_portable, true},
        {nullptr, nullptr, false},
    };
    return all;
}

uint16_t to_bf16(float value) {  // of one that is a bfloat16
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return uint16_t(bits >> 16);
}

uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x7f800000) return uint16_t(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to more than 65504
    if (bits < 0x38800000) {                                 // subnormal: in units of 2^-24
        float absolute;
        std::memcpy(&absolute, &bits, sizeof bits);
        return uint16_t(sign | uint32_t(std::nearbyint(absolute * 0x1p24f)));
    }
    return uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

}  // namespace
}  // namespace expertd

using namespace expertd;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Changes with HqqMatrix and the functions' arguments.
EXPORT int32_t expertd_abi() { return 2; }

// The name of the index-th usable variant, the fastest first; null past the last.
EXPORT const char* expertd_hqq_variant(int32_t index) {
    for (const Variant* variant = variants(); variant->name; variant++) {
        if (variant->usable && !index--) return variant->name;
    }
    return nullptr;
}

// Quantizes the units [begin, end) with the variant of that name; 0, or -1 if there is none.
EXPORT int32_t expertd_hqq_units(const HqqMatrix* matrix, int64_t begin, int64_t end,
                                 const char* name) {
    for (const Variant* variant = variants(); variant->name; variant++) {
        if (!variant->usable || std::strcmp(variant->name, name)) continue;
        variant->units(*matrix, begin, end);
        return 0;
    }
    return -1;
}

// 8-bit integers of scales or zeros in groups of group_size, by the groups' extremes as hqq does
// it. hqq takes a group that spans less than 1e-4 for constant, which is made for weights;
// scales are smaller, so they are brought near 1 first, by a power of two, which costs no bits.
// The scale is stored as `scales` says. A value that is not finite makes its group's scale so.
EXPORT void expertd_quantize_meta(const float* values, int64_t count, int64_t group_size,
                                  int32_t scales, uint8_t* q, uint16_t* scale, uint16_t* zero) {
    float largest = 1e-30f;
    for (int64_t i = 0; i < count; i++) {
        const float value = std::fabs(values[i]);
        if (value < __builtin_inff() && value > largest) largest = value;
    }
    int exponent;
    if (std::frexp(largest, &exponent) == 0.5f) exponent--;  // the next power of two above
    const float unit = std::ldexp(1.0f, exponent), to_unit = std::ldexp(1.0f, -exponent);
    for (int64_t start = 0; start < count; start += group_size) {
        const int64_t group = start / group_size;
        float low = values[start] * to_unit, high = low;
        bool damaged = false;
        for (int64_t i = start; i < start + group_size; i++) {
            const float value = values[i] * to_unit;
            damaged |= !(std::fabs(values[i]) < __builtin_inff());  // nor is it NaN
            low = value < low ? value : low;
            high = value > high ? value : high;
        }
        if (damaged) {
            std::memset(q + start, 0, group_size);
            scale[group] = scales == kScalesBf16 ? 0x7fc0 : 0x7e00;
            zero[group] = 0x7e00;
            continue;
        }
        const float range = high - low;
        const float exact = 1.0f / range * 255.0f;
        float inverse = range <= 1e-4f ? 1.0f : exact < kMaxInverse ? exact : kMaxInverse;
        const float wanted = 1.0f / inverse * unit;
        const float stored = storable(all(wanted), scales)[0];
        if (stored != wanted) inverse = unit / stored;
        const float offset = -low * inverse;
        for (int64_t i = start; i < start + group_size; i++) {
            const float x = values[i] * to_unit * inverse + offset;
            const float inside = x < 0.0f ? 0.0f : x > 255.0f ? 255.0f : x;
            q[i] = uint8_t((inside + kRounder) - kRounder);
        }
        scale[group] = scales == kScalesBf16 ? to_bf16(stored) : to_half(stored);
        zero[group] = to_half(offset);
    }
}
