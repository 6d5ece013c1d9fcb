#include "delta.h"

#include "pool.h"
#include "steps.h"

namespace {

class DeltaJob final : public Job {
  public:
    explicit DeltaJob(const DeltaCall& call) : call(call), impl(steps()) {}

    int64_t barrier(int64_t) const override { return 0; }

    void run(int64_t task, int32_t) override {
        impl.delta(call, task / call.heads, task % call.heads);
    }

  private:
    const DeltaCall& call;
    const Steps& impl;
};

} // namespace

EXPERTD_STRUCTURE(DeltaCall)

// 0, or 1 without memory.
EXPERTD_API int32_t expertd_delta(const DeltaCall* call) {
    return without_memory([=] {
        PoolLock lock;
        DeltaJob job(*call);
        run_job(job, call->sequences * call->heads, call->threads);
    });
}
