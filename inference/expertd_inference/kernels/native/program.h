// The C interface of programs: operations of one token, one after the other, in one call.
#pragma once

#include "kernels.h"

enum OperationKind : int32_t { EMBED, ADD, NORM, LINEAR, ATTEND, ROUTE };

// `beside`: of a LINEAR, that it does not need what the operation before it makes, which is
// LINEAR, too.
struct Operation {
    int32_t kind, beside;
    const void* call; // the structure of its kind
};

struct EmbedCall {
    const void* table; // [tokens, n]
    void* out;
    int64_t row_bytes;
};

struct AddCall {
    const void *x, *y; // [n] both
    void* out;
    int64_t n;
    int32_t type, padding;
};

struct NormCall {
    const void *x, *weight; // [rows, n], [n]
    void* out;
    int64_t rows, n;
    float eps;
    int32_t round_first, type, padding;
};

// Queries and keys are normed per head, where there are weights for it, and rotated; keys and
// values are appended to those of the tokens before; and the token attends to all of them.
struct AttendCall {
    const void *q, *k, *v;            // [heads, d], [kv_heads, d] twice
    const void *q_weight, *k_weight;  // [d] both, or null
    const void *cos, *sin;            // [d] both
    void *keys, *values;              // [kv_heads, room, d] both
    void* turned;                     // [heads, d], scratch
    void* out;                        // [heads, d]
    int64_t heads, kv_heads, d, room; // room: of how many tokens
    float eps, scale;
    int32_t round_first, type;
};

struct RouteCall {
    const void* logits; // [n]
    void* weights;      // [k]
    int64_t* index;     // [k]
    int64_t n, k;
    int32_t normalize, float_weights, type, padding;
};
