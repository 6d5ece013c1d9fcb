// What products of rows ask of memory before they need it: the next tile's bytes, in the order of
// memory, as many at a time as are used up meanwhile.
#pragma once

#include "fixed_units.h"

namespace {

constexpr int64_t TILE_UNITS = 16;

// Weights, in equal shares: more lines at once than the processor can have under way hold up what
// comes after them.
struct Ahead {
    const uint8_t* from;
    int64_t below, high; // of 3 bit, how far behind it the other planes are; else 0
    int64_t lines;       // with every group of a tile

    INLINE void advance() {
        for (const uint8_t* end = from + lines * 64; from != end; from += 64) {
            __builtin_prefetch(from, 0, 2);
            if (!high) continue;
            __builtin_prefetch(from + below, 0, 2);
            __builtin_prefetch(from + high, 0, 2);
        }
    }
};

// The next tile's scales, in the order of memory: as much as strip [group, group + num) has here.
template <int32_t FORMAT>
INLINE void prefetch_strip(const Matrix& m, const uint8_t* base, int64_t unit, int64_t group,
                           int64_t num) {
    const int64_t size = m.meta_group_size || is_e2m1(FORMAT) ? 1 : 2;
    const int64_t units = num_units(m), groups = num_groups(m);
    each<rows_per_unit(FORMAT)>([&](auto k) INLINE_LAMBDA {
        const int64_t begin = ((unit + TILE_UNITS + k * units) * groups + group * TILE_UNITS) * size;
        for (int64_t at = begin; at < begin + num * TILE_UNITS * size; at += 64) {
            __builtin_prefetch(base + m.scale + at, 0, 2);
            if (m.zero >= 0) __builtin_prefetch(base + m.zero + at, 0, 2);
        }
    });
}

} // namespace
