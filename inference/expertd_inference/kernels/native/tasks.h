// How a matrix is divided among threads, and what is done with a piece of it.
#pragma once

#include <algorithm>
#include <utility>

#include "variant.h"

inline int64_t size_of(int32_t type) { return type == F32 ? 4 : 2; }

// Bytes that begin on a line of the cache, if those before them do.
constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// A matrix in tasks of at most MOST_BYTES of weights: enough that a stream gets up to speed. They
// are smaller where less than TASKS_PER_THREAD would come of it, so that a thread which comes
// late, or is held up, leaves little to wait for.
class Chunks {
  public:
    static constexpr int64_t LEAST_BYTES = 64 << 10, MOST_BYTES = 512 << 10;
    static constexpr int64_t TASKS_PER_THREAD = 6;

    Chunks() = default;

    // Of `copies` matrices of the same form.
    Chunks(const Matrix& matrix, int64_t copies, int32_t threads) : units(num_units(matrix)) {
        const int64_t bytes = bytes_per_unit(matrix) * units;
        const int64_t share = bytes * copies / (threads * TASKS_PER_THREAD);
        const int64_t chunk = std::clamp(share, LEAST_BYTES, MOST_BYTES);
        const int64_t most = std::clamp<int64_t>(bytes / chunk, 1, std::max<int64_t>(units, 1));
        // Products of several rows take 16 units at a time.
        units_each = ((units + most - 1) / most + 15) / 16 * 16;
        count = (units + units_each - 1) / units_each;
    }

    std::pair<int64_t, int64_t> range(int64_t chunk) const {
        return {chunk * units_each, std::min(units, (chunk + 1) * units_each)};
    }

    int64_t count = 0;
    int64_t units_each = 0; // at most

  private:
    int64_t units = 0;
};

// Units [first, last) times `num_rows` rows of activations; `input` and `output` say where.
template <class Input, class Output>
void multiply_in_blocks(const Variant& impl, const Matrix& matrix, const uint8_t* base,
                        int64_t first, int64_t last, int64_t num_rows, int32_t type, Form form,
                        Input input, Output output) {
    const uint8_t* inputs[ROWS_AT_ONCE];
    float* outputs[ROWS_AT_ONCE];
    for (int64_t start = 0; start < num_rows; start += ROWS_AT_ONCE) {
        const int64_t count = std::min(ROWS_AT_ONCE, num_rows - start);
        for (int64_t i = 0; i < count; ++i) {
            inputs[i] = input(start + i);
            outputs[i] = output(start + i);
        }
        impl.multiply(matrix, base, first, last, inputs, outputs, count, type, form);
    }
}

// Rounds products [row, row + count) as torch does after a product, and adds the bias, for which
// there are `count` floats of scratch.
inline void finish(const Variant& impl, const Matrix& matrix, const uint8_t* base, int64_t row,
                   int64_t count, int32_t type, float* values, float* bias) {
    if (type != F32) impl.round(values, count, type);
    if (matrix.bias < 0) return;
    impl.widen(base + matrix.bias + row * size_of(matrix.bias_format), matrix.bias_format, count,
               bias);
    impl.round(bias, count, type);
    for (int64_t i = 0; i < count; ++i) values[i] += bias[i];
    impl.round(values, count, type);
}

// Units [first, last) of a linear layer's result for one row of activations, in the call's type,
// the bias included, for which there are last - first floats of scratch. `result` has the whole
// row, in float32.
inline void finish_linear(const Variant& impl, const LinearCall& call, int64_t first, int64_t last,
                          int64_t token, float* result, float* bias) {
    const Matrix& matrix = *call.matrix;
    for (int64_t k = 0; k < rows_per_unit(matrix.format); ++k) {
        const int64_t row = first + k * num_units(matrix);
        if (matrix.bias >= 0) {
            const auto* place = reinterpret_cast<const uint8_t*>(matrix.bias);
            impl.widen(place + row * size_of(matrix.bias_format), matrix.bias_format, last - first,
                       bias);
            for (int64_t i = 0; i < last - first; ++i) result[row + i] += bias[i];
        }
        impl.narrow(result + row, last - first, call.type,
                    static_cast<uint8_t*>(call.out) +
                        (token * matrix.rows + row) * size_of(call.type));
    }
}
