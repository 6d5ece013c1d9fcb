// The small operations of a step for one instruction set: steps_loops.h. `type` is BF16 or F32.
#pragma once

#include "program.h"

struct Steps {
    // A group of a row.
    void (*norm)(const NormCall& call, const void* x, void* out);
    // A row.
    void (*add)(const AddCall& call, const void* x, const void* y, void* out);
    void (*scale)(const ScaleCall& call, const void* x, void* out);
    void (*gate)(const GateCall& call, const void* x, const void* by, void* out);
    // A row in place, by its position's row of the tables.
    void (*rotate)(const RotateCall& call, const float* cos, const float* sin, void* x);
    // Rows of n, as NormKind has it, with a weight [n] of their own type.
    void (*rms_norm)(const void* x, const void* weight, void* out, int64_t rows, int64_t n,
                     float eps, bool round_first, int32_t type);
    // Heads of d in halves, by cos and sin [d] of their own type; from one head of x to the next
    // are `stride` elements, and in `out` there is no gap.
    void (*rotate_heads)(const void* x, int64_t stride, int64_t heads, int64_t d, const void* cos,
                         const void* sin, void* out, int32_t type);
};

// Those of the instruction set in use.
const Steps& steps();
