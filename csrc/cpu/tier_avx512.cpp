#define TIER_KERNELS(type) avx512_kernels_##type
#include "cpu/tier.inl"
