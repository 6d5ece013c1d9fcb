#include "delta_loops.h"

extern const Steps STEPS_PORTABLE;
const Steps STEPS_PORTABLE = STEPS_OF_THIS_FILE;
