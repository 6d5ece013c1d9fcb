// Loops over registers, for every variant.
#pragma once

#include <type_traits>

// Sums are to stay in registers, whatever the compiler thinks of the code's size.
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

// GCC 12 warns of its own intrinsics, whose results begin undefined (its bug 105593): where this
// is included before them, it does not.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace {

// f(0), f(1) ... f(COUNT - 1), each on its own: loops that must not be left as loops, since they
// go over registers.
template <int COUNT, int I = 0, class F> INLINE void each(const F& f) {
    if constexpr (I < COUNT) {
        f(std::integral_constant<int, I>());
        each<COUNT, I + 1>(f);
    }
}

} // namespace
