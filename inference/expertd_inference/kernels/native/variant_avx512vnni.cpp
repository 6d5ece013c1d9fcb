#include "fixed_variant.h"

extern const Variant VARIANT_AVX512VNNI;
const Variant VARIANT_AVX512VNNI = fixed::VARIANT;
