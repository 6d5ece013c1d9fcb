#include "variant.h"

#include <cstring>
#include <iterator>

#include "expertstore/cpp/isa.h"
#include "steps.h"

extern const Variant VARIANT_PORTABLE, VARIANT_AVX2, VARIANT_AVX512, VARIANT_AVX512VNNI,
    VARIANT_AVX512BF16;
extern const Steps STEPS_PORTABLE, STEPS_AVX2, STEPS_AVX512;

namespace {

struct Choice {
    const Variant* variant;
    const Steps* steps;
    Isa isa;
};

// The best first.
constexpr Choice CHOICES[] = {
#ifdef WITH_AVX512BF16
    {&VARIANT_AVX512BF16, &STEPS_AVX512, Isa::AVX512BF16},
#endif
#ifdef WITH_AVX512VNNI
    {&VARIANT_AVX512VNNI, &STEPS_AVX512, Isa::AVX512VNNI},
#endif
#ifdef WITH_AVX512
    {&VARIANT_AVX512, &STEPS_AVX512, Isa::AVX512},
#endif
#ifdef WITH_AVX2
    {&VARIANT_AVX2, &STEPS_AVX2, Isa::AVX2},
#endif
    {&VARIANT_PORTABLE, &STEPS_PORTABLE, Isa::PORTABLE},
};

const Choice& choose() {
    for (const Choice& choice : CHOICES)
        if (runs_here(choice.isa)) return choice;
    return *std::prev(std::end(CHOICES));
}

Choice chosen = {nullptr, nullptr, Isa::PORTABLE};

} // namespace

const Variant& variant() {
    if (!chosen.variant) chosen = choose();
    return *chosen.variant;
}

const Steps& steps() {
    variant();
    return *chosen.steps;
}

// The name of the instruction set in use.
EXPERTD_API const char* expertd_isa() {
    variant();
    return name_of(chosen.isa);
}

// Makes `name` the instruction set of all later calls; null for the best. Returns its name, or
// null, and changes nothing, if it was not compiled or this processor lacks it.
EXPERTD_API const char* expertd_use_isa(const char* name) {
    for (const Choice& choice : CHOICES)
        if (runs_here(choice.isa) && (!name || !strcmp(name, name_of(choice.isa)))) {
            chosen = choice;
            return name_of(choice.isa);
        }
    return nullptr;
}
