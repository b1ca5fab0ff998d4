#define TIER_KERNELS(type) avx2_kernels_##type
#include "cpu/tier.inl"
