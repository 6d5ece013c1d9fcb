// The small operations of a decoding step, one call each. `type` is BF16
// or F32, of everything.
#pragma once

#include <cstdint>

#include "kernels.h"

// Strides are from head to head, in elements.
void step_rotate(const void* x, int64_t head_stride, int64_t heads, int64_t d, const void* cos,
                 const void* sin, void* out, int64_t out_stride, int32_t type);

EXPERTD_API void expertd_rms_norm(const void* x, const void* weight, void* y, int64_t rows,
                                  int64_t n, float eps, int32_t round_first, int32_t type);

// As expertd_route.
void step_route(const void* logits, int64_t rows, int64_t n, int64_t k, int32_t normalize,
                int32_t float_weights, void* weights, int64_t* index, int32_t type,
                uint8_t* scratch);
int64_t step_route_bytes(int64_t n); // of its scratch
