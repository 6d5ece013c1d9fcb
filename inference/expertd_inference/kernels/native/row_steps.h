// The operations of a program that need nothing but their own row, row by row.
#pragma once

#include "program.h"

// `x`, `out` and so on of the calls, at row `row` (of wanted rows, for those).
void run_gather(const GatherCall& call, int64_t from, int64_t row);
void run_embed(const EmbedCall& call, int64_t token, int64_t row);
void run_add(const AddCall& call, int64_t row);
void run_scale(const ScaleCall& call, int64_t row);
void run_norm(const NormCall& call, int64_t row);
void run_rotate(const RotateCall& call, int64_t position, int64_t row);
void run_gate(const GateCall& call, int64_t row);
void run_activate(const ActivateCall& call, int64_t row);

// Needs so many bytes of scratch.
int64_t route_scratch(const RouteCall& call);
void run_route(const RouteCall& call, int64_t row, float* scratch);

// Of the experts that were chosen for a row the `most` of most weight are kept, and of these none
// whose share of all their weights is below `least`, but one in any case. Those that are dropped
// become `n`, which is no expert. Returns how many are kept.
int64_t keep_fewer(const RouteCall& call, int64_t row, int64_t most, float least);
