// Activations as the bfloat16 products of variant_avx512bf16.cpp want them.
#pragma once

#include <immintrin.h>

#include "generic.h"

namespace {

constexpr int64_t COLUMNS = 64; // of a unit, in a register
constexpr int64_t BLOCK_VECTORS = 64;
constexpr int64_t BLOCK_COLUMNS = COLUMNS * BLOCK_VECTORS; // whose scales are decoded at a time
// Far enough that DRAM has answered. The processor's own prefetching ends at a page; of 4, 6, 8 and
// 12 KiB, 6 was best where it was measured.
constexpr int64_t AHEAD = 6144, SCALES_AHEAD = 512;

bool is_fast(const Matrix& m, int32_t type) {
    return type == BF16 && (m.format >= HQQ8 || m.format == BF16);
}

// Subtracted from each integer: what is left is small on both sides of 0, and exact in bfloat16.
constexpr float center(int32_t format) {
    switch (format) {
    case HQQ8: return 128;
    case HQQ4: return 8;
    case HQQ3: return 4;
    case HQQ2: return 2;
    default: return 0;
    }
}

// What a weight's bfloat16 has too much.
constexpr float excess(int32_t format) {
    if (format == MXFP4) return 0;
    return center(format) + (format == HQQ8 ? 128 + 2048 : 128);
}

int64_t num_vectors(const Matrix& m) { return (m.columns + COLUMNS - 1) / COLUMNS; }

int64_t num_groups(const Matrix& m) { return m.columns / m.group_size; }

// Of activations prepared for a quantized matrix: for each 64 columns three registers, then the
// groups' sums, padded with zeros to 16. The first has the columns whose bytes unpacklo takes, that
// is 0 to 7, 16 to 23 and so on, the second the others; the third has where sums begin.
struct Row {
    const __m512i* columns;
    const float* sums;
};

Row row_of(const Matrix& m, const uint8_t* prepared) {
    const auto* columns = reinterpret_cast<const __m512i*>(prepared);
    return {columns, reinterpret_cast<const float*>(columns + 3 * num_vectors(m))};
}

// 64 columns, of which `count` are there.
void prepare_columns(const float* row, int64_t count, float too_much, uint8_t* out) {
    auto* values = reinterpret_cast<uint16_t*>(out);
    auto* starts = reinterpret_cast<float*>(out + 128);
    float padded[COLUMNS] = {};
    memcpy(padded, row, count * sizeof(float));
    for (int64_t half = 0; half < 2; ++half)
        for (int64_t i = 0; i < 32; ++i) // in 16 bytes of a register are 8 columns of a half
            values[half * 32 + i] =
                static_cast<uint16_t>(to_bits(padded[i / 8 * 16 + half * 8 + i % 8]) >> 16);
    for (int64_t lane = 0; lane < 16; ++lane) {
        const float* first = padded + lane / 4 * 16 + lane % 4 * 2;
        starts[lane] = -too_much * ((first[0] + first[1]) + (first[8] + first[9]));
    }
}

void prepare(const Matrix& m, const float* row, int32_t type, uint8_t* prepared) {
    if (!is_fast(m, type)) return generic::prepare(m, row, type, prepared);
    if (m.format == BF16) {
        auto* out = reinterpret_cast<uint16_t*>(prepared);
        const int64_t padded = round_up(m.columns, 32);
        narrow(row, m.columns, BF16, out);
        memset(out + m.columns, 0, (padded - m.columns) * 2);
        return;
    }
    const float too_much = excess(m.format);
    for (int64_t column = 0; column < m.columns; column += COLUMNS, prepared += 3 * 64)
        prepare_columns(row + column, std::min(COLUMNS, m.columns - column), too_much, prepared);
    auto* sums = reinterpret_cast<float*>(prepared);
    const int64_t groups = num_groups(m);
    for (int64_t group = 0; group < groups; ++group) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < m.group_size; i += 16)
            sum = _mm512_add_ps(sum, _mm512_loadu_ps(row + group * m.group_size + i));
        sums[group] = _mm512_reduce_add_ps(sum);
    }
    memset(sums + groups, 0, (round_up(groups, 16) - groups) * sizeof(float));
}

} // namespace
