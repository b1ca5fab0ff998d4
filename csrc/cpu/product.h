#pragma once

#include "cpu/blocks.h"
#include "cpu/kernels.h"

namespace sphere {

// One operand of a product: rows are the product's rows (or columns), columns are the depth that is summed over.
struct Operand {
    Matrix matrix;
    const double* depth_scale = nullptr;
};

// out = (accumulate ? out : 0) + addend + factor a b^T, rounded once to the type of out. a is [out.rows, depth], b is
// [out.cols, depth]. Sums of products in T.
template <class T>
void product(const Kernels<T>& kernels, const Operand& a, const Operand& b, double factor, const Matrix& out,
             const Matrix* addend, bool accumulate, int threads);

}  // namespace sphere
