// The C interface of programs: operations on the rows of a step, one after the other, in one call.
//
// A program is made once, of operations whose structures are the caller's and outlive it; a run of
// it has a number of rows. Memory that an operation reads or writes has room for the most rows:
// row r of a row of n elements begins at r * n. `type` is BF16 or F32.
#pragma once

#include "kernels.h"

enum OperationKind : int32_t {
    EMBED, GATHER, ADD, SCALE, NORM, LINEAR, ROTATE, ATTEND, ROUTE, ACTIVATE, GATE
};

// `beside`: of a LINEAR, that it does not need what the operation before it makes, which is
// LINEAR, too. `wanted`: it works on the rows whose logits are wanted, which a GATHER has put
// together, and else on all.
struct Operation {
    int32_t kind, beside, wanted, padding;
    const void* call; // the structure of its kind
};

// A row's token in a table of rows.
struct EmbedCall {
    const void* table; // [tokens, n]
    void* out;
    int64_t row_bytes;
};

// The wanted rows of x, one after the other.
struct GatherCall {
    const void* x;
    void* out;
    int64_t row_bytes;
};

// x + y; `y_row` is n, or 0 if all rows are given the same y.
struct AddCall {
    const void *x, *y;
    void* out;
    int64_t n, y_row;
    int32_t type, padding;
};

// x * factor, or x / factor.
struct ScaleCall {
    const void* x;
    void* out;
    int64_t n;
    float factor;
    int32_t divide, type, padding;
};

enum NormKind : int32_t {
    RMS,       // weight * x / sqrt(mean(x^2) + eps), rounded once
    RMS_ROUND, // the quotient is rounded before it meets the weight
    LAYER      // (x - mean) / sqrt(variance + eps) * weight + bias
};

// Each of the `groups` parts, of n, of a row is normed by itself. The weight and bias are F32.
struct NormCall {
    const void* x;
    const float *weight, *bias; // [n]; bias may be null
    void* out;
    int64_t groups, n;
    float eps;
    int32_t kind, type, padding;
};

// x times the matrix, transposed: its result is rounded to `out_type`.
struct ProductCall {
    const Matrix* matrix; // places are addresses
    const void* x;
    void* out;
    int32_t type, out_type;
};

// Rotary embedding of the first `turned` elements of each head, in place, by the row of tables
// that the row's position has: in halves, or pairs that lie beside one another.
struct RotateCall {
    void* x; // [heads, d]
    const void *cos, *sin; // [positions, turned / 2]
    int64_t heads, d, turned;
    int32_t pairs, type;
};

enum RouteKind : int32_t {
    SOFTMAX,      // of all, then the likeliest
    TOP_SOFTMAX,  // the likeliest, then softmax of these
    SIGMOID,      // of each; chosen by it plus a bias, among the best groups
    SPARSE_MIXER  // Phi-MoE's: two, each by a softmax of those that are near it
};

struct RouteCall {
    const void* logits; // [n]
    void* weights;      // [k]
    int64_t* index;     // [k]
    const float* bias;  // [n] of SIGMOID, or null
    int64_t n, k, groups, top_groups;
    int32_t kind, normalize, type, weights_type;
    float scale; // of the weights, or SPARSE_MIXER's jitter
    int32_t padding;
};

// The activation of gate and up, [n] both.
struct ActivateCall {
    const void *gate, *up;
    void* out;
    int64_t n;
    Activation activation;
    int32_t type;
};

// x * sigmoid(gate), where a row's gate has one element, or n.
struct GateCall {
    const void *x, *gate;
    void* out;
    int64_t n, gate_n;
    int32_t type, padding;
};

// What a run computes.
struct StepCall {
    const int64_t* tokens;    // [rows]
    const int64_t* positions; // [rows], each in its sequence
    const int64_t* wanted;    // [num_wanted] of the rows
    int64_t rows, num_wanted;
    const struct AttentionPlan* plan;
    int32_t threads, flags; // of Flag
    // [rows]: of the experts that a router chooses, so many are kept, and none whose share of the
    // row's weight is smaller; null if all are kept. `kept` counts them.
    const int64_t* most_experts;
    const float* least_share;
    int64_t* kept;
};
