// What fixed-point activations (fixed_rows.h) count in, and the weights that they meet.
#pragma once

#include <immintrin.h>

#include "generic.h"
#include "unroll.h"

namespace {

constexpr int64_t COLUMNS = 64; // of a unit, in a line

#if defined(__AVX512VNNI__)
using Line = __m512i;
#else
struct Line {
    __m256i half[2];
};
#endif

// The bytes of a unit: of 3 bit the low plane's upper row, below it the lower one, and the high
// plane.
struct Places {
    const uint8_t *low, *below, *high;
};

template <int32_t FORMAT> INLINE Places places(const Matrix& m, const uint8_t* base, int64_t unit) {
    const uint8_t* low = base + m.weight + unit * m.columns;
    if (FORMAT != HQQ3) return {low, nullptr, nullptr};
    return {low, low + m.rows / 8 * m.columns, low + m.rows / 4 * m.columns};
}

int64_t num_vectors(const Matrix& m) { return (m.columns + COLUMNS - 1) / COLUMNS; }

int64_t num_groups(const Matrix& m) { return m.columns / m.group_size; }

// Results of these types, rounded, do not show the digits that planes lack; those of float32 do.
constexpr bool has_planes(int32_t type) { return type != F32; }

constexpr bool is_fixed(int32_t format) { return format == HQQ8 || format == HQQ4; }

// How far left of a byte's lowest bit the integers of row `k` lie.
constexpr int left_of(int32_t format, int k) { return format == HQQ4 && k == 0 ? 4 : 0; }

// A power of two as a float.
inline float power(int exponent) { return from_bits(static_cast<uint32_t>(exponent + 127) << 23); }

// What a group counts in, and by what numbers are multiplied to be counted so.
struct Unit {
    float factor, times;
};

// `bits` are those of the group's largest number, without its sign.
template <int PLANES> inline Unit unit_of(uint32_t bits) {
    // Infinity or none: so is all that comes of the group.
    if (bits >= 0x7f800000) return {from_bits(0x7fc00000), 0};
    if (PLANES == 1) {
        // Groups of next to nothing are 0, since what they were multiplied by would be no float.
        const float largest = from_bits(bits);
        return largest < 0x1p-120f ? Unit{0, 0} : Unit{largest / 127, 127 / largest};
    }
    // Here they are multiples of a number that is no smaller than floats can be. What has more
    // digits than bfloat16 may be so near to the next power of two that it would not fit.
    const int above = (bits & 0x7fffff) > 0x7f0000;
    const int unit = std::max(static_cast<int>(bits >> 23) - 127 - 14 + above, -126);
    return {power(unit), power(-unit)};
}

} // namespace
