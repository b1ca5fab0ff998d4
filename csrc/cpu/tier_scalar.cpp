#define TIER_KERNELS(type) scalar_kernels_##type
#include "cpu/tier.inl"
