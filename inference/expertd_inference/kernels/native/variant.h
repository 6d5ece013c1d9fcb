// One implementation of the arithmetic, for one instruction set.
#pragma once

#include "kernels.h"

// Rows of a matrix that share bytes, a unit: row u of unit u, then u + rows / n and so on.
constexpr int64_t rows_per_unit(int32_t format) {
    switch (format) {
    case HQQ4:
    case MXFP4:
    case NVFP4: return 2;
    case HQQ3: return 8;
    case HQQ2: return 4;
    default: return 1;
    }
}

// The zero of integers whose matrix has none of its own.
constexpr float middle(int32_t format) {
    return format == HQQ8 ? 128 : format == HQQ4 ? 8 : format == HQQ3 ? 4 : 2;
}

inline int64_t num_units(const Matrix& matrix) {
    return matrix.rows / rows_per_unit(matrix.format);
}

inline int64_t bytes_per_unit(const Matrix& matrix) {
    switch (matrix.format) {
    case HQQ3: return matrix.columns * 3;
    case BF16:
    case F16: return matrix.columns * 2;
    case F32: return matrix.columns * 4;
    default: return matrix.columns;
    }
}

// What rows of activations are prepared for: one of them alone, or any number of them, in 16 or
// in 8 bits. The rows of a matrix in a call are all of one form. Bits of a row in the latter two do
// not depend on the number of rows.
enum Form : int32_t { ONE_ROW, TWO_PLANES, ONE_PLANE };

inline Form form_of(int64_t num_rows, int32_t flags) {
    if (num_rows == 1 && !(flags & EXACT)) return ONE_ROW;
    return flags & EIGHT_BIT_ACTIVATIONS ? ONE_PLANE : TWO_PLANES;
}

// So many rows of activations are multiplied in one pass over the weights: few enough that they
// stay in the second cache.
constexpr int64_t ROWS_AT_ONCE = 64;

struct AttentionTile;

struct Variant {
    // Bytes of a row of activations as `multiply` wants it, a multiple of 64.
    int64_t (*prepared_bytes)(const Matrix& matrix, Form form);
    // `row` [columns] holds values of `type`, which was rounded to before.
    void (*prepare)(const Matrix& matrix, const float* row, int32_t type, Form form,
                    uint8_t* prepared);
    // The products of units [first, last) with `num_rows` rows of activations, at most ROWS_AT_ONCE
    // of them, without bias: results[n][row], float32. Does not depend on what else is computed.
    void (*multiply)(const Matrix& matrix, const uint8_t* base, int64_t first, int64_t last,
                     const uint8_t* const* prepared, float* const* results, int64_t num_rows,
                     int32_t type, Form form);
    // The weights of units [first, last) in `type`; from one row of a unit to its next are
    // `stride` bytes in `out`.
    void (*dequantize)(const Matrix& matrix, const uint8_t* base, int64_t first, int64_t last,
                       uint8_t* out, int64_t stride, int32_t type);
    // out[i] from gate[i] and up[i], all rounded to `type`. May be in place of gate. RELU2 is of
    // gate alone.
    void (*activate)(const Activation& activation, const float* gate, const float* up,
                     int64_t count, int32_t type, float* out);
    // Between values of a type and float32; the latter rounds to nearest even.
    void (*widen)(const void* values, int32_t type, int64_t count, float* out);
    void (*narrow)(const float* values, int64_t count, int32_t type, void* out);
    // Rounds to `type` in place.
    void (*round)(float* values, int64_t count, int32_t type);
    // A tile of attention, or the last steps of one whose pieces several tasks computed.
    void (*attend)(const AttentionTile& tile);
    void (*fold)(const AttentionTile& tile);
};

// The one in use: the best that this processor has, unless expertd_use_isa chose another.
const Variant& variant();
