// Scales and zeros for products of tiles (rows_tiles.h): lanes are units.
#pragma once

#include "rows_tiles.h"

namespace {

constexpr int64_t STRIP = 16; // groups whose scales are decoded at a time

// Scales of a strip: [group][tile][field][scale, zero][unit], as fields want them: an upper one
// counts 16 times too much.
template <int32_t FORMAT>
constexpr int64_t floats_per_group = rows_per_unit(FORMAT) * 2 * LANES;

// What a place of a strip counts too much, and so do its sums of activations: 16 of upper fields.
template <int32_t FORMAT> constexpr float too_much(int place) {
    return fields_of(FORMAT) == NIBBLES && place % 2 == 0 ? 16 : 1;
}

template <int32_t FORMAT> constexpr int row_of_place(int place) {
    return row_of_field(FORMAT, place / num_fields(FORMAT), place % num_fields(FORMAT));
}

// Whole tiles of scales that are fp16 or bfloat16 by themselves: a register of the transposition
// has two groups.
template <int32_t FORMAT, bool WHOLE>
void decode_plain_strip(const Matrix& m, const uint8_t* base, int64_t unit, int64_t group,
                        int64_t num, float* out) {
    const int64_t units = num_units(m), groups = num_groups(m);
    const bool bfloat = m.scale_format == BF16;
    const __mmask16 mask = first_lanes(num);
    alignas(64) static constexpr uint16_t EVEN_WORDS_FIRST[32] = {
        0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    const __m512i even_words_first = _mm512_load_si512(EVEN_WORDS_FIRST);
    each<rows_per_unit(FORMAT)>([&](auto place) INLINE_LAMBDA {
        constexpr float above = too_much<FORMAT>(place);
        const int64_t at = (unit + row_of_place<FORMAT>(place) * units) * groups + group;
        float* const to = out + place * 2 * LANES;
        const auto decode = [&](const uint8_t* from, bool wide, float times, float* here)
            INLINE_LAMBDA {
                const auto one = [&](int64_t i) INLINE_LAMBDA {
                    return _mm256_maskz_loadu_epi16(mask, from + i * groups * 2);
                };
                const auto load = [&](int i) INLINE_LAMBDA {
                    const uint8_t *lower = from + i * groups * 2, *upper = lower + 8 * groups;
                    if constexpr (WHOLE) return load_pair(lower, upper);
                    return _mm512_inserti64x4(_mm512_castsi256_si512(one(i)), one(i + 4), 1);
                };
                const __m512 factor = _mm512_set1_ps(times);
                const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
                transpose_half(load, [&](int j, __m512i two) INLINE_LAMBDA {
                    __m512 even, odd;
                    if (wide) {
                        even = _mm512_castsi512_ps(_mm512_slli_epi32(two, 16));
                        odd = _mm512_castsi512_ps(_mm512_and_si512(two, upper_half));
                    } else {
                        const __m512i apart = _mm512_permutexvar_epi16(even_words_first, two);
                        even = _mm512_cvtph_ps(_mm512_castsi512_si256(apart));
                        odd = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(apart, 1));
                    }
                    float* const group0 = here + 2 * j * floats_per_group<FORMAT>;
                    _mm512_store_ps(group0, _mm512_mul_ps(even, factor));
                    _mm512_store_ps(group0 + floats_per_group<FORMAT>,
                                    _mm512_mul_ps(odd, factor));
                });
            };
        if (bfloat) decode(base + m.scale + at * 2, true, 1 / above, to);
        else decode(base + m.scale + at * 2, false, 1 / above, to);
        if (m.zero >= 0) return decode(base + m.zero + at * 2, false, above, to + LANES);
        for (int64_t g = 0; g < STRIP; ++g)
            _mm512_store_ps(to + LANES + g * floats_per_group<FORMAT>,
                            _mm512_set1_ps(middle(FORMAT) * above));
    });
}

// By what 16 units' scales and zeros of 8 bits are decoded, of the meta group that each is in.
struct MetaLanes {
    __m512 scale, scale_zero, zero_scale, zero_zero;

    // Of the meta groups `index`.
    void load(const Matrix& m, const uint8_t* base, const int64_t* index) {
        const auto gather = [&](int64_t from) {
            alignas(32) uint16_t values[LANES];
            for (int64_t i = 0; i < LANES; ++i) memcpy(values + i, base + from + index[i] * 2, 2);
            return _mm256_load_si256(reinterpret_cast<const __m256i*>(values));
        };
        const __m256i scales = gather(m.scale_scale);
        scale = m.scale_format == BF16
                    ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(scales), 16))
                    : _mm512_cvtph_ps(scales);
        scale_zero = _mm512_cvtph_ps(gather(m.scale_zero));
        zero_scale = _mm512_cvtph_ps(gather(m.zero_scale));
        zero_zero = _mm512_cvtph_ps(gather(m.zero_zero));
    }
};

// The meta groups of a strip's units, kept from strip to strip while they stay the same.
template <int32_t FORMAT> struct StripMetas {
    static constexpr int64_t META = 128;
    struct Place {
        MetaLanes here, next;
        __m512i within; // places of the strip's first elements in their meta groups
    } places[rows_per_unit(FORMAT)];
    bool crossing; // some units' groups in the strip are of two meta groups
    int64_t known = -1;

    void load(const Matrix& m, const uint8_t* base, int64_t unit, int64_t group) {
        const int64_t groups = num_groups(m), last = (m.rows * groups - 1) / META;
        crossing = groups % META && META % groups;
        const int64_t key = crossing ? group : group / META;
        if (known == key) return;
        known = key;
        for (int p = 0; p < rows_per_unit(FORMAT); ++p) {
            int64_t here[LANES], next[LANES];
            alignas(64) int32_t within[LANES];
            for (int64_t i = 0; i < LANES; ++i) {
                const int64_t row = unit + i + row_of_place<FORMAT>(p) * num_units(m);
                const int64_t at = row * groups + group;
                here[i] = at / META;
                next[i] = std::min(here[i] + 1, last);
                within[i] = static_cast<int32_t>(at % META);
            }
            places[p].here.load(m, base, here);
            if (crossing) places[p].next.load(m, base, next);
            places[p].within = _mm512_load_si512(within);
        }
    }
};

// Whole tiles of scales and zeros of 8 bits: a register of the transposition has four groups.
template <int32_t FORMAT, bool CROSSING>
void decode_meta_strip(const Matrix& m, const uint8_t* base, int64_t unit, int64_t group,
                       int64_t num, const StripMetas<FORMAT>& metas, float* out) {
    const int64_t units = num_units(m), groups = num_groups(m);
    const __mmask16 mask = first_lanes(num);
    for (int place = 0; place < rows_per_unit(FORMAT); ++place) {
        const int64_t at = (unit + row_of_place<FORMAT>(place) * units) * groups + group;
        float* const to = out + place * 2 * LANES;
        const auto& meta = metas.places[place];
        const float above = too_much<FORMAT>(place);
        const __m512 times = _mm512_set1_ps(1 / above), back = _mm512_set1_ps(above);
        const auto bytes = [&](int64_t from, int64_t i) INLINE_LAMBDA {
            return _mm_maskz_loadu_epi8(mask, base + from + at + i * groups);
        };
        const auto load = [&](int i) INLINE_LAMBDA {
            __m512i all = _mm512_castsi128_si512(bytes(m.scale, i));
            all = _mm512_inserti32x4(all, bytes(m.zero, i), 1);
            all = _mm512_inserti32x4(all, bytes(m.scale, i + 4), 2);
            return _mm512_inserti32x4(all, bytes(m.zero, i + 4), 3);
        };
        transpose_half(load, [&](auto j, __m512i four) INLINE_LAMBDA {
            constexpr bool ZERO = j >= 4;
            const __m512 power = ZERO ? back : times;
            const auto& here = meta.here;
            const __m512 factor = _mm512_mul_ps(ZERO ? here.zero_scale : here.scale, power);
            const __m512 offset = ZERO ? here.zero_zero : here.scale_zero;
            each<4>([&](auto b) INLINE_LAMBDA {
                constexpr int g = j % 4 * 4 + b;
                const __m512i byte =
                    _mm512_and_si512(_mm512_srli_epi32(four, 8 * b), _mm512_set1_epi32(255));
                __m512 times_here = factor, offset_here = offset;
                if constexpr (CROSSING) {
                    const auto beyond = _mm512_cmpgt_epi32_mask(
                        meta.within, _mm512_set1_epi32(StripMetas<FORMAT>::META - 1 - g));
                    const auto& next = meta.next;
                    times_here = _mm512_mask_mul_ps(
                        factor, beyond, ZERO ? next.zero_scale : next.scale, power);
                    offset_here = _mm512_mask_mov_ps(
                        offset, beyond, ZERO ? next.zero_zero : next.scale_zero);
                }
                const __m512 value = _mm512_sub_ps(_mm512_cvtepi32_ps(byte), offset_here);
                _mm512_store_ps(to + g * floats_per_group<FORMAT> + ZERO * LANES,
                                _mm512_mul_ps(value, times_here));
            });
        });
    }
}

// Whole tiles of MXFP4 and NVFP4.
template <int32_t FORMAT>
void decode_byte_strip(const Matrix& m, const uint8_t* base, int64_t unit, int64_t group,
                       int64_t num, float* out) {
    const int64_t units = num_units(m), groups = num_groups(m);
    const __mmask16 mask = first_lanes(num);
    for (int place = 0; place < 2; ++place) {
        const uint8_t* from = base + m.scale + (unit + place * units) * groups + group;
        float* const to = out + place * 2 * LANES;
        // Half, since the tiles have twice the values.
        __m512 times = _mm512_set1_ps(0.5f);
        if (FORMAT == NVFP4)
            times = _mm512_mul_ps(
                times, _mm512_loadu_ps(base + m.scale_scale + (unit + place * units) * 4));
        const auto load = [&](int i) INLINE_LAMBDA {
            const auto bytes = [&](int64_t at) INLINE_LAMBDA {
                return _mm_maskz_loadu_epi8(mask, from + at * groups);
            };
            return _mm512_inserti32x4(_mm512_zextsi128_si512(bytes(i)), bytes(i + 4), 2);
        };
        transpose_half(load, [&](auto j, __m512i four) INLINE_LAMBDA {
            if constexpr (j < 4)
                each<4>([&](auto b) INLINE_LAMBDA {
                    const __m512i byte =
                        _mm512_and_si512(_mm512_srli_epi32(four, 8 * b), _mm512_set1_epi32(255));
                    const __m512 scale = FORMAT == NVFP4 ? decode_e4m3(byte) : decode_e8m0(byte);
                    float* const here = to + (j * 4 + b) * floats_per_group<FORMAT>;
                    _mm512_store_ps(here, _mm512_mul_ps(scale, times));
                    _mm512_store_ps(here + LANES, _mm512_set1_ps(E2M1_ZERO));
                });
        });
        // What is not there counts nothing.
        for (int64_t g = num; g < STRIP; ++g)
            _mm512_store_ps(to + g * floats_per_group<FORMAT>, _mm512_setzero_ps());
    }
}

// Those of `count` units from `unit` on, `num` groups from `group` on; others are 0.
template <int32_t FORMAT>
void decode_strip(const Matrix& m, const uint8_t* base, int64_t unit, int64_t count, int64_t group,
                  int64_t num, StripMetas<FORMAT>& metas, float* out) {
    if (count == LANES) {
        if constexpr (is_e2m1(FORMAT))
            return decode_byte_strip<FORMAT>(m, base, unit, group, num, out);
        else if (m.meta_group_size) {
            metas.load(m, base, unit, group);
            const auto decode = metas.crossing ? decode_meta_strip<FORMAT, true>
                                               : decode_meta_strip<FORMAT, false>;
            return decode(m, base, unit, group, num, metas, out);
        } else {
            const auto decode = num == STRIP ? decode_plain_strip<FORMAT, true>
                                             : decode_plain_strip<FORMAT, false>;
            return decode(m, base, unit, group, num, out);
        }
    }
    const int64_t units = num_units(m);
    alignas(64) float scales[LANES][STRIP], zeros[LANES][STRIP];
    for (int place = 0; place < rows_per_unit(FORMAT); ++place) {
        const float above = too_much<FORMAT>(place);
        memset(scales, 0, sizeof scales);
        memset(zeros, 0, sizeof zeros);
        for (int64_t i = 0; i < count; ++i)
            generic::decode_groups(m, base, unit + i + row_of_place<FORMAT>(place) * units, group,
                                   num, scales[i], zeros[i]);
        float* to = out + place * 2 * LANES;
        const float times = is_e2m1(FORMAT) ? 0.5f : 1 / above;
        transpose(reinterpret_cast<const uint8_t*>(scales), sizeof *scales,
                  [&](int g, __m512i value) INLINE_LAMBDA {
                      const __m512 scale =
                          _mm512_mul_ps(_mm512_castsi512_ps(value), _mm512_set1_ps(times));
                      _mm512_store_ps(to + g * floats_per_group<FORMAT>, scale);
                  });
        transpose(reinterpret_cast<const uint8_t*>(zeros), sizeof *zeros,
                  [&](int g, __m512i value) INLINE_LAMBDA {
                      __m512 zero =
                          _mm512_mul_ps(_mm512_castsi512_ps(value), _mm512_set1_ps(above));
                      if (is_e2m1(FORMAT)) zero = _mm512_set1_ps(E2M1_ZERO);
                      _mm512_store_ps(to + g * floats_per_group<FORMAT> + LANES, zero);
                  });
    }
}

} // namespace
