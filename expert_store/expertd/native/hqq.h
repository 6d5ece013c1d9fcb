// What the sources of the quantizer share: a matrix to be quantized, and who can do it.
#pragma once

#include <cstdint>

namespace expertd {

// The input's type, in the order that expertd.packing.native knows.
enum Dtype : int32_t { kBf16 = 0, kFp16 = 1, kFp32 = 2 };

// What a group's scale is stored as. It is made a number of that type before the integers are
// chosen, where that type is coarse, so that they make up for it.
enum Scales : int32_t { kScalesFp16 = 0, kScalesBf16 = 1, kScalesFp32 = 2 };

// A matrix [out_features, in_features], row after row, and where its parts go. Of the parts, q is
// [out_features * bits / 8, in_features] as expertstore.pack.codec describes it, scale and zero are
// [out_features, in_features / group_size], fp32. Python has the same structure.
struct HqqMatrix {
    const void* weight;
    uint8_t* q;
    float* scale;
    float* zero;
    int64_t out_features;
    int64_t in_features;
    int32_t bits;
    int32_t group_size;
    int32_t dtype;
    int32_t optimize;
    int32_t scales;  // a Scales: what the scale will be stored as
};

constexpr int kMaxGroupSize = 128;

// Quantizes what the units [begin, end) of the matrix hold: a unit is the rows that share bytes.
using HqqUnits = void (*)(const HqqMatrix& matrix, int64_t begin, int64_t end);

void hqq_units_portable(const HqqMatrix& matrix, int64_t begin, int64_t end);
void hqq_units_avx2(const HqqMatrix& matrix, int64_t begin, int64_t end);
void hqq_units_avx512(const HqqMatrix& matrix, int64_t begin, int64_t end);

// Rows in a unit, by bits: the rows r, r + N/rows, r + 2N/rows, ... of N.
inline int rows_of_unit(int bits) { return bits == 8 ? 1 : bits == 4 ? 2 : bits == 2 ? 4 : 8; }

}  // namespace expertd
