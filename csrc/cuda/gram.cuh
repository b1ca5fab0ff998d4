#pragma once

#include "cuda/pairs.cuh"

// A symmetric matrix carried over a product, with the energies of the result.
namespace sphere::cuda {

// Carries a tile of `matrix`, on and above the diagonal, over `products`, to which the result goes too.
template <class Products, int SIDE, class Sum>
__device__ void update_tile(const Tile<SIDE>& tile, const Sum* diagonal, const Batch& gram, Sum* matrix,
                            Sum* products) {
    constexpr int WARPS = Products::THREADS / 32, ACROSS = SIDE / 32;
    constexpr int AHEAD = 4;  // rows of which the elements are on their way at a time
    const int64_t n = gram.first.rows, down = gram.first.row_stride, across = gram.first.col_stride;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = threadIdx.x / 32; first < SIDE; first += AHEAD * WARPS) {
        Sum old[AHEAD][ACROSS];
#pragma unroll
        for (int r = 0; r < AHEAD; ++r)
#pragma unroll
            for (int c = 0; c < ACROSS; ++c) {
                const int64_t i = tile.first_row + first + r * WARPS, j = tile.first_col + lane + 32 * c;
                old[r][c] = i < j && j < n ? matrix[i * down + j * across] : Sum(0);
            }
#pragma unroll
        for (int r = 0; r < AHEAD; ++r)
#pragma unroll
            for (int c = 0; c < ACROSS; ++c) {
                const int64_t i = tile.first_row + first + r * WARPS, j = tile.first_col + lane + 32 * c;
                Sum& sum = products[(first + r * WARPS) * Products::PITCH + lane + 32 * c];
                if (i <= j && j < n) matrix[i * down + j * across] = sum = i == j ? diagonal[i] : old[r][c] + sum;
            }
    }
}

// One tile of gram + first second^T, written to both of its places, and the sums of its pairs' energies.
template <Math MATH, int SIDE, bool FAST>
__global__ void __launch_bounds__(RowProducts<MATH, SIDE>::THREADS, RowProducts<MATH, SIDE>::BLOCKS)
    gram_update_kernel(const typename Operand<MATH>::Element* first,   // [count, n, width]
                       const typename Operand<MATH>::Element* second,  // [count, n, width]
                       const typename Operand<MATH>::Sum* diagonal,    // [count, n], of the result
                       RowData data, int64_t width, int64_t tiles, Riesz riesz,
                       Batch gram,         // [count, n, n], of which the upper triangle is read
                       double* partial) {  // [count, tiles, n]
    using Products = RowProducts<MATH, SIDE>;
    using Energies = TileEnergies<SIDE, Products::THREADS, FAST>;
    using Sum = typename Products::Sum;
    if (block_index() >= gram.count * triangle_size(tiles)) return;  // the whole block
    CUDA_DYN_SMEM(unsigned char, shared);
    const int64_t n = gram.first.rows;
    const auto tile = Tile<SIDE>::of(block_index(), tiles);
    const int64_t before = tile.matrix * n * width;
    Products::of(first + before, second + before, tile.first_row, tile.first_col, n, width, shared);
    auto& sums = *reinterpret_cast<typename Energies::Shared*>(shared + Products::RESULT_BYTES);
    Energies::fetch(tile, data, n, sums);
    __syncthreads();
    Sum* products = reinterpret_cast<Sum*>(shared);
    Sum* matrix = static_cast<Sum*>(gram.first.data) + tile.matrix * gram.stride;
    update_tile<Products>(tile, diagonal + tile.matrix * n, gram, matrix, products);
    __syncthreads();
    // Warps take columns, so that the mirrored ones are written along their rows too.
    for (int col = threadIdx.x / 32; col < SIDE; col += Products::THREADS / 32) {
        const int64_t j = tile.first_col + col;
        for (int row = threadIdx.x % 32; row < SIDE; row += 32) {
            const int64_t i = tile.first_row + row;
            if (i < j && j < n)
                matrix[j * gram.first.row_stride + i * gram.first.col_stride] = products[row * Products::PITCH + col];
        }
    }
    Energies::sum(tile, riesz, n, tiles, partial, sums,
                  [&](int row, int col) { return finite_or_nan(products[row * Products::PITCH + col]); });
}

}  // namespace sphere::cuda
