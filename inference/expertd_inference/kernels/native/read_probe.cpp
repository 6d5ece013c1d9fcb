// How fast this thread can read memory: the limit beside which bench/kernels.py shows the kernels.

#include "kernels.h"

// Adds up `num_bytes` at `address`, in 64-byte words over `streams` (1, 2 or 4) places at once,
// and prefetches `ahead` bytes ahead if that is not 0. Returns the sum, so that nothing is
// optimized away. The best of several forms is what "plain read" means.
EXPERTD_API uint64_t expertd_read_probe(const uint8_t* address, int64_t num_bytes, int32_t streams,
                                        int32_t ahead) {
    typedef uint64_t Line __attribute__((vector_size(64), aligned(1), may_alias));
    const int64_t piece = num_bytes / streams / 64 * 64;
    Line sums[4] = {};
    for (int64_t at = 0; at < piece; at += 64)
        for (int32_t stream = 0; stream < streams; ++stream) {
            const uint8_t* place = address + stream * piece + at;
            if (ahead) __builtin_prefetch(place + ahead);
            sums[stream] += *reinterpret_cast<const Line*>(place);
        }
    Line sum = sums[0] + sums[1] + sums[2] + sums[3];
    uint64_t total = 0;
    for (int lane = 0; lane < 8; ++lane) total += sum[lane];
    return total;
}

EXPERTD_API int32_t expertd_abi() { return EXPERTD_ABI; }
