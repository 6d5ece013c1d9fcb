// Quantized weights times fixed-point activations, for any number of rows, one as well; everything
// else as generic.h has it. What variants have that do not multiply bfloat16.
#pragma once

#include "unroll.h" // before the intrinsics: see there

#include "attention_tile.h"
#include "rows.h"

namespace {
namespace fixed {

bool is_fast(const Matrix& m, int32_t type) {
    return has_planes(type) && m.format >= HQQ8 && !is_e4m3(m.format);
}

int64_t prepared_bytes(const Matrix& m, Form form) {
    const int64_t others = generic::prepared_bytes(m, form);
    return m.format >= HQQ8 && !is_e4m3(m.format) ? std::max(others, fixed_bytes(m, 2)) : others;
}

void prepare(const Matrix& m, const float* row, int32_t type, Form form, uint8_t* prepared) {
    if (!is_fast(m, type)) return generic::prepare(m, row, type, form, prepared);
    if (form == ONE_PLANE) return prepare_fixed<1>(m, row, prepared);
    prepare_fixed<2>(m, row, prepared);
}

void multiply(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
              const uint8_t* const* prepared, float* const* results, int64_t num_rows,
              int32_t type, Form form) {
    if (!is_fast(m, type))
        return generic::multiply(m, base, first, last, prepared, results, num_rows, type, form);
    multiply_quantized_rows(m, base, first, last, prepared, results, num_rows,
                            form == ONE_PLANE ? 1 : 2);
}

constexpr Variant VARIANT = {
    prepared_bytes,
    prepare,
    multiply,
    generic::dequantize,
    generic::activate,
    widen,
    narrow,
    round_all,
    tile::attend<tile::Generic>,
    tile::fold_partials<tile::Generic>,
};

} // namespace fixed
} // namespace
