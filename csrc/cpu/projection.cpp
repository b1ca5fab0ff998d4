#include "cpu/projection.h"

#include "cpu/product.h"
#include "cpu/tiers.h"
#include "cpu/views.h"

namespace sphere {

template <class T>
void project(const Matrix& update, const Matrix& basis, double alpha, const Matrix* left, const Matrix& out,
             bool accumulate, int tier, int threads) {
    const Kernels<T>& kernel = kernels<T>(tier);
    threads = threads_for(out.rows * out.cols * (basis.cols + update.rows), threads);
    const int64_t rank = basis.cols;
    Buffer<T> coefficients(update.rows * rank);
    const Matrix part{coefficients.get(), type_of<T>, update.rows, rank, rank, 1};
    product(kernel, {update}, {transposed(basis)}, 1, part, nullptr, false, threads);
    if (!left) {
        product(kernel, {part}, {basis}, -alpha, out, &update, accumulate, threads);
        return;
    }
    Buffer<T> right(update.rows * update.cols);
    const Matrix projected{right.get(), type_of<T>, update.rows, update.cols, update.cols, 1};
    product(kernel, {part}, {basis}, -alpha, projected, &update, false, threads);
    product(kernel, {*left}, {transposed(projected)}, 1, out, nullptr, accumulate, threads);
}

template void project<float>(const Matrix&, const Matrix&, double, const Matrix*, const Matrix&, bool, int, int);
template void project<double>(const Matrix&, const Matrix&, double, const Matrix*, const Matrix&, bool, int, int);

}  // namespace sphere
