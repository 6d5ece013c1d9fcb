// Weights of 3-bit, 2-bit and e2m1 matrices as bfloat16s, by a shift for several rows and one
// operation each: no conversion, and but for e2m1 no table.
//
// 64 bytes of a unit are taken as 32 words. A word's low byte is an even column, its high byte the
// odd one after it, and both hold a field of each row. Of a word shifted so that a field lies among
// its lowest seven bits, the others masked and those of a power of two set, the field is the
// mantissa of a bfloat16: the power of two plus the field, exactly, where the power is that by
// which the field's lowest bit counts 1. That is 128 for a field at bit 0, 16 at bit 3, 4 at bit 5.
#pragma once

#include "bf16_scales.h"

namespace {

// 64 columns of a unit, as words in which each row's fields stand where they are wanted.
template <int32_t FORMAT> struct Words {
    static constexpr bool THREE = FORMAT == HQQ3;
    __m512i shifted[THREE ? 8 : 4];

    // Row K's word; ODD columns or even ones.
    template <int K, int ODD> INLINE __m512i word() const {
        if (THREE) return shifted[K % 2 * 4 + K / 2 % 2 * 2 + ODD];
        if (FORMAT == HQQ2) return shifted[ODD * 2 + (K < 2)];
        return shifted[ODD * 2 + (K == 0)];
    }
};

// 64 bytes, kept in a register: without the assembly the compiler loads them again for each shift.
INLINE __m512i load_bytes(const uint8_t* bytes, __mmask64 mask) {
    __m512i value = _mm512_maskz_loadu_epi8(mask, bytes);
    asm("" : "+v"(value));
    return value;
}

template <int BITS> INLINE __m512i right(__m512i words) { return _mm512_srli_epi16(words, BITS); }
template <int BITS> INLINE __m512i left(__m512i words) { return _mm512_slli_epi16(words, BITS); }

// Of each four bits the lower two from `low`, the third from `high`.
INLINE __m512i merge(__m512i low, __m512i high) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x33), low, high, 0xca);
}

template <int32_t FORMAT>
INLINE Words<FORMAT> load(const Places& from, int64_t column, __mmask64 mask) {
    const __m512i low = load_bytes(from.low + column, mask);
    if constexpr (FORMAT == HQQ3) {
        const __m512i below = load_bytes(from.below + column, mask);
        const __m512i high = load_bytes(from.high + column, mask);
        // In one register rows 0 and 4, 2 and 6, 1 and 5, 3 and 7; the high bit above the low ones.
        const __m512i a = merge(right<2>(low), right<1>(high)), b = merge(low, left<1>(high));
        const __m512i c = merge(right<2>(below), high), d = merge(below, left<2>(high));
        return {{a, right<8>(a), b, right<8>(b), c, right<8>(c), d, right<8>(d)}};
    } else if constexpr (is_e2m1(FORMAT)) {
        return {{low, right<4>(low), right<8>(low), right<12>(low)}};
    } else {
        static_assert(FORMAT == HQQ2, "the others need no words");
        return {{left<3>(low), right<1>(low), right<5>(low), right<9>(low)}};
    }
}

// The bits of `mask` in `words`, above them those of `power`.
INLINE __m512i field(__m512i words, uint16_t mask, uint16_t power) {
    return _mm512_ternarylogic_epi32(words, _mm512_set1_epi16(static_cast<short>(mask)),
                                     _mm512_set1_epi16(static_cast<short>(power)), 0xea);
}

INLINE __m512i e2m1(__m512i words) {
    // vpermw looks at the lowest five bits; the table has all values twice.
    const __m512i table = _mm512_set_epi16(
        static_cast<short>(0xc0c0), static_cast<short>(0xc080), static_cast<short>(0xc040),
        static_cast<short>(0xc000), static_cast<short>(0xbfc0), static_cast<short>(0xbf80),
        static_cast<short>(0xbf00), static_cast<short>(0x8000), 0x40c0, 0x4080, 0x4040, 0x4000,
        0x3fc0, 0x3f80, 0x3f00, 0, static_cast<short>(0xc0c0), static_cast<short>(0xc080),
        static_cast<short>(0xc040), static_cast<short>(0xc000), static_cast<short>(0xbfc0),
        static_cast<short>(0xbf80), static_cast<short>(0xbf00), static_cast<short>(0x8000),
        0x40c0, 0x4080, 0x4040, 0x4000, 0x3fc0, 0x3f80, 0x3f00, 0);
    return _mm512_permutexvar_epi16(words, table);
}

// The bits of a bfloat16 of that value, a power of two.
constexpr uint16_t power_bits(int value) {
    uint16_t bits = 127 << 7;
    for (; value > 1; value /= 2) bits += 1 << 7;
    return bits;
}

template <int32_t FORMAT, int K, int ODD> INLINE __m512i weights_of(const Words<FORMAT>& words) {
    const __m512i word = words.template word<K, ODD>();
    if constexpr (is_e2m1(FORMAT)) return e2m1(word);
    else {
        constexpr int BIT = field_bit(FORMAT, K);
        constexpr int BITS = FORMAT == HQQ2 ? 2 : 3;
        return field(word, ((1 << BITS) - 1) << BIT, power_bits(power_above(BIT)));
    }
}

} // namespace
