// Scales and zeros for products of tiles (avx2_tiles.h): lanes are units.
#pragma once

#include "avx2_tiles.h"

namespace {

constexpr int64_t STRIP = 16; // groups whose scales are decoded at a time

// Scales of a strip: [group][tile][scale, zero][unit].
template <int32_t FORMAT>
constexpr int64_t floats_per_group = rows_per_unit(FORMAT) * 2 * LANES;

// store(g, register) for g in 0 ... 7 of 16 rows of words, `stride` bytes apart: word i of the
// register is word g of row i.
template <class Store>
INLINE void transpose_words(const uint8_t* rows, int64_t stride, const Store& store) {
    __m256i row[8], pairs[8], fours[8];
    each<8>([&](auto i) INLINE_LAMBDA {
        row[i] = load_pair(rows + i * stride, rows + (i + 8) * stride);
    });
    each<4>([&](auto i) INLINE_LAMBDA {
        pairs[i] = _mm256_unpacklo_epi16(row[2 * i], row[2 * i + 1]);
        pairs[4 + i] = _mm256_unpackhi_epi16(row[2 * i], row[2 * i + 1]);
    });
    // Of rows 0 to 3 and 4 to 7: double words are of two rows, and now there are two of them.
    each<4>([&](auto i) INLINE_LAMBDA {
        constexpr int from = i / 2 * 4 + i % 2 * 2;
        fours[i * 2] = _mm256_unpacklo_epi32(pairs[from], pairs[from + 1]);
        fours[i * 2 + 1] = _mm256_unpackhi_epi32(pairs[from], pairs[from + 1]);
    });
    each<4>([&](auto i) INLINE_LAMBDA {
        constexpr int from = i / 2 * 4 + i % 2;
        store(i * 2, _mm256_unpacklo_epi64(fours[from], fours[from + 2]));
        store(i * 2 + 1, _mm256_unpackhi_epi64(fours[from], fours[from + 2]));
    });
}

// 16 rows' elements from `rows` on, `stride` bytes apart, of which `count` rows of `bytes` are there:
// use(rows, stride), of a copy with zeros if need be.
template <int64_t BYTES, class Use>
INLINE void padded(const uint8_t* rows, int64_t stride, int64_t count, int64_t bytes,
                   const Use& use) {
    if (count == LANES && bytes == BYTES) return use(rows, stride);
    alignas(32) uint8_t copy[LANES][BYTES] = {};
    for (int64_t i = 0; i < count; ++i) memcpy(copy[i], rows + i * stride, bytes);
    use(copy[0], BYTES);
}

// Eight groups' scales or zeros that are fp16 or bfloat16, from `to` on.
template <int32_t FORMAT>
INLINE void decode_halves(const uint8_t* rows, int64_t stride, bool bfloat, float* to) {
    transpose_words(rows, stride, [&](int g, __m256i words) INLINE_LAMBDA {
        each<2>([&](auto half) INLINE_LAMBDA {
            const __m128i eight = _mm256_extracti128_si256(words, half);
            const __m256 value =
                bfloat ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16))
                       : _mm256_cvtph_ps(eight);
            _mm256_store_ps(to + g * floats_per_group<FORMAT> + half * 8, value);
        });
    });
}

// Sixteen groups' scales or zeros that decode(g, half, bytes) makes of bytes, from `to` on.
template <int32_t FORMAT, class Decode>
INLINE void decode_bytes(const uint8_t* rows, int64_t stride, float* to, const Decode& decode) {
    transpose_words(rows, stride, [&](int two, __m256i words) INLINE_LAMBDA {
        each<4>([&](auto i) INLINE_LAMBDA {
            constexpr int odd = i / 2, half = i % 2;
            const __m256i bytes =
                odd ? _mm256_srli_epi16(words, 8) : _mm256_and_si256(words, _mm256_set1_epi16(255));
            const __m128i eight = _mm256_extracti128_si256(bytes, half);
            const int g = two * 2 + odd;
            _mm256_store_ps(to + g * floats_per_group<FORMAT> + half * 8,
                            decode(g, half, _mm256_cvtepu16_epi32(eight)));
        });
    });
}

INLINE __m256 decode_e8m0(__m256i exponent) {
    const __m256i none = _mm256_cmpeq_epi32(exponent, _mm256_set1_epi32(255));
    const __m256i least = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    __m256i bits = _mm256_slli_epi32(exponent, 23);
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x00400000), least);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), none));
}

INLINE __m256 decode_e4m3(__m256i codes) {
    const __m256i size = _mm256_and_si256(codes, _mm256_set1_epi32(0x7f));
    const __m256i sign = _mm256_slli_epi32(_mm256_xor_si256(codes, size), 24);
    const __m256i none = _mm256_cmpeq_epi32(size, _mm256_set1_epi32(0x7f));
    const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(size, 20)),
                                       _mm256_set1_ps(0x1p120f));
    const __m256i rest =
        _mm256_or_si256(sign, _mm256_and_si256(none, _mm256_set1_epi32(0x7fc00000)));
    return _mm256_or_ps(value, _mm256_castsi256_ps(rest));
}

// One zero for all groups and units.
template <int32_t FORMAT> void fill_zeros(float zero, float* out) {
    for (int64_t i = 0; i < STRIP * 2; ++i)
        _mm256_store_ps(out + i / 2 * floats_per_group<FORMAT> + LANES + i % 2 * 8,
                        _mm256_set1_ps(zero));
}

// By what 16 units' scales or zeros of 8 bits are decoded, of the meta group that each is in.
struct MetaLanes {
    alignas(32) float factor[LANES], offset[LANES];

    // Of the meta groups `index`.
    void load(const uint8_t* base, int64_t factors, bool bfloat, int64_t offsets,
              const int64_t* index) {
        uint16_t values[LANES], zeros[LANES];
        for (int64_t i = 0; i < LANES; ++i) {
            memcpy(values + i, base + factors + index[i] * 2, 2);
            memcpy(zeros + i, base + offsets + index[i] * 2, 2);
        }
        for (int64_t i = 0; i < LANES; ++i) {
            factor[i] = bfloat ? from_bf16(values[i]) : from_f16(values[i]);
            offset[i] = from_f16(zeros[i]);
        }
    }
};

// The meta groups of a strip's units, kept from strip to strip while they stay the same.
template <int32_t FORMAT> struct StripMetas {
    static constexpr int64_t META = 128;
    struct Place {
        MetaLanes scales, zeros, next_scales, next_zeros;
        alignas(32) int32_t within[LANES]; // of a unit's first element in its meta group
    } places[rows_per_unit(FORMAT)];
    bool crossing; // some units' groups in the strip are of two meta groups
    int64_t known = -1;

    void load(const Matrix& m, const uint8_t* base, int64_t unit, int64_t count, int64_t group) {
        const int64_t groups = num_groups(m), last = (m.rows * groups - 1) / META;
        crossing = groups % META && META % groups;
        const int64_t key = crossing ? group : group / META;
        if (known == key) return;
        known = key;
        const bool bfloat = m.scale_format == BF16;
        for (int p = 0; p < rows_per_unit(FORMAT); ++p) {
            Place& place = places[p];
            int64_t here[LANES], next[LANES];
            for (int64_t i = 0; i < LANES; ++i) {
                const int64_t row = unit + std::min(i, count - 1) + p * num_units(m);
                const int64_t at = row * groups + group;
                here[i] = at / META;
                next[i] = std::min(here[i] + 1, last);
                place.within[i] = static_cast<int32_t>(at % META);
            }
            place.scales.load(base, m.scale_scale, bfloat, m.scale_zero, here);
            place.zeros.load(base, m.zero_scale, false, m.zero_zero, here);
            if (!crossing) continue;
            place.next_scales.load(base, m.scale_scale, bfloat, m.scale_zero, next);
            place.next_zeros.load(base, m.zero_scale, false, m.zero_zero, next);
        }
    }

    // A decode for decode_bytes.
    template <bool CROSSING>
    static INLINE auto decode_with(const MetaLanes& here, const MetaLanes& next,
                                   const int32_t* within) {
        return [&here, &next, within](int g, int half, __m256i bytes) INLINE_LAMBDA {
            __m256 factor = _mm256_load_ps(here.factor + half * 8);
            __m256 offset = _mm256_load_ps(here.offset + half * 8);
            if constexpr (CROSSING) {
                const __m256i place =
                    _mm256_load_si256(reinterpret_cast<const __m256i*>(within + half * 8));
                const __m256 beyond = _mm256_castsi256_ps(
                    _mm256_cmpgt_epi32(place, _mm256_set1_epi32(static_cast<int>(META) - 1 - g)));
                factor = _mm256_blendv_ps(factor, _mm256_load_ps(next.factor + half * 8), beyond);
                offset = _mm256_blendv_ps(offset, _mm256_load_ps(next.offset + half * 8), beyond);
            }
            return _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(bytes), offset), factor);
        };
    }
};

// Those of `num` groups of one row of each of `count` units, from element `at` on.
template <int32_t FORMAT>
INLINE void decode_halves(const Matrix& m, const uint8_t* base, int64_t at, int64_t count,
                          int64_t num, float* out) {
    const int64_t stride = num_groups(m) * 2;
    const auto decode = [&](int64_t from, bool bfloat, float* to) INLINE_LAMBDA {
        padded<STRIP * 2>(base + from + at * 2, stride, count, num * 2,
                          [&](const uint8_t* rows, int64_t apart) INLINE_LAMBDA {
            decode_halves<FORMAT>(rows, apart, bfloat, to);
            decode_halves<FORMAT>(rows + 16, apart, bfloat, to + 8 * floats_per_group<FORMAT>);
        });
    };
    if (m.scale_format == BF16) decode(m.scale, true, out);
    else decode(m.scale, false, out);
    if (m.zero >= 0) return decode(m.zero, false, out + LANES);
    fill_zeros<FORMAT>(middle(FORMAT), out);
}

// The same of scales of 8 bits.
template <int32_t FORMAT, bool CROSSING>
void decode_metas(const Matrix& m, const uint8_t* base, int64_t at, int64_t count, int64_t num,
                  const typename StripMetas<FORMAT>::Place& place, float* out) {
    const auto decode = [&](int64_t from, const MetaLanes& here, const MetaLanes& next, float* to)
        INLINE_LAMBDA {
            padded<STRIP>(base + from + at, num_groups(m), count, num,
                          [&](const uint8_t* rows, int64_t apart) INLINE_LAMBDA {
                decode_bytes<FORMAT>(rows, apart, to,
                                     StripMetas<FORMAT>::template decode_with<CROSSING>(
                                         here, next, place.within));
            });
        };
    decode(m.scale, place.scales, place.next_scales, out);
    decode(m.zero, place.zeros, place.next_zeros, out + LANES);
}

// Of one row of each of `count` units from row `row` on.
template <int32_t FORMAT>
void decode_e2m1(const Matrix& m, const uint8_t* base, int64_t row, int64_t count, int64_t group,
                 int64_t num, float* out) {
    // Half, since the tiles have twice the values.
    alignas(32) float times[LANES];
    std::fill(times, times + LANES, 0.5f);
    if (FORMAT == NVFP4) {
        memcpy(times, base + m.scale_scale + row * 4, count * sizeof(float));
        for (float& each : times) each *= 0.5f;
    }
    const int64_t at = row * num_groups(m) + group;
    padded<STRIP>(base + m.scale + at, num_groups(m), count, num,
                  [&](const uint8_t* rows, int64_t apart) INLINE_LAMBDA {
        decode_bytes<FORMAT>(rows, apart, out, [&](int, int half, __m256i bytes) INLINE_LAMBDA {
            return _mm256_mul_ps(FORMAT == NVFP4 ? decode_e4m3(bytes) : decode_e8m0(bytes),
                                 _mm256_load_ps(times + half * 8));
        });
    });
    fill_zeros<FORMAT>(E2M1_ZERO, out);
}

// Those of `count` units from `unit` on, `num` groups from `group` on. Of others anything finite:
// there activations are 0, and no result is stored.
template <int32_t FORMAT>
void decode_strip(const Matrix& m, const uint8_t* base, int64_t unit, int64_t count, int64_t group,
                  int64_t num, StripMetas<FORMAT>& metas, float* out) {
    if (!is_e2m1(FORMAT) && m.meta_group_size) metas.load(m, base, unit, count, group);
    for (int row = 0; row < rows_per_unit(FORMAT); ++row, out += 2 * LANES) {
        const int64_t own = unit + row * num_units(m), at = own * num_groups(m) + group;
        if constexpr (is_e2m1(FORMAT)) decode_e2m1<FORMAT>(m, base, own, count, group, num, out);
        else if (!m.meta_group_size) decode_halves<FORMAT>(m, base, at, count, num, out);
        else {
            const auto decode =
                metas.crossing ? decode_metas<FORMAT, true> : decode_metas<FORMAT, false>;
            decode(m, base, at, count, num, metas.places[row], out);
        }
    }
}

} // namespace
