// Half-Quadratic Quantization (Badri & Shaji, 2023), fused: the body that is compiled once for
// each width of vectors. Included by a source that defines LANES.
//
// A lane is a group of weights, and what happens in a lane does not depend on its neighbours. There
// is no fused multiply-add and no library function, so every width gives the same bytes.
//
// With y = w / scale of a group, the method alternates between
//     q    = round(clamp(y + zero))
//     zero = mean(q - y + shrink(error) / scale)
// where shrink keeps what exceeds an lp norm's threshold of 0.17, which usual weights never do. As
// long as nothing does, each of the two steps makes the squared error smaller or leaves it. Each
// group goes on until nothing changes, 20 times at most, and takes the best zero that it met. The
// authors' package stops all groups of a matrix together at one of these same steps: no group
// ends with a larger squared error here.

#include <cstring>
#include <utility>

#include "hqq.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace expertd {
namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

constexpr int kIterations = 20;
constexpr float kMaxInverse = 2e4f;  // hqq's bound on 1 / scale, for fp16
constexpr float kMostInverse = 0x1p100f;  // of scales that are not fp16
constexpr float kLeastNormalHalf = 0x1p-14f, kHalfUnit = 0x1p-24f;  // subnormals are multiples
constexpr float kMaxZero = 65000.0f;  // leaves room below fp16's largest for what is added to it
constexpr float kThreshold = 0.17f;  // below it e - 0.1 e^-0.3 is negative
constexpr float kLittle = 0x1p-7f;
constexpr float kLargest = 32.0f;  // of larger weights all errors would be kept, which is no help
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to even, as torch does

inline Floats all(float value) { return value - (Floats){}; }
inline Floats as_floats(Ints bits) { return (Floats)bits; }
inline Floats choose(Ints mask, Floats yes, Floats no) {
    return as_floats((mask & (Ints)yes) | (~mask & (Ints)no));
}
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats magnitude(Floats a) { return as_floats((Ints)a & 0x7fffffff); }

inline bool any(Ints mask) {
    uint64_t words[LANES / 2], found = 0;
    std::memcpy(words, &mask, sizeof mask);
    for (uint64_t word : words) found |= word;
    return found != 0;
}

// Transposes LANES vectors of LANES values: log2(LANES) rounds of exchanging blocks of size H.
template <int H, typename Vector, size_t... I>
inline void exchange(Vector& a, Vector& b, std::index_sequence<I...>) {
    const Vector first = a;
#if defined(__clang__)
    a = __builtin_shufflevector(first, b, (int(I) & H ? LANES + int(I) - H : int(I))...);
    b = __builtin_shufflevector(first, b, (int(I) & H ? LANES + int(I) : int(I) + H)...);
#else  // which GCC has had for longer
    a = __builtin_shuffle(first, b, Ints{(int(I) & H ? LANES + int(I) - H : int(I))...});
    b = __builtin_shuffle(first, b, Ints{(int(I) & H ? LANES + int(I) : int(I) + H)...});
#endif
}

template <int H, typename Vector>
inline void transpose_from(Vector* block) {
    for (int i = 0; i < LANES; i++) {
        if (!(i & H)) exchange<H>(block[i], block[i + H], std::make_index_sequence<LANES>());
    }
    if constexpr (2 * H < LANES) transpose_from<2 * H>(block);
}

template <int32_t kDtype>
inline Floats load(const void* weight, int64_t index) {
    if constexpr (kDtype == kFp32) {
        Floats values;
        std::memcpy(&values, static_cast<const float*>(weight) + index, sizeof values);
        return values;
    } else {
        Halves halves;
        std::memcpy(&halves, static_cast<const uint16_t*>(weight) + index, sizeof halves);
        const Ints bits = __builtin_convertvector(halves, Ints);
        if constexpr (kDtype == kBf16) return as_floats(bits << 16);
        const Ints digits = (bits & 0x7fff) << 13;
        const Floats special = as_floats(digits | 0x7f800000);  // inf and NaN
        const Floats finite = as_floats(digits) * 0x1p112f;     // subnormals too
        const Floats value = choose(digits >= (0x7c00 << 13), special, finite);
        return as_floats((Ints)value | ((bits & 0x8000) << 16));
    }
}

// The groups first ... first + num_groups of a row, a group to a lane; lanes that are left repeat
// the last group.
template <int32_t kDtype>
inline void load_tile(const HqqMatrix& m, int64_t row, int64_t first, int num_groups, Floats* tile) {
    const int64_t start = row * m.in_features + first * m.group_size;
    for (int i = 0; i < m.group_size; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            const int group = lane < num_groups ? lane : num_groups - 1;
            tile[i + lane] = load<kDtype>(m.weight, start + int64_t(group) * m.group_size + i);
        }
        transpose_from<1>(tile + i);
    }
}

// x^-0.3 for x >= 0.1, by Newton's method on y^10 x^3 = 1 from a guess at its exponent.
inline Floats power(Floats x) {
    const Floats bits = __builtin_convertvector((Ints)x, Floats);
    Floats y = as_floats(__builtin_convertvector(1.3f * 1065000000.0f - 0.3f * bits, Ints));
    const Floats cube = x * x * x;
    for (int i = 0; i < 4; i++) {
        const Floats square = y * y, fourth = square * square;
        y = y * (1.1f - 0.1f * (cube * (fourth * fourth * square)));
    }
    return y;
}

// The sum of shrink(error) / scale over each group, where errors may exceed the threshold.
inline Floats shrunk(const Floats* y, int size, Floats zero, Floats inverse, float max_q) {
    Floats sum = {};
    for (int i = 0; i < size; i++) {
        const Floats x = y[i] + zero;
        const Floats q = (smaller(larger(x, all(0)), all(max_q)) + kRounder) - kRounder;
        const Floats error = (x - q) / inverse;
        const Floats size_of = larger(magnitude(error), all(0.1f));
        const Floats kept = larger(size_of - 0.1f * power(size_of), all(0));
        sum += as_floats((Ints)kept | ((Ints)error & (Ints)all(-0.0f))) * inverse;
    }
    return sum;
}

// The best zeros of the groups whose weights over scale are `y`; `inverse` is 1 / scale. Only what
// `shrinks` has errors shrunk.
inline Floats find_zero(const Floats* y, int size, Floats zero, Floats inverse, float max_q,
                        Ints shrinks) {
    Floats best_zero = zero, best_error = all(__builtin_inff());
    const Floats threshold = kThreshold * inverse;
    for (int iteration = 0; iteration <= kIterations; iteration++) {
        Floats sum = {}, error = {}, largest = {};
        for (int i = 0; i < size; i++) {
            const Floats x = y[i] + zero;
            const Floats q = (smaller(larger(x, all(0)), all(max_q)) + kRounder) - kRounder;
            const Floats off = x - q;
            largest = larger(magnitude(off), largest);
            error += off * off;
            sum += q - y[i];
        }
        const Ints better = error < best_error;
        best_error = choose(better, error, best_error);
        best_zero = choose(better, zero, best_zero);
        if (any((largest > threshold) & shrinks)) {
            sum += choose(shrinks, shrunk(y, size, zero, inverse, max_q), all(0));
        }
        const Floats next = sum / float(size);
        if (!any(next != zero)) break;
        zero = next;
    }
    return best_zero;
}

// The next number above a positive scale, of the type that it is stored as. Of fp16 only where it
// is subnormal: above that hqq rounds after it has chosen the integers, and so do we.
inline Floats storable(Floats scale, int scales) {
    if (scales == kScalesBf16) return as_floats(((Ints)scale + 0xffff) & ~0xffff);
    if (scales == kScalesFp32) return scale;
    const Floats units = smaller(scale, all(kLeastNormalHalf)) / kHalfUnit;
    const Floats nearest = (units + kRounder) - kRounder;
    const Floats above = nearest + choose(nearest < units, all(1), all(0));
    return choose(scale < kLeastNormalHalf, larger(above, all(1)) * kHalfUnit, scale);
}

// Quantizes the groups in `tile`, which becomes their integers.
inline void solve(Floats* tile, int size, int bits, bool optimize, int scales, Floats& scale,
                  Floats& zero) {
    Floats low = tile[0], high = tile[0], damage = {};
    for (int i = 0; i < size; i++) {
        low = smaller(tile[i], low);
        high = larger(tile[i], high);
        damage += tile[i] - tile[i];  // NaN where a weight is not finite
    }
    const float max_q = float((1 << bits) - 1);
    const Floats range = high - low;
    const Floats largest = larger(magnitude(low), magnitude(high));
    // As torch divides a number by a tensor, for the same bits. Equal weights have a scale of 1, as
    // hqq's, unless that makes too little of them.
    const Floats of_equal = choose(largest < kLittle, 1.0f / largest, all(1));
    Floats inverse = choose(range > 0, 1.0f / range * max_q, of_equal);
    inverse = smaller(inverse, all(kMostInverse));
    inverse = smaller(inverse, kMaxZero / largest);
    inverse = choose(largest > 0, inverse, all(1));
    const Floats wanted = 1.0f / inverse, stored = storable(wanted, scales);
    inverse = choose(stored != wanted, 1.0f / stored, inverse);
    inverse += damage;
    zero = -low * inverse;
    for (int i = 0; i < size; i++) tile[i] = tile[i] * inverse;
    if (optimize) zero = find_zero(tile, size, zero, inverse, max_q, largest <= kLargest);
    // Of zeros alone the scale is zero as well, which spoils no meta group.
    scale = choose((largest == 0) & (damage == 0), all(0), 1.0f / inverse);
    for (int i = 0; i < size; i++) {
        const Floats x = tile[i] + zero;
        tile[i] = (smaller(larger(x, all(0)), all(max_q)) + kRounder) - kRounder;
    }
}

// Where the bits of a unit's row `k` go in the unit's 1 or, for 3 bits, 3 bytes: in bits 0 to 7
// byte row u, of 3 bits then byte row u + N/8, and the high bits' byte row.
inline Ints placed(Floats q, int bits, int k) {
    const Ints value = __builtin_convertvector(q, Ints);
    if (bits != 3) return value << (8 - bits * (k + 1));
    return ((value & 3) << (6 - 2 * (k / 2) + 8 * (k % 2))) | ((value >> 2) << (16 + 7 - k));
}

template <int32_t kDtype>
void quantize_unit(const HqqMatrix& m, int64_t unit) {
    const int num_rows = rows_of_unit(m.bits);
    const int64_t stride = m.out_features / num_rows;
    const int64_t num_groups = m.in_features / m.group_size;
    const int num_bytes = m.bits == 3 ? 3 : 1;
    Floats tile[kMaxGroupSize];
    Ints packed[kMaxGroupSize];
    for (int64_t first = 0; first < num_groups; first += LANES) {
        const int count = int(num_groups - first < LANES ? num_groups - first : LANES);
        for (int i = 0; i < m.group_size; i++) packed[i] = (Ints){};
        for (int k = 0; k < num_rows; k++) {
            const int64_t row = unit + k * stride;
            Floats scale, zero;
            load_tile<kDtype>(m, row, first, count, tile);
            solve(tile, m.group_size, m.bits, m.optimize, m.scales, scale, zero);
            for (int i = 0; i < m.group_size; i++) packed[i] |= placed(tile[i], m.bits, k);
            const int64_t at = row * num_groups + first;
            std::memcpy(m.scale + at, &scale, count * sizeof(float));
            std::memcpy(m.zero + at, &zero, count * sizeof(float));
        }
        for (int i = 0; i < m.group_size; i += LANES) {
            transpose_from<1>(packed + i);
            for (int lane = 0; lane < count; lane++) {
                for (int byte = 0; byte < num_bytes; byte++) {
                    // 3 bits: the low planes' rows u and u + N/8, then below both the high one's.
                    const int64_t row = unit + byte * (m.out_features / 8);
                    const int64_t at = row * m.in_features + (first + lane) * m.group_size + i;
                    const Bytes bytes =
                        __builtin_convertvector((packed[i + lane] >> (8 * byte)) & 0xff, Bytes);
                    std::memcpy(m.q + at, &bytes, sizeof bytes);
                }
            }
        }
    }
}

inline void quantize_units(const HqqMatrix& m, int64_t begin, int64_t end) {
    const auto quantize = m.dtype == kBf16   ? quantize_unit<kBf16>
                          : m.dtype == kFp16 ? quantize_unit<kFp16>
                                             : quantize_unit<kFp32>;
    for (int64_t unit = begin; unit < end; unit++) quantize(m, unit);
}

}  // namespace
}  // namespace expertd
