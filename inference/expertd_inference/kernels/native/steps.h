// The small operations of a step for one instruction set: steps_loops.h. `type` is BF16 or F32.
#pragma once

#include "delta.h"
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
    // A head of a sequence, all of its state.
    void (*delta)(const DeltaCall& call, int64_t sequence, int64_t head);
};

// Those of the instruction set in use.
const Steps& steps();
