// Scores of a piece become powers, and what was computed of several pieces is put together.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "lanes.h"

namespace {
namespace tile {

// Of queries: largest score and sum of powers of 2, scores being logarithms to base 2.
struct Partial {
    float *largest, *totals, *sums;

    explicit Partial(float* floats)
        : largest(floats), totals(floats + MAX_QUERIES), sums(floats + 2 * MAX_QUERIES) {}
};

// softcap * tanh(score / softcap), in logarithms to base 2.
TILE_INLINE void cap_scores(float* scores, int64_t count, const AttentionCall& c) {
    const float inner = c.scale / c.softcap * 2 * LOG2_E, outer = c.softcap * LOG2_E;
    for (int64_t i = 0; i < count; i += LANES) {
        const Lanes x = load(scores + i) * inner;
        const Lanes small = power(x < 0.0f ? x : -x);
        const Lanes size = (1.0f - small) / (1.0f + small) * outer;
        store(scores + i, x < 0.0f ? -size : size);
    }
}

// Scores [0, count) of the tokens from `start` on become logarithms to base 2, and -infinity where
// the query does not see the token; the largest.
TILE_INLINE float scale_scores(float* scores, int64_t start, int64_t count, int64_t before,
                               int64_t seen, const AttentionCall& c) {
    float factor = c.scale * LOG2_E;
    if (c.softcap != 0) {
        cap_scores(scores, count, c);
        factor = 1;
    }
    LaneBits numbers;
    for (int i = 0; i < LANES; ++i) numbers[i] = i;
    const auto first = static_cast<int32_t>(std::max<int64_t>(before - start, 0));
    const auto last = static_cast<int32_t>(std::min<int64_t>(seen - start, count));
    Lanes most = all(-INFINITY);
    for (int64_t i = 0; i < count; i += LANES) {
        Lanes x = load(scores + i) * factor;
        if (i < first || i + LANES > last) {
            const LaneBits token = numbers + static_cast<int32_t>(i);
            x = ((token >= first) & (token < last)) ? x : all(-INFINITY);
        }
        store(scores + i, x);
        most = greater(x, most);
    }
    return largest_of(most);
}

// What was computed of more tokens, `more`, joins `all`.
TILE_ONCE void fold(Partial all, Partial more, int64_t num, int64_t width) {
    for (int64_t q = 0; q < num; ++q) {
        const float most = std::max(all.largest[q], more.largest[q]);
        const float base = most == -INFINITY ? 0 : most;
        const float a = power(tile::all(all.largest[q] - base))[0];
        const float b = power(tile::all(more.largest[q] - base))[0];
        all.largest[q] = most;
        all.totals[q] = all.totals[q] * a + more.totals[q] * b;
        for (int64_t i = q * width; i < (q + 1) * width; i += LANES)
            store(all.sums + i, load(all.sums + i) * a + load(more.sums + i) * b);
    }
}

} // namespace tile
} // namespace
