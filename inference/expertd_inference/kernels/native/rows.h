// Products of quantized matrices with any number of rows of activations: the driver.
#pragma once

#if defined(__AVX512VNNI__)
#include "rows_few.h"
#else
#include "avx2_dots.h"
#endif

namespace {

// Vectors whose tiles are made at a time: few enough for the first cache, an even number of them.
constexpr int64_t vectors_at_once(int32_t format) {
    return registers_per_vector(format) == 16 ? 4 : 2;
}

// Some rows of activations that are multiplied together. The kind may take more: they are the last
// one again, and go nowhere.
struct RowBlock {
    const BlockKind* kind;
    int64_t first, count;
    Row rows[MOST_ROWS];
    float* sums;
};

// `count` units' bytes of up to 64 columns, as if there were 16 units and 64 columns: 0 elsewhere.
template <int32_t FORMAT>
Places pad(const Places& from, int64_t stride, int64_t count, int64_t columns, uint8_t* to) {
    constexpr int64_t BYTES = LANES * COLUMNS;
    const auto copy = [&](const uint8_t* bytes, uint8_t* out) {
        memset(out, 0, BYTES);
        for (int64_t i = 0; i < count; ++i) memcpy(out + i * COLUMNS, bytes + i * stride, columns);
    };
    copy(from.low, to);
    if (FORMAT == HQQ3) {
        copy(from.below, to + BYTES);
        copy(from.high, to + 2 * BYTES);
    }
    return {to, to + BYTES, to + 2 * BYTES};
}

// Units [unit, unit + count), at most 16: added to the blocks' sums.
template <int32_t FORMAT>
void multiply_units_of_tile(const Matrix& m, const uint8_t* base, int64_t unit, int64_t count,
                            const RowBlock* blocks, int64_t num_blocks) {
    constexpr int64_t AT_ONCE = vectors_at_once(FORMAT), TILES = tiles_per_vector(FORMAT);
    alignas(64) Line tiles[registers_per_vector(FORMAT) * AT_ONCE];
    alignas(64) float scales[STRIP * floats_per_group<FORMAT>];
    uint8_t padded[3 * LANES * COLUMNS];
    StripMetas<FORMAT> metas;
    const int64_t groups = num_groups(m), vectors = num_vectors(m), steps = m.group_size / 4;
    const Places from = places<FORMAT>(m, base, unit);
    for (int64_t group = 0; group < groups; group += STRIP) {
        const int64_t num = std::min(STRIP, groups - group);
        decode_strip<FORMAT>(m, base, unit, count, group, num, metas, scales);
        prefetch_strip<FORMAT>(m, base, unit, group, num);
        const int64_t end = std::min(vectors, (group + STRIP) * steps / 16);
        for (int64_t vector = group * steps / 16; vector < end; vector += AT_ONCE) {
            const int64_t at_once = std::min(AT_ONCE, end - vector);
            for (int64_t i = 0; i < at_once; ++i) {
                const int64_t column = (vector + i) * COLUMNS;
                const Places here = {from.low + column, from.below + column, from.high + column};
                const int64_t columns = std::min(COLUMNS, m.columns - column);
                if (count == LANES && columns == COLUMNS)
                    make_tiles<FORMAT>(here, m.columns, tiles + i * 16, AT_ONCE * 16);
                else {
                    const Places copy = pad<FORMAT>(here, m.columns, count, columns, padded);
                    make_tiles<FORMAT>(copy, COLUMNS, tiles + i * 16, AT_ONCE * 16);
                }
            }
            const int64_t first = vector * 16 / steps;
            const float* scale = scales + (first - group) * floats_per_group<FORMAT>;
            // The next 16 units, in the order of memory: as much of them as is used up here.
            Ahead ahead = {from.low + LANES * (m.columns + vector * COLUMNS),
                           FORMAT == HQQ3 ? from.below - from.low : 0,
                           FORMAT == HQQ3 ? from.high - from.low : 0, std::max<int64_t>(1, LANES * steps / 16 / TILES)};
            for (const RowBlock* block = blocks; block != blocks + num_blocks; ++block) {
                block->kind->multiply({tiles, scale, block->rows, block->sums, vector, at_once,
                                       first, steps, TILES, AT_ONCE * 16, ahead});
                ahead.lines = 0;
            }
        }
    }
}

// At most ROWS_AT_ONCE rows of activations.
template <int32_t FORMAT>
void multiply_rows(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                   const uint8_t* const* prepared, float* const* results, int64_t num_rows,
                   int planes) {
    constexpr int R = rows_per_unit(FORMAT), FIELDS = num_fields(FORMAT);
    constexpr int64_t MOST = most_rows(fields_of(FORMAT)), MOST_BLOCKS = ROWS_AT_ONCE / MOST;
    alignas(64) float sums[ROWS_AT_ONCE * R * LANES];
    RowBlock blocks[MOST_BLOCKS];
    const int64_t num_blocks = (num_rows + MOST - 1) / MOST;
    for (int64_t b = 0; b < num_blocks; ++b) {
        RowBlock& block = blocks[b];
        block.first = num_rows * b / num_blocks;
        block.count = num_rows * (b + 1) / num_blocks - block.first;
        const auto kind_of_rows =
            planes == 2 ? kind_of<fields_of(FORMAT), 2> : kind_of<fields_of(FORMAT), 1>;
        block.kind = &kind_of_rows(block.count);
        block.sums = sums + b * MOST * R * LANES;
        for (int64_t n = 0; n < block.kind->rows; ++n)
            block.rows[n] = fixed_row_of(
                m, prepared[block.first + std::min(n, block.count - 1)], planes);
    }
    const int64_t units = num_units(m);
    MultiplyFew few = nullptr;
    if (num_blocks == 1)
        few = (planes == 2 ? few_of<FORMAT, 2> : few_of<FORMAT, 1>)(m, *blocks->kind);
    for (int64_t unit = first; unit < last; unit += LANES) {
        const int64_t count = std::min(LANES, last - unit);
        if (few && count == LANES) few(m, base, unit, blocks->rows, blocks->sums);
        else {
            memset(sums, 0, num_blocks * MOST * R * LANES * sizeof(float));
            multiply_units_of_tile<FORMAT>(m, base, unit, count, blocks, num_blocks);
        }
        for (const RowBlock* block = blocks; block != blocks + num_blocks; ++block)
            for (int64_t n = 0; n < block->count; ++n)
                for (int place = 0; place < R; ++place) {
                    const int tile = place / FIELDS, field = place % FIELDS;
                    const int64_t at = (tile * block->kind->rows + n) * FIELDS + field;
                    const int64_t row = unit + row_of_field(FORMAT, tile, field) * units;
                    float* const result = results[block->first + n] + row;
                    const float* const values = block->sums + at * LANES;
                    // Of a known size it is a register or two, and no call.
                    if (count == LANES) memcpy(result, values, LANES * sizeof(float));
                    else memcpy(result, values, count * sizeof(float));
                }
    }
}

void multiply_quantized_rows(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
                             const uint8_t* const* prepared, float* const* results,
                             int64_t num_rows, int planes) {
    const auto multiply = m.format == HQQ8   ? multiply_rows<HQQ8>
                          : m.format == HQQ4 ? multiply_rows<HQQ4>
                          : m.format == HQQ3 ? multiply_rows<HQQ3>
                          : m.format == HQQ2 ? multiply_rows<HQQ2>
                          : m.format == MXFP4 ? multiply_rows<MXFP4>
                                              : multiply_rows<NVFP4>;
    multiply(m, base, first, last, prepared, results, num_rows, planes);
}

} // namespace
