#include "delta_loops.h"

extern const Steps STEPS_AVX512;
const Steps STEPS_AVX512 = STEPS_OF_THIS_FILE;
