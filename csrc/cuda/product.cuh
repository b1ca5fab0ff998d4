#pragma once

#include "cuda/multiply.cuh"
#include "cuda/tiles.cuh"

// Products of matrices of any types and strides.
namespace sphere::cuda {

constexpr int PRODUCT_SIDE = 64;

// The share of a thread in the slabs of one operand, on their way from memory to shared memory. Neighbouring threads
// read neighbours in memory: along the rows, or down the columns where these have no gaps.
template <class Sum, int THREADS>
class Share {
  public:
    static constexpr int DEPTH = SLAB_BYTES / int(sizeof(Sum));

    __device__ Share(const Matrix& m, int64_t first)
        : down_(m.row_stride == 1),
          row_(down_ ? threadIdx.x % PRODUCT_SIDE : threadIdx.x / DEPTH),
          col_(down_ ? threadIdx.x / PRODUCT_SIDE : threadIdx.x % DEPTH),
          offset_((first + row_) * m.row_stride + col_ * m.col_stride),
          step_(down_ ? m.col_stride * COLS_APART : m.row_stride * ROWS_APART),
          rows_left_(m.rows - first - row_) {}

    // The next slab, columns from `depth`; zero past the ends of the matrix.
    __device__ void fetch(const Matrix& m, int64_t depth) {
        if (m.type == Type::float64)
            fetch_as<double>(m, depth);
        else if (m.type == Type::float32)
            fetch_as<float>(m, depth);
        else if (m.type == Type::bfloat16)
            fetch_as<__nv_bfloat16>(m, depth);
        else
            fetch_as<__half>(m, depth);
    }

    template <bool ROUND_TO_TF32>
    __device__ void store(unsigned char* slab) const {
        constexpr int LENGTH = CHUNK_BYTES / int(sizeof(Sum));
#pragma unroll
        for (int p = 0; p < EACH; ++p) {
            const int row = down_ ? row_ : row_ + p * ROWS_APART, col = down_ ? col_ + p * COLS_APART : col_;
            Sum x = elements_[p];
            if constexpr (ROUND_TO_TF32) x = __uint_as_float(to_tf32(x));
            reinterpret_cast<Sum*>(slab + chunk_offset(row, col / LENGTH))[col % LENGTH] = x;
        }
    }

  private:
    static constexpr int EACH = PRODUCT_SIDE * DEPTH / THREADS;
    static constexpr int ROWS_APART = THREADS / DEPTH, COLS_APART = THREADS / PRODUCT_SIDE;
    bool down_;
    int row_, col_;
    int64_t offset_, step_, rows_left_;
    Sum elements_[EACH];

    template <class T>
    __device__ __forceinline__ void fetch_as(const Matrix& m, int64_t depth) {
        const T* from = static_cast<const T*>(m.data) + offset_ + depth * m.col_stride;
        const int64_t cols_left = m.cols - depth - col_;
        const int there = down_ ? (rows_left_ > 0 ? steps_within(cols_left, COLS_APART, EACH) : 0)
                                : (cols_left > 0 ? steps_within(rows_left_, ROWS_APART, EACH) : 0);
#pragma unroll
        for (int p = 0; p < EACH; ++p, from += step_) elements_[p] = p < there ? Sum(widened(*from)) : Sum(0);
    }
};

// One block of (accumulate ? out : 0) + addend + factor left right^T, rounded once to the type of out; right [cols,
// depth], addend may have no data.
template <Math MATH>
__global__ void __launch_bounds__(Sums<MATH, PRODUCT_SIDE>::THREADS, 1)
    product_kernel(Batch left, Batch right, Batch addend, Batch out, double factor, bool accumulate) {
    using Sum = typename Operand<MATH>::Sum;
    constexpr int THREADS = Sums<MATH, PRODUCT_SIDE>::THREADS, SLAB = PRODUCT_SIDE * SLAB_BYTES;
    constexpr int PITCH = PRODUCT_SIDE + 1;
    constexpr bool ROUND = MATH == Math::tf32;
    const int64_t rows = out.first.rows, cols = out.first.cols, depth = left.first.cols;
    const int64_t down = (rows + PRODUCT_SIDE - 1) / PRODUCT_SIDE, across = (cols + PRODUCT_SIDE - 1) / PRODUCT_SIDE;
    const int64_t matrix = block_index() / (down * across);
    if (matrix >= out.count) return;  // the whole block
    CUDA_DYN_SMEM(unsigned char, shared);
    const TileIndex tile = rectangle_tile(block_index() % (down * across), down, across);
    const int64_t first_row = tile.row * PRODUCT_SIDE, first_col = tile.col * PRODUCT_SIDE;
    const Matrix a = left[matrix], b = right[matrix];
    Sums<MATH, PRODUCT_SIDE> sums;
    using Shares = Share<Sum, THREADS>;
    Shares share_a(a, first_row), share_b(b, first_col);
    int stage = 0;
    share_a.fetch(a, 0);
    share_b.fetch(b, 0);
    for (int64_t k = 0; k < depth; k += Shares::DEPTH) {
        unsigned char* slabs = shared + stage * 2 * SLAB;
        share_a.template store<ROUND>(slabs);
        share_b.template store<ROUND>(slabs + SLAB);
        __syncthreads();  // the slabs are there, and all are through with the other two
        share_a.fetch(a, k + Shares::DEPTH);
        share_b.fetch(b, k + Shares::DEPTH);
        sums.add(slabs, slabs + SLAB);
        stage ^= 1;
    }
    __syncthreads();
    Sum* result = reinterpret_cast<Sum*>(shared);
    sums.template store<PITCH>(result);
    __syncthreads();
    const Matrix to = out[matrix], more = addend[matrix];
    const bool along = to.row_stride != 1;
    for (int place = threadIdx.x; place < PRODUCT_SIDE * PRODUCT_SIDE; place += THREADS) {
        const int row = along ? place / PRODUCT_SIDE : place % PRODUCT_SIDE;
        const int col = along ? place % PRODUCT_SIDE : place / PRODUCT_SIDE;
        const int64_t i = first_row + row, j = first_col + col;
        if (i >= rows || j >= cols) continue;
        Sum sum = Sum(factor) * result[row * PITCH + col];
        if (more.data) sum += Sum(element(more.data, more.type, i * more.row_stride + j * more.col_stride));
        const int64_t offset = i * to.row_stride + j * to.col_stride;
        if (accumulate) sum += Sum(element(to.data, to.type, offset));
        set_element(to.data, to.type, offset, sum);
    }
}

}  // namespace sphere::cuda
