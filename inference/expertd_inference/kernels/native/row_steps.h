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
