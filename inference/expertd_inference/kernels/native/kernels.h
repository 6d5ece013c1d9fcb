// The C interface of the kernels: what Python calls, through ctypes. Addresses and sizes only.
#pragma once

#include <cstdint>

#define EXPERTD_API extern "C" __attribute__((visibility("default")))

// Exports the size of a structure that Python has, too, which compares them when it loads the
// library. In one source each.
#define EXPERTD_STRUCTURE(NAME)                                                                    \
    EXPERTD_API int64_t expertd_size_of_##NAME() { return sizeof(NAME); }

// Changes with any structure or function of the C interface, in whichever header; library.py of
// kernels/cpu has the same number.
#define EXPERTD_ABI 8

// How values are stored; the first three are also the types of activations.
enum Format : int32_t { BF16, F16, F32, HQQ8, HQQ4, HQQ3, HQQ2, MXFP4, NVFP4, FP8, MXFP8 };

// Whether two rows share bytes of e2m1 numbers, and whether bytes are e4m3 numbers.
constexpr bool is_e2m1(int32_t format) { return format == MXFP4 || format == NVFP4; }
constexpr bool is_e4m3(int32_t format) { return format == FP8 || format == MXFP8; }

// How a call computes, in its `flags`.
enum Flag : int32_t {
    // The bits of a row do not depend on the number of rows. Without it one row of activations by
    // itself may differ from what it gives among others; two rows and more never do.
    EXACT = 1,
    // Activations of quantized matrices are rounded to 8 bits per group, instead of 16.
    EIGHT_BIT_ACTIVATIONS = 2,
};

enum ActivationKind : int32_t { SILU, GELU, GELU_TANH, RELU, GPT_OSS, RELU2 };

// A matrix as docs/packing.md has it. Places are byte offsets from an address given at the call:
// a record's, or 0 where they are addresses themselves.
struct Matrix {
    int64_t rows, columns;
    int64_t weight;                         // the plain weights, or q
    int64_t scale;
    int64_t scale_scale, scale_zero; // with meta groups; of NVFP4 the rows' global scales, and none
    int64_t zero;                    // of HQQ; -1: the middle of its integers
    int64_t zero_scale, zero_zero;   // with meta groups
    int64_t bias;                           // -1: none
    int32_t format, group_size, meta_group_size, bias_format;
    int32_t scale_format; // of HQQ: F16 or BF16, where meta groups are of their scales; zeros are F16
    int32_t group_rows; // of FP8: rows that share a scale
};

struct Activation {
    int32_t kind;
    float alpha, limit;
};

// Without a gate `gate_up` is up alone: it has as many rows as `down` has columns.
struct Layer {
    Matrix gate_up, down;
    Activation activation;
    int32_t padding;
};

struct ExpertsCall {
    const Layer* layer;
    const uint8_t* arena;
    const int64_t* experts; // [num_experts]
    const int64_t* records; // [num_experts], byte offsets in the arena
    const void* hidden;     // [tokens, H]
    const int64_t* top_k_index;
    const void* top_k_weights; // [tokens, k] both
    void* slots;               // [tokens, k, H]
    void* out;                 // [tokens, H], or null: the sum over slots as well
    int64_t num_experts, tokens, k;
    int32_t type, weights_type, slots_type, threads;
    int32_t flags, padding;
};

struct LinearCall {
    const Matrix* matrix;
    const void* x; // [tokens, columns]
    void* out;     // [tokens, rows]
    int64_t tokens;
    int32_t type, threads;
    int32_t flags, padding;
};
