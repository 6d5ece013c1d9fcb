// Activations as fixed-point numbers, for products of whole numbers: rows.h takes them for all
// quantized weights, and variant_avx512bf16.cpp, of one row, for 8 and 4 bit, whose integers are
// found in their bytes by a mask alone.
//
// The activations of a group are whole multiples of a power of two, at most 32,639 of them: 15
// bits and a sign, in two planes of signed bytes, 256 * high + low. Of bfloat16s, which have 8
// bits, those larger than a 128th of the group's largest are exact, and none is off by more than a
// 32,639th of that largest, where rounding to bfloat16 moves the largest itself by up to a 512th.
// Of float16s the same holds of those larger than a 16th; of some groups, an 8th.
//
// Or they are in one plane, multiples of a 127th of the group's largest.
#pragma once

#if defined(__AVX512VNNI__)
#include "fixed_planes.h"
#else
#include "fixed_words.h"
#endif

namespace {

// The columns, padded with zeros to 64; then the groups' sums, and what each counts in, both padded
// with zeros to 16.
template <int PLANES>
inline void prepare_fixed(const Matrix& m, const float* row, uint8_t* prepared) {
    const int64_t vector = vector_bytes(m.format, PLANES), bytes = vector * num_vectors(m);
    const int64_t groups = num_groups(m), padded = round_up(groups, 16);
    if (m.columns % COLUMNS) memset(prepared + bytes - vector, 0, vector);
    auto* sums = reinterpret_cast<float*>(prepared + bytes);
    memset(sums, 0, 2 * padded * sizeof(float));
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t column = group * m.group_size;
        prepare_group<PLANES>(row + column, m.group_size, m.format,
                              prepared + place_of(m.format, PLANES, column), sums[group],
                              sums[padded + group]);
    }
}

inline int64_t fixed_bytes(const Matrix& m, int planes) {
    return vector_bytes(m.format, planes) * num_vectors(m) +
           2 * round_up(num_groups(m), 16) * static_cast<int64_t>(sizeof(float));
}

// Where prepared activations are: the columns; the groups' sums; what they count in.
struct Row {
    const Line* columns;
    const float *sums, *factors; // the latter of fixed-point ones
};

inline Row fixed_row_of(const Matrix& m, const uint8_t* prepared, int planes) {
    const auto* columns = reinterpret_cast<const Line*>(prepared);
    const auto* sums =
        reinterpret_cast<const float*>(prepared + vector_bytes(m.format, planes) * num_vectors(m));
    return {columns, sums, sums + round_up(num_groups(m), 16)};
}

} // namespace
