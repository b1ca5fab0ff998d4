#pragma once

#include <cstdint>
#include <vector>

#include "common/matrix.h"

// The operations on a CUDA device. No torch and no CUDA header: addresses are the device's, memory for what lies
// between kernels is the caller's, and every launch goes to the current device and the stream given. Sizes may be zero.
namespace sphere::cuda {

enum class Precision { ieee, tf32x3, tf32 };  // how fp32 operands are multiplied, the order of gpu.PRECISIONS

using Stream = void*;

// CUDA's answer to a launch; code 0: no error.
struct Status {
    int code;
    const char* kernel;
};

// Energy of every row of `weight`, to energies[count, rows], contiguous.
Status pair_energy(const Batch& weight, const Riesz& riesz, Precision precision, void* workspace, double* energies,
                   Stream stream);
int64_t pair_energy_workspace(const Batch& weight, const Riesz& riesz);  // bytes, aligned to 16

// gram += first second^T, a symmetric product, of which the upper triangle is computed, added and mirrored; the new
// diagonal is `diagonal[count, rows]`, contiguous, of gram's type, fp32 or fp64, as first and second are. The energy of
// every neuron to energies[count, rows]; near pairs from the rows of `weight`, or from gram where it is null.
Status gram_update_energy(const Batch& gram, const Batch& first, const Batch& second, const void* diagonal,
                          const Batch* weight, const Riesz& riesz, Precision precision, void* workspace,
                          double* energies, Stream stream);
int64_t gram_update_energy_workspace(const Batch& gram, const Batch& first);

// out = (accumulate ? out : 0) + addend + factor left right, a null addend: 0; in fp64 where `wide`, else in fp32,
// rounded once to the type of out. Any of the four types each; the count of any but out may be repeated by a stride of
// 0.
Status product(const Batch& left, const Batch& right, const Batch* addend, const Batch& out, double factor,
               bool accumulate, bool wide, Precision precision, Stream stream);

int device_count(int* count);      // a CUDA error code
const char* message_of(int code);  // CUDA's words for it
bool no_device(int code);          // whether it says that there is no driver or no device

int toolkit();                     // its version, 1000 major + 10 minor; 0: the CPU emulates
std::vector<int> architectures();  // that there is machine code for, 10 major + minor

}  // namespace sphere::cuda
