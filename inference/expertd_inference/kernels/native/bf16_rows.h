// Activations as the products of variant_avx512bf16.cpp want them.
#pragma once

#include "fixed_rows.h"

namespace {

// Far enough that DRAM has answered, where the processor's own prefetching ends at a page. 3 and 6
// KiB were equally good.
constexpr int64_t AHEAD = 3072, SCALES_AHEAD = 512;

bool is_fast(const Matrix& m, int32_t type) {
    const bool by_pairs = m.format == BF16 || is_e4m3(m.format);
    return by_pairs ? type == BF16 : m.format >= HQQ8 && has_planes(type);
}

// One row by itself has bfloat16s, unless the integers of its weights meet planes.
Form form_here(const Matrix& m, int32_t type, Form form) {
    return form == ONE_ROW && type != BF16 && !is_fixed(m.format) ? TWO_PLANES : form;
}

// Where a field of row `k` lies in its word; see bf16_words.h.
constexpr int field_bit(int32_t format, int k) {
    return format == HQQ3 ? (k < 4 ? 4 : 0) : (k % 2 ? 3 : 5);
}

// The power of two that a field at such a bit has above it. It counts 1 in the field's lowest bit.
constexpr int power_above(int bit) { return 128 >> bit; }

// Only in fields at bit 0 it is so large that float32 would feel it, and their sums start from
// where it is that of the other rows.
constexpr bool has_start(int32_t format, int k) { return format == HQQ3 && k >= 4; }

// What the integers of row `k` have too much in the end, which is added to their zeros.
constexpr float excess(int32_t format, int k) {
    if (is_fixed(format)) return 0;
    return power_above(field_bit(format, format == HQQ3 ? 0 : k));
}

// Registers of 64 columns of activations.
constexpr int64_t num_registers(int32_t format) { return format == HQQ3 ? 3 : 2; }

// Of a row prepared by itself for a quantized matrix: for each 64 columns the even ones and the odd
// ones, of 3 bit also where sums begin; then the groups' sums, padded with zeros to 16. Or what
// fixed_rows.h has.
Row row_of(const Matrix& m, const uint8_t* prepared) {
    const auto* columns = reinterpret_cast<const __m512i*>(prepared);
    const auto* end = columns + num_registers(m.format) * num_vectors(m);
    const auto* sums = reinterpret_cast<const float*>(end);
    return {columns, sums, sums + round_up(num_groups(m), 16)};
}

int64_t prepared_bytes(const Matrix& m, Form form) {
    const int64_t others = generic::prepared_bytes(m, form);
    return m.format >= HQQ8 && !is_e4m3(m.format) ? std::max(others, fixed_bytes(m, 2)) : others;
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

// A row of bfloat16s for e4m3_bf16.h, padded with zeros to 128: of each 64 columns the first eight of
// each sixteen, then the others.
void prepare_e4m3(const float* row, int64_t columns, uint8_t* out) {
    auto* values = reinterpret_cast<uint16_t*>(out);
    for (int64_t i = 0; i < round_up(columns, 2 * COLUMNS); ++i) {
        const int64_t within = i % COLUMNS;
        const int64_t column = i - within + within % 32 / 8 * 16 + within / 32 * 8 + within % 8;
        values[i] = column < columns ? static_cast<uint16_t>(to_bits(row[column]) >> 16) : 0;
    }
}

void prepare(const Matrix& m, const float* row, int32_t type, Form form, uint8_t* prepared) {
    if (!is_fast(m, type)) return generic::prepare(m, row, type, form, prepared);
    if (m.format == BF16) {
        auto* out = reinterpret_cast<uint16_t*>(prepared);
        const int64_t padded = round_up(m.columns, 32);
        narrow(row, m.columns, BF16, out);
        memset(out + m.columns, 0, (padded - m.columns) * 2);
        return;
    }
    if (is_e4m3(m.format)) return prepare_e4m3(row, m.columns, prepared);
    form = form_here(m, type, form);
    if (form == ONE_PLANE) return prepare_fixed<1>(m, row, prepared);
    if (form == TWO_PLANES || is_fixed(m.format)) return prepare_fixed<2>(m, row, prepared);
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
