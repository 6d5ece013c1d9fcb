#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <mutex>
#include <new>

namespace {

// How long a thread looks for work before it sleeps. Between two layers of a token pass 50 to
// 200 us. It yields meanwhile: another worker that wants the core has it at once.
constexpr int PAUSES = 64;
constexpr int YIELDS = 200;

constexpr int64_t INDEX_BITS = 32;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// A number that changes, and threads that wait for it to.
struct Signal {
    std::atomic<uint32_t> value{0};
    std::atomic<uint32_t> sleepers{0};

    void raise() {
        value.fetch_add(1);
        if (sleepers.load())
            syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }

    // Returns once it is no longer `seen`, or now and then for nothing.
    void wait(uint32_t seen) {
        for (int i = 0; i < PAUSES; ++i) {
            if (value.load() != seen) return;
            relax();
        }
        for (int i = 0; i < YIELDS; ++i) {
            if (value.load() != seen) return;
            sched_yield();
        }
        sleepers.fetch_add(1);
        // The kernel looks at the value again, so a raise in between is not lost.
        syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        sleepers.fetch_sub(1);
    }
};

struct Pool {
    std::mutex callers;
    Signal started;
    Signal progress;
    // Number of the job, and in the low half that of the next task. Whoever takes a task knows
    // by it that the job is still there: the caller does not return before the task is done.
    std::atomic<uint64_t> next{0};
    std::atomic<int64_t> num_tasks{0};
    std::atomic<int64_t> done{0};
    std::atomic<Job*> job{nullptr};
    std::atomic<int32_t> threads{0};
    int32_t num_workers = 0;
    uint8_t* scratch = nullptr;
    int64_t scratch_bytes = 0;
};

// Never freed: its threads may look at it until the process is gone.
Pool* pool = nullptr;
std::once_flag once;

void make_pool() { pool = new Pool; }

// The parent's threads are not in the child, and what they held would be held for ever.
void after_fork() { make_pool(); }

Pool& the_pool() {
    std::call_once(once, [] {
        make_pool();
        pthread_atfork(nullptr, nullptr, after_fork);
    });
    return *pool;
}

// Takes a task of job `number`; -1 if there is none left, or the job is over.
int64_t take(Pool& pool, uint32_t number) {
    uint64_t ticket = pool.next.load();
    for (;;) {
        const int64_t task = static_cast<uint32_t>(ticket);
        if (static_cast<uint32_t>(ticket >> INDEX_BITS) != number) return -1;
        if (task >= pool.num_tasks.load()) return -1;
        if (pool.next.compare_exchange_weak(ticket, ticket + 1)) return task;
    }
}

void work(Pool& pool, uint32_t number, int32_t thread) noexcept {
    for (;;) {
        const int64_t task = take(pool, number);
        if (task < 0) return;
        Job& job = *pool.job.load();
        const int64_t needed = job.barrier(task);
        while (pool.done.load() < needed) {
            const uint32_t seen = pool.progress.value.load();
            if (pool.done.load() >= needed) break;
            pool.progress.wait(seen);
        }
        job.run(task, thread);
        pool.done.fetch_add(1);
        pool.progress.raise();
    }
}

struct Worker {
    Pool* pool;
    int32_t number;
};

void* worker_main(void* argument) {
    const Worker worker = *static_cast<Worker*>(argument);
    delete static_cast<Worker*>(argument);
    Pool& pool = *worker.pool;
    uint32_t seen = 0;
    for (;;) {
        const uint32_t now = pool.started.value.load();
        if (now == seen) {
            pool.started.wait(seen);
            continue;
        }
        seen = now;
        if (worker.number < pool.threads.load()) work(pool, now, worker.number);
    }
}

void start_workers(Pool& pool, int32_t wanted) {
    // Signals are for the threads of Python.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.num_workers < wanted) {
        pthread_t thread;
        auto* worker = new (std::nothrow) Worker{&pool, pool.num_workers + 1};
        if (!worker || pthread_create(&thread, nullptr, worker_main, worker)) {
            delete worker;
            break; // fewer threads give the same result
        }
        pthread_setname_np(thread, "expertd-kernel");
        pthread_detach(thread);
        ++pool.num_workers;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

} // namespace

PoolLock::PoolLock() { the_pool().callers.lock(); }
PoolLock::~PoolLock() { pool->callers.unlock(); }

void run_job(Job& job, int64_t num_tasks, int32_t threads) {
    Pool& pool = the_pool();
    if (threads > 1) start_workers(pool, threads - 1);
    const uint32_t number = pool.started.value.load() + 1;
    const uint64_t ticket = static_cast<uint64_t>(number) << INDEX_BITS;
    // First of all no ticket of the job before is good any more: a thread that is late would
    // take one of ours for its own.
    pool.next.store(ticket | UINT32_MAX);
    pool.job.store(&job);
    pool.done.store(0);
    pool.num_tasks.store(num_tasks);
    pool.threads.store(threads);
    pool.next.store(ticket);
    if (threads > 1) pool.started.raise();
    else pool.started.value.store(number);
    work(pool, number, 0);
    while (pool.done.load() < num_tasks) {
        const uint32_t seen = pool.progress.value.load();
        if (pool.done.load() >= num_tasks) break;
        pool.progress.wait(seen);
    }
}

uint8_t* pool_scratch(int64_t num_bytes) {
    Pool& pool = the_pool();
    if (num_bytes > pool.scratch_bytes) {
        free(pool.scratch);
        pool.scratch = nullptr;
        pool.scratch_bytes = 0; // the next, smaller call must not take what is not there
        const int64_t rounded = (num_bytes + 4095) / 4096 * 4096;
        pool.scratch = static_cast<uint8_t*>(aligned_alloc(4096, rounded));
        if (!pool.scratch) throw std::bad_alloc();
        pool.scratch_bytes = rounded;
    }
    return pool.scratch;
}
