#pragma once

#include "cpu/matrix.h"

namespace sphere {

// out[n, n] = weight weight^T, or of its unit rows; exactly symmetric. `out` is contiguous.
template <class T>
void gram(const Matrix& weight, bool normalize, int tier, int threads, T* out);

// gram += left right^T, which is symmetric, and the energy of every neuron whose inner products the result holds. Of
// `gram`, with `ld` elements between rows, only pairs row < column are read; `diagonal` is its new diagonal. A weight,
// if given, has the rows whose inner products these are: near pairs are recomputed from them.
template <class T>
void gram_update_energy(T* gram, int64_t ld, const Matrix& left, const Matrix& right, const double* diagonal,
                        const Matrix* weight, const Riesz& riesz, int tier, int threads, double* energies);

}  // namespace sphere
