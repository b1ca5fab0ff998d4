#include "cpu/features.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace sphere {

#if defined(__x86_64__) || defined(__i386__)

namespace {

// Not every compiler knows "f16c" as a name, so its bit is read directly. Its operands are AVX registers:
// without AVX, which includes the operating system saving them, it cannot be used.
bool has_f16c() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29)) && __builtin_cpu_supports("avx");
}

}  // namespace

std::vector<CpuFeature> cpu_features() {
    __builtin_cpu_init();
    return {
        {"sse4_2", __builtin_cpu_supports("sse4.2") != 0},
        {"avx", __builtin_cpu_supports("avx") != 0},
        {"avx2", __builtin_cpu_supports("avx2") != 0},
        {"fma", __builtin_cpu_supports("fma") != 0},
        {"f16c", has_f16c()},
        {"avx512f", __builtin_cpu_supports("avx512f") != 0},
        {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
        {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
        {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
        {"avx512_vnni", __builtin_cpu_supports("avx512vnni") != 0},
        {"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0},
    };
}

#elif defined(__aarch64__)

// Advanced SIMD is part of the base architecture.
std::vector<CpuFeature> cpu_features() { return {{"neon", true}}; }

#else

std::vector<CpuFeature> cpu_features() { return {}; }

#endif

}  // namespace sphere
