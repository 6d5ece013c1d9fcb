// Instruction sets that code of ours is compiled for, and the only place that asks the processor
// for them. hatch_build.py has their compiler flags, by the same names.
#pragma once

namespace { // as in numbers.h

enum class Isa { PORTABLE, AVX2, AVX512, AVX512VNNI, AVX512BF16 };

inline const char* name_of(Isa isa) {
    switch (isa) {
    case Isa::AVX2: return "avx2";
    case Isa::AVX512: return "avx512";
    case Isa::AVX512VNNI: return "avx512vnni";
    case Isa::AVX512BF16: return "avx512bf16";
    default: return "portable";
    }
}

inline bool runs_here(Isa isa) {
    if (isa == Isa::PORTABLE) return true;
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("bmi2"))
        return false;
    if (isa == Isa::AVX2) return true;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return false;
    if (isa == Isa::AVX512) return true;
    if (!__builtin_cpu_supports("avx512vnni")) return false;
    return isa == Isa::AVX512VNNI ||
           (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
            __builtin_cpu_supports("avx512bf16"));
#else
    return false;
#endif
}

} // namespace
