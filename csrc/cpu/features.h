#pragma once

#include <vector>

namespace sphere {

// One instruction set extension, named as Linux names it in /proc/cpuinfo.
struct CpuFeature {
    const char* name;
    bool usable;
};

// The features that this processor and its operating system let a program use. Empty on an architecture we know nothing
// about.
std::vector<CpuFeature> cpu_features();

}  // namespace sphere
