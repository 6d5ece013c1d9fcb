// The gated delta rule for one row of each sequence, on states where they lie.
//
// A head's state S, [keys, values], becomes S' = decay S + k (beta (v - k decay S)), and the result
// is q S', with q and k of length 1, and q divided by the root of `keys`. As in "Gated Delta
// Networks" (Yang, Kautz, Hatamizadeh, 2024); with a decay for each key as in "Kimi Linear" (2025).
#pragma once

#include "kernels.h"

constexpr int64_t MAX_DELTA_WIDTH = 512; // of `keys` and `values`; kernels/cpu/delta.py has it, too

struct DeltaCall {
    float* states;            // [places, heads, keys, values]
    const int64_t *from, *to; // [sequences]: the places that are read and written
    const void* query;        // [sequences, key_heads, keys], in `type`, as are the next three
    const void* key;          // [sequences, key_heads, keys]: each for heads / key_heads heads
    const void* value;        // [sequences, heads, values]
    const void* beta;         // [sequences, heads]
    const float* decay;       // [sequences, heads, decays]: logarithms
    void* out;                // [sequences, heads, values], in `type`
    int64_t sequences, heads, key_heads, keys, values, decays; // decays is 1 or `keys`
    int32_t type, threads;    // BF16 or F32
};
