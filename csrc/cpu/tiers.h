#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace sphere {

// Instruction sets that this build has kernels for, the slowest first: "scalar" (the base architecture), "avx2",
// "avx512".
std::vector<std::string> built_tiers();

// The built tiers that this processor and its operating system can run.
std::vector<std::string> usable_tiers();

// The kernels of a usable tier by its index in `built_tiers`; throws std::invalid_argument for any other.
template <class T>
const Kernels<T>& kernels(int tier);

}  // namespace sphere
