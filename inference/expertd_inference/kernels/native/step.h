// The small operations of a decoding step, as program.cpp strings them together. `type` is BF16
// or F32, of everything.
#pragma once

#include <cstdint>

#include "kernels.h"

// Rows of d, strided by the given counts of elements.
struct Attention {
    int64_t heads, kv_heads, length, d;
    int64_t q_head, k_head, k_row, v_head, v_row;
    float scale;
};

// The heads that share keys [first_kv, last_kv); `q` and `out` are of all heads.
void step_attend(const void* q, const void* k, const void* v, void* out, const Attention& a,
                 int64_t first_kv, int64_t last_kv, int32_t type, float* scratch);
int64_t step_attend_bytes(const Attention& a); // of its scratch

// Strides are from head to head, in elements.
void step_rotate(const void* x, int64_t head_stride, int64_t heads, int64_t d, const void* cos,
                 const void* sin, void* out, int64_t out_stride, int32_t type);

// out = x + y, which may be the same.
void step_add(const void* x, const void* y, void* out, int64_t n, int32_t type);

EXPERTD_API void expertd_rms_norm(const void* x, const void* weight, void* y, int64_t rows,
                                  int64_t n, float eps, int32_t round_first, int32_t type);

// As expertd_route.
void step_route(const void* logits, int64_t rows, int64_t n, int64_t k, int32_t normalize,
                int32_t float_weights, void* weights, int64_t* index, int32_t type,
                uint8_t* scratch);
int64_t step_route_bytes(int64_t n); // of its scratch
