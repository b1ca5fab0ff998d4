#pragma once

#include "common/matrix.h"

namespace sphere {

// out = (accumulate ? out : 0) + update - alpha (update U) U^T for a basis U [update.cols, r], rounded once to the type
// of out. With `left`: out = (accumulate ? out : 0) + left (update - alpha (update U) U^T). Sums of products in T.
template <class T>
void project(const Matrix& update, const Matrix& basis, double alpha, const Matrix* left, const Matrix& out,
             bool accumulate, int tier, int threads);

}  // namespace sphere
