#include "cuda/launching.cuh"
#include "cuda/product.cuh"

namespace sphere::cuda {

namespace {

template <Math MATH>
Status run(const Batch& left, const Batch& right, const Batch& addend, const Batch& out, double factor, bool accumulate,
           Stream stream) {
    using Sum = typename Operand<MATH>::Sum;
    constexpr int THREADS = Sums<MATH, PRODUCT_SIDE>::THREADS, SLABS = 4 * PRODUCT_SIDE * SLAB_BYTES;
    constexpr int RESULT = PRODUCT_SIDE * (PRODUCT_SIDE + 1) * int(sizeof(Sum));
    const int64_t tiles = ceil_div(out.first.rows, PRODUCT_SIDE) * ceil_div(out.first.cols, PRODUCT_SIDE);
    return launched("product_kernel", product_kernel<MATH>, out.count * tiles, THREADS, std::max(SLABS, RESULT), stream,
                    left, right, addend, out, factor, accumulate);
}

bool is_half(const Batch& batch) { return batch.first.type == Type::bfloat16 || batch.first.type == Type::float16; }

}  // namespace

Status product(const Batch& left, const Batch& right, const Batch* addend, const Batch& out, double factor,
               bool accumulate, bool wide, Precision precision, Stream stream) {
    Batch turned = right;  // its columns become rows
    std::swap(turned.first.rows, turned.first.cols);
    std::swap(turned.first.row_stride, turned.first.col_stride);
    // What 16 bits hold, tf32 holds exactly.
    if (is_half(left) && is_half(right)) precision = Precision::tf32;
    const Batch more = addend ? *addend : Batch{};
    if (wide) return run<Math::fp64>(left, turned, more, out, factor, accumulate, stream);
    return with_fp32_math(precision, [&](auto math) {
        return run<decltype(math)::value>(left, turned, more, out, factor, accumulate, stream);
    });
}

}  // namespace sphere::cuda
