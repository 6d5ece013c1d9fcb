// Every operation in plain C++, over loops that the compiler vectorizes for the instruction set
// of the file that includes this: of a few rows of the matrix, weights are decoded to float32, a
// block of columns at a time, and multiplied by all rows of activations.
#pragma once

#include <algorithm>
#include <cmath>

#include "e4m3_rows.h"
#include "values.h"
#include "variant.h"

namespace {
namespace generic {

constexpr int64_t BLOCK = 256; // columns decoded at a time: 8 rows of it stay in the L1 cache

constexpr float E2M1[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

// Scale and zero of groups [group, group + count) of a row.
inline void decode_groups(const Matrix& m, const uint8_t* base, int64_t row, int64_t group,
                          int64_t count, float* scale, float* zero) {
    const int64_t groups = (m.columns + m.group_size - 1) / m.group_size;
    const int64_t first = row * groups + group;
    const uint8_t* const bytes = base + m.scale + first;
    if (m.format >= MXFP4) {
        for (int64_t i = 0; i < count; ++i) zero[i] = 0;
        if (m.format == FP8) {
            const int64_t block = row / m.group_rows * groups + group;
            memcpy(scale, base + m.scale + block * 4, count * sizeof(float));
        } else if (m.format == NVFP4) {
            float own;
            memcpy(&own, base + m.scale_scale + row * 4, sizeof own);
            for (int64_t i = 0; i < count; ++i) scale[i] = from_e4m3(bytes[i]) * own;
        } else {
            for (int64_t i = 0; i < count; ++i) scale[i] = from_e8m0(bytes[i]);
        }
    } else if (!m.meta_group_size) {
        widen(base + m.scale + first * 2, m.scale_format, count, scale);
        if (m.zero >= 0) widen(base + m.zero + first * 2, F16, count, zero);
        else
            for (int64_t i = 0; i < count; ++i) zero[i] = middle(m.format);
    } else {
        const auto decode = [&](int64_t q, int64_t scales, int64_t zeros, int32_t format,
                                float* out) {
            for (int64_t i = 0; i < count;) {
                const int64_t group = (first + i) / m.meta_group_size;
                const int64_t end = std::min(count, (group + 1) * m.meta_group_size - first);
                uint16_t s, z;
                memcpy(&s, base + scales + group * 2, 2);
                memcpy(&z, base + zeros + group * 2, 2);
                const float scale_here = format == BF16 ? from_bf16(s) : from_f16(s);
                const float zero_here = from_f16(z);
                for (; i < end; ++i)
                    out[i] = (static_cast<float>(base[q + first + i]) - zero_here) * scale_here;
            }
        };
        decode(m.scale, m.scale_scale, m.scale_zero, m.scale_format, scale);
        decode(m.zero, m.zero_scale, m.zero_zero, F16, zero);
    }
}

// The integers of row `k` of a unit, `count` of them.
inline void decode_integers(const Matrix& m, const uint8_t* q, int64_t unit, int64_t k,
                            int64_t column, int64_t count, float* out) {
    const uint8_t* low = q + unit * m.columns + column;
    if (m.format == HQQ8) {
        for (int64_t i = 0; i < count; ++i) out[i] = low[i];
    } else if (m.format == HQQ4) {
        const int shift = k ? 0 : 4;
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(low[i] >> shift & 15);
    } else if (is_e4m3(m.format)) {
        for (int64_t i = 0; i < count; ++i) out[i] = from_e4m3(low[i]);
    } else if (is_e2m1(m.format)) {
        const int shift = k ? 0 : 4;
        for (int64_t i = 0; i < count; ++i) out[i] = E2M1[low[i] >> shift & 15];
    } else if (m.format == HQQ2) {
        const int shift = static_cast<int>(6 - 2 * k);
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(low[i] >> shift & 3);
    } else {
        // Low bits of every second row lie half a low plane further; the high plane follows.
        low += (k % 2) * (m.rows / 8) * m.columns;
        const uint8_t* high = q + (m.rows / 4 + unit) * m.columns + column;
        const int shift = static_cast<int>(6 - k / 2 * 2), bit = static_cast<int>(7 - k);
        for (int64_t i = 0; i < count; ++i)
            out[i] = static_cast<float>((low[i] >> shift & 3) | (high[i] >> bit & 1) << 2);
    }
}

// Weights [column, column + count) of row `k` of a unit, count <= BLOCK, as the reference
// computes them in float32. `column` is a multiple of BLOCK.
inline void decode(const Matrix& m, const uint8_t* base, int64_t unit, int64_t k, int64_t column,
                   int64_t count, float* out) {
    const int64_t row = unit + k * num_units(m);
    if (m.format <= F32) {
        const int64_t size = m.format == F32 ? 4 : 2;
        widen(base + m.weight + (row * m.columns + column) * size, m.format, count, out);
        return;
    }
    float scale[BLOCK / 16 + 1], zero[BLOCK / 16 + 1];
    const int64_t g = m.group_size, first = column / g;
    decode_groups(m, base, row, first, (column + count - 1) / g - first + 1, scale, zero);
    decode_integers(m, base + m.weight, unit, k, column, count, out);
    for (int64_t i = 0; i < count;) {
        const int64_t group = (column + i) / g;
        const float s = scale[group - first], z = zero[group - first];
        const int64_t end = std::min(count, (group + 1) * g - column);
        for (; i < end; ++i) out[i] = (out[i] - z) * s;
    }
}

inline int64_t prepared_bytes(const Matrix& m, Form) {
    return round_up(m.columns, BLOCK) * static_cast<int64_t>(sizeof(float));
}

inline void prepare(const Matrix& m, const float* row, int32_t, Form form, uint8_t* prepared) {
    auto* out = reinterpret_cast<float*>(prepared);
    memcpy(out, row, m.columns * sizeof(float));
    memset(out + m.columns, 0, prepared_bytes(m, form) - m.columns * sizeof(float));
}

// Adds decoded weights of plain::AT_ONCE rows times N rows of activations and more to their sums.
template <int N>
INLINE void add_block(const float (*weights)[BLOCK], const uint8_t* const* prepared,
                      int64_t num_rows, int64_t column, int64_t count,
                      plain::Lanes (*sums)[plain::AT_ONCE]) {
    using Way = plain::ByFloats<F32>;
    constexpr int AT_ONCE = plain::AT_ONCE;
    const uint8_t* from[AT_ONCE];
    for (int i = 0; i < AT_ONCE; ++i) from[i] = reinterpret_cast<const uint8_t*>(weights[i]);
    plain::Prefetch none = {nullptr, nullptr, 0};
    for (; num_rows >= N; num_rows -= N, prepared += N, sums += N) {
        const uint8_t* rows[N];
        for (int n = 0; n < N; ++n) rows[n] = prepared[n] + column * sizeof(float);
        plain::Lanes here[N][AT_ONCE];
        each<N * AT_ONCE>([&](auto i) INLINE_LAMBDA {
            here[i / AT_ONCE][i % AT_ONCE] = sums[i / AT_ONCE][i % AT_ONCE];
        });
        plain::add_columns<Way, N>(from, rows, count, none, here);
        each<N * AT_ONCE>([&](auto i) INLINE_LAMBDA {
            sums[i / AT_ONCE][i % AT_ONCE] = here[i / AT_ONCE][i % AT_ONCE];
        });
    }
    if constexpr (N > 1)
        if (num_rows) add_block<N - 1>(weights, prepared, num_rows, column, count, sums);
}

void multiply(const Matrix& m, const uint8_t* base, int64_t first, int64_t last,
              const uint8_t* const* prepared, float* const* results, int64_t num_rows, int32_t,
              Form) {
    if (is_e4m3(m.format))
        return plain::multiply_e4m3<plain::E4m3ByFloats>(m, base, first, last, prepared, results,
                                                         num_rows);
    if (m.format <= F32)
        return plain::multiply(m, base, first, last, prepared, results, num_rows);
    constexpr int AT_ONCE = plain::AT_ONCE;
    const int64_t per_unit = rows_per_unit(m.format), total = (last - first) * per_unit;
    for (int64_t at = 0; at < total; at += AT_ONCE) {
        const int count = static_cast<int>(std::min<int64_t>(AT_ONCE, total - at));
        plain::Lanes sums[ROWS_AT_ONCE][AT_ONCE];
        memset(sums, 0, num_rows * sizeof sums[0]);
        alignas(64) float weights[AT_ONCE][BLOCK] = {};
        for (int64_t column = 0; column < m.columns; column += BLOCK) {
            const int64_t columns = std::min(BLOCK, m.columns - column);
            for (int i = 0; i < count; ++i)
                decode(m, base, first + (at + i) / per_unit, (at + i) % per_unit, column, columns,
                       weights[i]);
            add_block<plain::MOST_ROWS>(weights, prepared, num_rows, column, columns, sums);
        }
        for (int64_t n = 0; n < num_rows; ++n) {
            float finished[AT_ONCE];
            plain::ByFloats<F32>::finish(sums[n], finished);
            for (int i = 0; i < count; ++i)
                results[n][first + (at + i) / per_unit + (at + i) % per_unit * num_units(m)] =
                    finished[i];
        }
    }
}

void dequantize(const Matrix& m, const uint8_t* base, int64_t first, int64_t last, uint8_t* out,
                int64_t stride, int32_t type) {
    const int64_t size = type == F32 ? 4 : 2;
    for (int64_t k = 0; k < rows_per_unit(m.format); ++k) {
        uint8_t* bytes = out + k * stride;
        for (int64_t unit = first; unit < last; ++unit)
            for (int64_t column = 0; column < m.columns; column += BLOCK) {
                const int64_t count = std::min(BLOCK, m.columns - column);
                float weights[BLOCK];
                decode(m, base, unit, k, column, count, weights);
                narrow(weights, count, type, bytes);
                bytes += count * size;
            }
    }
}

// exp to within 2 units in the last place; the polynomial is the one of Cephes' expf
// (S. Moshier), which compilers can turn into vector code.
inline float exponential(float x) {
    const float clamped = x < -87.3f ? -87.3f : x > 88.7f ? 88.7f : x;
    const float shifted = clamped * 1.44269504f + 12582912.0f; // 1.5 * 2^23: rounds to nearest
    const float n = shifted - 12582912.0f;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // In two factors, since 2^128 is no float. A NaN goes its way through p.
    const int32_t power = static_cast<int32_t>(to_bits(shifted)) - 0x4b400000;
    const int32_t half = power >> 1;
    const float result = p * from_bits(static_cast<uint32_t>(half + 127) << 23) *
                         from_bits(static_cast<uint32_t>(power - half + 127) << 23);
    return x < -87.3f ? 0.0f : x > 88.7f ? from_bits(0x7f800000) : result;
}

template <int32_t TYPE> inline void silu(const float* gate, const float* up, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        const float activated = gate[i] / (1.0f + exponential(-gate[i]));
        out[i] = round_to(round_to(activated, TYPE) * up[i], TYPE);
    }
}

template <int32_t TYPE>
inline void gpt_oss(const Activation& a, const float* gate, const float* up, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        // Written so that NaN stays: a comparison with it is false.
        const float g = gate[i] > a.limit ? a.limit : gate[i];
        const float below = up[i] > a.limit ? a.limit : up[i];
        const float u = below < -a.limit ? -a.limit : below;
        const float scaled = round_to(g * a.alpha, TYPE);
        const float sigmoid = round_to(1.0f / (1.0f + exponential(-scaled)), TYPE);
        const float glu = round_to(g * sigmoid, TYPE);
        out[i] = round_to(round_to(u + 1.0f, TYPE) * glu, TYPE);
    }
}

// Of up alone, `gate` being where it is.
template <int32_t TYPE> inline void relu2(const float* gate, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        const float above = gate[i] < 0 ? 0.0f : gate[i];
        out[i] = round_to(above * above, TYPE);
    }
}

template <int32_t TYPE>
inline void activate_as(const Activation& a, const float* gate, const float* up, int64_t n,
                        float* out) {
    if (a.kind == SILU) return silu<TYPE>(gate, up, n, out);
    if (a.kind == GPT_OSS) return gpt_oss<TYPE>(a, gate, up, n, out);
    if (a.kind == RELU2) return relu2<TYPE>(gate, n, out);
    for (int64_t i = 0; i < n; ++i) {
        const float g = gate[i];
        float activated;
        if (a.kind == RELU) activated = g < 0 ? 0.0f : g;
        else if (a.kind == GELU) activated = g * 0.5f * (1.0f + std::erf(g * 0.70710678118f));
        else
            activated = 0.5f * g *
                        (1.0f + std::tanh(0.7978845608f * (g + 0.044715f * g * g * g)));
        out[i] = round_to(round_to(activated, TYPE) * up[i], TYPE);
    }
}

void activate(const Activation& a, const float* gate, const float* up, int64_t n, int32_t type,
              float* out) {
    if (type == BF16) activate_as<BF16>(a, gate, up, n, out);
    else if (type == F16) activate_as<F16>(a, gate, up, n, out);
    else activate_as<F32>(a, gate, up, n, out);
}

} // namespace generic
} // namespace
