// Preloaded into a process: its n-th allocation from now on fails, if it is told so.
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <dlfcn.h>
#include <new>

namespace {
std::atomic<long> left{-1}, elsewhere{0};
std::atomic<int> caller{0};

bool fails() {
    if (left.load() < 0) return false;
    if (gettid() != caller.load()) elsewhere.fetch_add(1);
    return left.fetch_sub(1) == 0;
}
}  // namespace

// After `count` more allocations of this process one fails, once.
extern "C" void fail_after(long count) {
    caller.store(gettid());
    elsewhere.store(0);
    left.store(count);
}

// None fails any more. How many were made by other threads than the one that called fail_after,
// or -1 where none has failed.
extern "C" long stop_failing() {
    const bool failed = left.exchange(-1) < 0;
    return failed ? elsewhere.load() : -1 - elsewhere.load();
}

void* operator new(size_t bytes) {
    if (fails()) throw std::bad_alloc();
    if (void* memory = malloc(bytes)) return memory;
    throw std::bad_alloc();
}
void* operator new[](size_t bytes) { return operator new(bytes); }
void operator delete(void* memory) noexcept { free(memory); }
void operator delete(void* memory, size_t) noexcept { free(memory); }
void operator delete[](void* memory) noexcept { free(memory); }
void operator delete[](void* memory, size_t) noexcept { free(memory); }

extern "C" void* aligned_alloc(size_t alignment, size_t bytes) noexcept {
    using Allocate = void* (*)(size_t, size_t);
    static const auto real = reinterpret_cast<Allocate>(dlsym(RTLD_NEXT, "aligned_alloc"));
    return fails() ? nullptr : real(alignment, bytes);
}
