#include "fixed_variant.h"

extern const Variant VARIANT_AVX512;
const Variant VARIANT_AVX512 = fixed::VARIANT;
