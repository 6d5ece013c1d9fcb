// The C interface of steps whose experts are all in RAM: no return to Python between layers.
#pragma once

#include "program.h"

// A program, and then the experts of one layer, of which `call` tells all but which experts, how
// many rows, where the arena is, and by how many threads.
struct HeldSegment {
    void* program;
    const ExpertsCall* call;
    const uint64_t* words; // the directory's words of the layer, by expert
    int64_t num_experts, first_entry;
    int64_t most_rows; // of an expert that is computed here; with more torch computes it
};

struct HeldStep {
    const HeldSegment* segments;
    int64_t num_segments, first; // to begin with
    const StepCall* step;
    const uint8_t* arena;
    int64_t* used; // [room of all experts]: the directory's entries that were used
    int64_t num_used;
};
