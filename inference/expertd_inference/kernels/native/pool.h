// Threads of our own, since a call is far shorter than what waking OpenMP's passive ones takes.
#pragma once

#include <cstdint>
#include <exception>

// Work of `num_tasks` tasks, which threads take in rising order.
class Job {
  public:
    // `thread` is below the job's number of threads, and no other task has it at the time: what a
    // task needs for itself is laid out by it before the job begins. Tasks allocate nothing.
    virtual void run(int64_t task, int32_t thread) = 0;

    // Before a task of the returned number or above is run, all below it must be done.
    // `task` is the one that is to run next.
    virtual int64_t barrier(int64_t task) const = 0;

  protected:
    ~Job() = default;
};

// Runs `job` on at most `threads` threads, the caller among them, and returns when it is done.
// One job runs at a time; a second caller waits. Works again in a forked child. No task may throw.
void run_job(Job& job, int64_t num_tasks, int32_t threads);

// Memory that lives as long as the pool's current job: at least `num_bytes`, 64-byte aligned.
// Only while `PoolLock` is held.
uint8_t* pool_scratch(int64_t num_bytes);

// What an exported function answers: 0, or 1 if memory ran out in `call`.
template <typename Call> int32_t without_memory(Call call) {
    try {
        call();
        return 0;
    } catch (const std::exception&) { // bad_alloc, or length_error of what no memory holds
        return 1;
    }
}

class PoolLock {
  public:
    PoolLock();
    ~PoolLock();
    PoolLock(const PoolLock&) = delete;
    PoolLock& operator=(const PoolLock&) = delete;
};
