#pragma once

#include "common/matrix.h"

namespace sphere {

// Energy of every row of `weight`, into energies[rows].
template <class T>
void pair_energy(const Matrix& weight, const Riesz& riesz, int tier, int threads, double* energies);

// Gradient of sum(upstream * energies) for the weight, into gradient[rows, cols].
template <class T>
void pair_energy_backward(const double* upstream, const Matrix& weight, const Riesz& riesz, int tier, int threads,
                          T* gradient);

}  // namespace sphere
