// Activations as the bfloat16 products of variant_avx512bf16.cpp want them.
#pragma once

#include <immintrin.h>

#include "generic.h"

namespace {

constexpr int64_t COLUMNS = 64; // of a unit, in a register
// Far enough that DRAM has answered. The processor's own prefetching ends at a page; of 4, 6, 8 and
// 12 KiB, 6 was best where it was measured.
constexpr int64_t AHEAD = 6144, SCALES_AHEAD = 512;

bool is_fast(const Matrix& m, int32_t type) {
    return type == BF16 && (m.format >= HQQ8 || m.format == BF16);
}

// Where a field of row `k` lies in its word; see bf16_words.h.
constexpr int field_bit(int32_t format, int k) {
    if (format == HQQ2) return k % 2 ? 3 : 5;
    if (format == HQQ3) return k < 4 ? 4 : 0;
    return 3;
}

// The power of two that a field at such a bit has above it. It counts 1 in the field's lowest bit.
constexpr int power_above(int bit) { return 128 >> bit; }

// Only in fields at bit 0 it is so large that float32 would feel it, and their sums start from
// where it is that of the other rows.
constexpr bool has_start(int32_t format, int k) { return format == HQQ3 && k >= 4; }

// What the integers of row `k` have too much in the end, which is added to their zeros.
constexpr float excess(int32_t format, int k) {
    if (format == HQQ8) return power_above(3) * (1 + 16); // in two fields
    return power_above(field_bit(format, format == HQQ3 ? 0 : k));
}

// Registers of 64 columns of activations.
constexpr int64_t num_registers(int32_t format) { return format == HQQ3 ? 3 : 2; }

int64_t num_vectors(const Matrix& m) { return (m.columns + COLUMNS - 1) / COLUMNS; }

int64_t num_groups(const Matrix& m) { return m.columns / m.group_size; }

// Of activations prepared for a quantized matrix: for each 64 columns the even ones and the odd
// ones, of 3 bit also where sums begin; then the groups' sums, padded with zeros to 16. It is less
// than generic::prepared_bytes.
struct Row {
    const __m512i* columns;
    const float* sums;
};

Row row_of(const Matrix& m, const uint8_t* prepared) {
    const auto* columns = reinterpret_cast<const __m512i*>(prepared);
    const auto* end = columns + num_registers(m.format) * num_vectors(m);
    return {columns, reinterpret_cast<const float*>(end)};
}

// 64 columns, of which `count` are there.
void prepare_columns(const float* row, int64_t count, int32_t format, uint8_t* out) {
    auto* values = reinterpret_cast<uint16_t*>(out);
    float padded[COLUMNS] = {};
    memcpy(padded, row, count * sizeof(float));
    for (int64_t i = 0; i < 32; ++i) {
        values[i] = static_cast<uint16_t>(to_bits(padded[2 * i]) >> 16);
        values[32 + i] = static_cast<uint16_t>(to_bits(padded[2 * i + 1]) >> 16);
    }
    if (format != HQQ3) return;
    auto* starts = reinterpret_cast<float*>(out + 128);
    constexpr float too_much = power_above(field_bit(HQQ3, 0)) - power_above(field_bit(HQQ3, 7));
    for (int64_t lane = 0; lane < 16; ++lane) {
        const float* four = padded + lane * 4;
        starts[lane] = too_much * ((four[0] + four[1]) + (four[2] + four[3]));
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
    const int64_t step = num_registers(m.format) * 64;
    for (int64_t column = 0; column < m.columns; column += COLUMNS, prepared += step)
        prepare_columns(row + column, std::min(COLUMNS, m.columns - column), m.format, prepared);
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
