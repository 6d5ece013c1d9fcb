#include "delta_loops.h"

extern const Steps STEPS_AVX2;
const Steps STEPS_AVX2 = STEPS_OF_THIS_FILE;
