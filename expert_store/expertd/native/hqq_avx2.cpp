#define LANES 8
#include "hqq_lanes.h"

void expertd::hqq_units_avx2(const HqqMatrix& matrix, int64_t begin, int64_t end) {
    quantize_units(matrix, begin, end);
}
