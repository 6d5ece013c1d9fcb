#include "fixed_variant.h"

extern const Variant VARIANT_AVX2;
const Variant VARIANT_AVX2 = fixed::VARIANT;
