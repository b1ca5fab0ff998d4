#pragma once

#include "common/matrix.h"

namespace sphere {

// out[n, n] = weight weight^T, or of its unit rows; exactly symmetric. `out` is contiguous.
template <class T>
void gram(const Matrix& weight, bool normalize, int tier, int threads, T* out);

// from -= factor factor^T for a symmetric `from`, whose columns are neighbours and of which only the upper triangle is
// read; the result is exactly symmetric. Both are of type T.
template <class T>
void subtract_gram(const Matrix& from, const Matrix& factor, int tier, int threads);

// Energy of every neuron whose inner products `gram` holds; of it, whose columns are neighbours, only the upper
// triangle is read. A weight, if given, has the rows: near pairs are recomputed from them.
template <class T>
void gram_energy(const Matrix& gram, const Matrix* weight, const Riesz& riesz, int tier, int threads, double* energies);

// gram += cross left^T + left cross^T + left inner left^T, and the energy of every neuron whose inner products the
// result holds. Of `gram`, whose columns are neighbours, only the upper triangle is read. All are of type T but the
// weight, which, if given, has the rows whose inner products the result holds: near pairs are recomputed from them.
template <class T>
void gram_update_energy(const Matrix& gram, const Matrix& left, const Matrix& cross, const Matrix& inner,
                        const Matrix* weight, const Riesz& riesz, int tier, int threads, double* energies);

}  // namespace sphere
