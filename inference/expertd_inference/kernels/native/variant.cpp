#include "variant.h"

#include <cstdlib>
#include <cstring>

extern const Variant VARIANT_PORTABLE, VARIANT_AVX2, VARIANT_AVX512, VARIANT_AVX512BF16;

namespace {

bool has_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2");
#else
    return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

bool has_avx512bf16() {
#if defined(__x86_64__)
    return has_avx512() && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

bool always() { return true; }

struct Choice {
    const Variant* variant;
    bool (*runs_here)();
};

// The best first.
constexpr Choice CHOICES[] = {
#ifdef WITH_AVX512BF16
    {&VARIANT_AVX512BF16, has_avx512bf16},
#endif
#ifdef WITH_AVX512
    {&VARIANT_AVX512, has_avx512},
#endif
#ifdef WITH_AVX2
    {&VARIANT_AVX2, has_avx2},
#endif
    {&VARIANT_PORTABLE, always},
};

const Variant& choose() {
    for (const Choice& choice : CHOICES)
        if (choice.runs_here()) return *choice.variant;
    return VARIANT_PORTABLE;
}

const Variant* chosen = nullptr;

} // namespace

const Variant& variant() {
    if (!chosen) chosen = &choose();
    return *chosen;
}

// Makes `name` the instruction set of all later calls; null for the best. Returns its name, or
// null, and changes nothing, if it was not compiled or this processor lacks it.
EXPERTD_API const char* expertd_use_isa(const char* name) {
    for (const Choice& choice : CHOICES)
        if (choice.runs_here() && (!name || !strcmp(name, choice.variant->name))) {
            chosen = choice.variant;
            return chosen->name;
        }
    return nullptr;
}
