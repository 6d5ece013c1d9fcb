// The C interface of the kernels: what Python calls, through ctypes.
#pragma once

#include <cstdint>

#define EXPERTD_API extern "C" __attribute__((visibility("default")))

// Changes with any structure or function here; kernels/native_library.py has the same number.
#define EXPERTD_ABI 1
