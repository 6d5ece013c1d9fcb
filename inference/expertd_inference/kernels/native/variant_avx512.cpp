#include "attention_tile.h"
#include "generic.h"

extern const Variant VARIANT_AVX512;
const Variant VARIANT_AVX512 = {
    generic::prepared_bytes,
    generic::prepare,
    generic::multiply,
    generic::dequantize,
    generic::activate,
    widen,
    narrow,
    round_all,
    tile::attend<tile::Generic>,
    tile::fold_partials<tile::Generic>,
};
