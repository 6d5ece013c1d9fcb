// The quantizer's C interface, and its portable variant.

#define LANES 4
#include "hqq_lanes.h"

#include <cmath>

#include "expertstore/cpp/isa.h"
#include "expertstore/cpp/numbers.h"

namespace expertd {

void hqq_units_portable(const HqqMatrix& matrix, int64_t begin, int64_t end) {
    quantize_units(matrix, begin, end);
}

namespace {

struct Variant {
    Isa isa;
    HqqUnits units;
};

// The fastest first.
constexpr Variant kVariants[] = {
#if defined(WITH_AVX512)
    {Isa::AVX512, hqq_units_avx512},
#endif
#if defined(WITH_AVX2)
    {Isa::AVX2, hqq_units_avx2},
#endif
    {Isa::PORTABLE, hqq_units_portable},
};

}  // namespace
}  // namespace expertd

using namespace expertd;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Changes with HqqMatrix and the functions' arguments.
EXPORT int32_t expertd_abi() { return 2; }

EXPORT int64_t expertd_size_of_HqqMatrix() { return sizeof(HqqMatrix); }

// The name of the index-th usable variant, the fastest first; null past the last.
EXPORT const char* expertd_hqq_variant(int32_t index) {
    for (const Variant& variant : kVariants) {
        if (runs_here(variant.isa) && !index--) return name_of(variant.isa);
    }
    return nullptr;
}

// Quantizes the units [begin, end) with the variant of that name; 0, or -1 if there is none.
EXPORT int32_t expertd_hqq_units(const HqqMatrix* matrix, int64_t begin, int64_t end,
                                 const char* name) {
    for (const Variant& variant : kVariants) {
        if (!runs_here(variant.isa) || std::strcmp(name_of(variant.isa), name)) continue;
        variant.units(*matrix, begin, end);
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
        scale[group] = scales == kScalesBf16 ? to_bf16(stored) : to_f16(stored);
        zero[group] = to_f16(offset);
    }
}
