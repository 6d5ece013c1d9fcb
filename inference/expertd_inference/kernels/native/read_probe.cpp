// How fast these threads can read memory: the limit beside which bench/kernels.py shows the kernels.

#include <atomic>

#include "expertstore/cpp/isa.h"
#include "kernels.h"
#include "pool.h"

namespace {

typedef uint64_t Line __attribute__((vector_size(64), aligned(1), may_alias));

// Adds up `num_bytes` at `address`, in lines of 64 bytes at `streams` (1, 2 or 4) places at once,
// with a prefetch `ahead` bytes ahead if that is not 0.
inline __attribute__((always_inline)) uint64_t read_lines(const uint8_t* address,
                                                          int64_t num_bytes, int streams,
                                                          int ahead) {
    const int64_t piece = num_bytes / streams / 64 * 64;
    Line sums[4] = {};
    for (int64_t at = 0; at < piece; at += 64)
        for (int stream = 0; stream < streams; ++stream) {
            const uint8_t* place = address + stream * piece + at;
            if (ahead) __builtin_prefetch(place + ahead);
            sums[stream] += *reinterpret_cast<const Line*>(place);
        }
    const Line sum = sums[0] + sums[1] + sums[2] + sums[3];
    uint64_t total = 0;
    for (int lane = 0; lane < 8; ++lane) total += sum[lane];
    return total;
}

inline __attribute__((always_inline)) uint64_t read_form(const uint8_t* address, int64_t num_bytes,
                                                         int streams, int ahead) {
    if (streams == 1) return read_lines(address, num_bytes, 1, ahead);
    if (streams == 2) return read_lines(address, num_bytes, 2, ahead);
    return read_lines(address, num_bytes, 4, ahead);
}

uint64_t read_portable(const uint8_t* address, int64_t num_bytes, int streams, int ahead) {
    return read_form(address, num_bytes, streams, ahead);
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) uint64_t read_wide(const uint8_t* address, int64_t num_bytes,
                                                      int streams, int ahead) {
    return read_form(address, num_bytes, streams, ahead);
}
#endif

class ReadJob final : public Job {
  public:
    static constexpr int64_t TASK_BYTES = 1 << 20;

    ReadJob(const uint8_t* address, int64_t num_bytes, int streams, int ahead)
        : address(address), num_bytes(num_bytes), streams(streams), ahead(ahead) {}

    int64_t num_tasks() const { return (num_bytes + TASK_BYTES - 1) / TASK_BYTES; }
    int64_t barrier(int64_t) const override { return 0; }

    void run(int64_t task, int32_t) override {
        const int64_t left = num_bytes - task * TASK_BYTES;
        total += read(address + task * TASK_BYTES, left < TASK_BYTES ? left : TASK_BYTES, streams,
                      ahead);
    }

    std::atomic<uint64_t> total{0};

  private:
    static uint64_t read(const uint8_t* address, int64_t num_bytes, int streams, int ahead) {
#if defined(__x86_64__)
        if (runs_here(Isa::AVX512))
            return read_wide(address, num_bytes, streams, ahead);
#endif
        return read_portable(address, num_bytes, streams, ahead);
    }

    const uint8_t* address;
    const int64_t num_bytes;
    const int streams, ahead;
};

} // namespace

// Reads it all, and returns a sum of it, so that nothing is optimized away.
EXPERTD_API uint64_t expertd_read_probe(const uint8_t* address, int64_t num_bytes, int32_t streams,
                                        int32_t ahead, int32_t threads) {
    PoolLock lock;
    ReadJob job(address, num_bytes, streams, ahead);
    run_job(job, job.num_tasks(), threads);
    return job.total;
}

EXPERTD_API int32_t expertd_abi() { return EXPERTD_ABI; }
