#include "cpu/tiers.h"

#include <stdexcept>

#include "cpu/features.h"

namespace sphere {

#define DECLARE(tier)                                 \
    extern const Kernels<float> tier##_kernels_float; \
    extern const Kernels<double> tier##_kernels_double;

DECLARE(scalar)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
#endif

namespace {

struct Tier {
    const char* name;
    std::vector<const char*> needs;  // as `cpu_features` names them
    const Kernels<float>* in_float;
    const Kernels<double>* in_double;
};

#define TIER(name, ...) {#name, {__VA_ARGS__}, &name##_kernels_float, &name##_kernels_double}

const std::vector<Tier>& tiers() {
    static const std::vector<Tier> all = {
        TIER(scalar),
#if defined(__x86_64__)
        TIER(avx2, "avx2", "fma", "f16c"),
        TIER(avx512, "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
#endif
    };
    return all;
}

bool usable(const Tier& tier) {
    const auto features = cpu_features();
    for (const char* need : tier.needs) {
        bool found = false;
        for (const auto& feature : features) found |= feature.usable && std::string(feature.name) == need;
        if (!found) return false;
    }
    return true;
}

const std::vector<bool>& usable_now() {
    static const std::vector<bool> answers = [] {
        std::vector<bool> found;
        for (const auto& tier : tiers()) found.push_back(usable(tier));
        return found;
    }();
    return answers;
}

}  // namespace

std::vector<std::string> built_tiers() {
    std::vector<std::string> names;
    for (const auto& tier : tiers()) names.push_back(tier.name);
    return names;
}

std::vector<std::string> usable_tiers() {
    std::vector<std::string> names;
    for (size_t i = 0; i < tiers().size(); ++i)
        if (usable_now()[i]) names.push_back(tiers()[i].name);
    return names;
}

template <class T>
const Kernels<T>& kernels(int tier) {
    if (tier < 0 || size_t(tier) >= tiers().size() || !usable_now()[size_t(tier)])
        throw std::invalid_argument("this processor cannot run the kernels asked for");
    if constexpr (sizeof(T) == sizeof(float))
        return *tiers()[size_t(tier)].in_float;
    else
        return *tiers()[size_t(tier)].in_double;
}

template const Kernels<float>& kernels<float>(int);
template const Kernels<double>& kernels<double>(int);

}  // namespace sphere
