// float32 numbers of one register, for the instruction set of the file that includes this.
#pragma once

#include <cstdint>
#include <cstring>

namespace {
namespace tile {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t LaneBits __attribute__((vector_size(4 * LANES)));

#define TILE_INLINE inline __attribute__((always_inline))
// One copy, so that products are fused with the same sums wherever it is called.
#define TILE_ONCE __attribute__((noinline))

constexpr float LOG2_E = 1.44269504088896340736f;

TILE_INLINE Lanes load(const float* from) {
    Lanes lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

TILE_INLINE void store(float* to, Lanes lanes) { memcpy(to, &lanes, sizeof lanes); }

TILE_INLINE Lanes all(float value) { return value + Lanes{}; }

// 2^x of what is at most 0; below 2^-126 it is 0. A polynomial of 2^f on [-1/2, 1/2], fitted for
// the least relative error, 2e-9, and 1 at 0.
TILE_INLINE Lanes power(Lanes x) {
    const float magic = 0x1.8p23f; // a sum with it has no digits after the point
    const Lanes whole = x + magic;
    const Lanes f = x - (whole - magic);
    Lanes p = all(0x1.41fbbcp-13f);
    p = p * f + 0x1.5f3e52p-10f;
    p = p * f + 0x1.3b2d4cp-7f;
    p = p * f + 0x1.c6aee8p-5f;
    p = p * f + 0x1.ebfbdcp-3f;
    p = p * f + 0x1.62e430p-1f;
    p = p * f + 1.0f;
    const Lanes result = (Lanes)((LaneBits)p + ((LaneBits)whole << 23));
    return x >= -126.0f ? result : (x < -126.0f ? Lanes{} : x); // NaN stays NaN
}

TILE_INLINE Lanes greater(Lanes x, Lanes y) { return x > y ? x : y; }

template <class Operation> TILE_INLINE float reduce(Lanes lanes, const Operation& operation) {
    float values[LANES];
    memcpy(values, &lanes, sizeof lanes);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; ++i) values[i] = operation(values[i], values[i + n]);
    return values[0];
}

TILE_INLINE float largest_of(Lanes lanes) {
    return reduce(lanes, [](float x, float y) { return x > y ? x : y; });
}

TILE_INLINE float sum_of(Lanes lanes) {
    return reduce(lanes, [](float x, float y) { return x + y; });
}

} // namespace tile
} // namespace
