#pragma once

#include "cuda/multiply.cuh"
#include "cuda/riesz.cuh"
#include "cuda/tiles.cuh"

// Tiles of a symmetric matrix of inner products, and the sums of the energies of their pairs i < j.
namespace sphere::cuda {

// Row data, of all matrices together: norms, deficits 1 - |unit row|^2, scales that make unit rows of the
// packed ones.
struct RowData {
    double* norm;
    double* deficit;
    double* scale;
};

// One tile of one matrix, as a block finds it.
template <int SIDE>
struct Tile {
    int64_t matrix, row, col, first_row, first_col;

    __device__ static Tile of(int64_t place, int64_t tiles) {
        const int64_t each = triangle_size(tiles), matrix = place / each;
        const TileIndex tile = triangle_tile(place % each, tiles);
        return {matrix, tile.row, tile.col, tile.row * SIDE, tile.col * SIDE};
    }
};

// Energies of the pairs of a tile, in fp32 where FAST: less the value at a right angle, in its unit, see `excess`.
template <int SIDE, int THREADS, bool FAST>
class TileEnergies {
    using Number = std::conditional_t<FAST, float, double>;
    static constexpr int WARPS = THREADS / 32, ACROSS = SIDE / 32;
    struct Row {
        Number deficit, scale;
    };

  public:
    struct Shared {
        Row rows[SIDE], cols[SIDE];
        Number row_sums[SIDE], col_sums[WARPS][SIDE];
    };

    // Fetches what is known of the tile's rows and columns; the block has to meet before `sum`.
    __device__ static void fetch(const Tile<SIDE>& tile, const RowData& data, int64_t n, Shared& shared) {
        for (int place = threadIdx.x; place < SIDE; place += THREADS) {
            shared.rows[place] = row(data, tile.matrix, tile.first_row + place, n);
            shared.cols[place] = row(data, tile.matrix, tile.first_col + place, n);
        }
    }

    // Sums over each row and each column of the tile, to the places of the tile in partial[count, tiles, n]; an
    // infinite one where there was a near pair. product(row, col) gives their inner products.
    template <class Product>
    __device__ static void sum(const Tile<SIDE>& tile, const Riesz& riesz, int64_t n, int64_t tiles, double* partial,
                               Shared& shared, Product product) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        Row cols[ACROSS];
        Number col_sums[ACROSS] = {};
        for (int c = 0; c < ACROSS; ++c) cols[c] = shared.cols[lane + 32 * c];
#pragma unroll 1
        for (int r = warp; r < SIDE; r += WARPS) {
            const Row own = shared.rows[r];
            const int64_t i = tile.first_row + r;
            Number row_sum = 0;
#pragma unroll
            for (int c = 0; c < ACROSS; ++c) {
                const int64_t j = tile.first_col + lane + 32 * c;
                if (i < j && j < n) {
                    const Number value = energy(product(r, lane + 32 * c), own, cols[c], riesz);
                    row_sum += value;
                    col_sums[c] += value;
                }
            }
            row_sum = warp_sum(row_sum);
            if (lane == 0) shared.row_sums[r] = row_sum;
        }
        for (int c = 0; c < ACROSS; ++c) shared.col_sums[warp][lane + 32 * c] = col_sums[c];
        __syncthreads();
        double* to = partial + tile.matrix * tiles * n;
        for (int place = threadIdx.x; place < SIDE; place += THREADS) {
            const int64_t i = tile.first_row + place, j = tile.first_col + place;
            const double down = shared.row_sums[place];
            double across = 0;
            for (int w = 0; w < WARPS; ++w) across += shared.col_sums[w][place];
            if (tile.row == tile.col) {
                if (i < n) to[tile.col * n + i] = down + across;
            } else {
                if (i < n) to[tile.col * n + i] = down;
                if (j < n) to[tile.row * n + j] = across;
            }
        }
    }

  private:
    __device__ static Row row(const RowData& data, int64_t matrix, int64_t i, int64_t n) {
        if (i >= n) return {};
        const int64_t place = matrix * n + i;
        return {Number((FAST ? 0.5 : 1.0) * data.deficit[place]), Number(data.scale[place])};
    }

    template <class Sum>
    __device__ static Number energy(Sum product, const Row& i, const Row& j, const Riesz& riesz) {
        if constexpr (FAST) {
            return excess((product * i.scale) * j.scale, i.deficit + j.deficit, riesz.s == 2);
        } else {
            const double twice = (double(product) * (2 * i.scale)) * j.scale, deficit = i.deficit + j.deficit;
            const double minus = (2 - twice) - deficit, plus = (2 + twice) - deficit;
            return is_near(minus, plus, deficit, riesz) ? infinity() : pair_value(minus, plus, deficit, riesz);
        }
    }
};

// Sums of the energies in one tile of one matrix.
template <Math MATH, int SIDE, bool FAST>
__global__ void __launch_bounds__(RowProducts<MATH, SIDE>::THREADS, RowProducts<MATH, SIDE>::BLOCKS)
    pair_energy_kernel(const typename Operand<MATH>::Element* packed,  // [count, n, width]
                       RowData data, int64_t count, int64_t n, int64_t width, int64_t tiles, Riesz riesz,
                       double* partial) {  // [count, tiles, n]
    using Products = RowProducts<MATH, SIDE>;
    using Energies = TileEnergies<SIDE, Products::THREADS, FAST>;
    if (block_index() >= count * triangle_size(tiles)) return;  // the whole block
    CUDA_DYN_SMEM(unsigned char, shared);
    const auto tile = Tile<SIDE>::of(block_index(), tiles);
    const auto* rows = packed + tile.matrix * n * width;
    Products::of(rows, rows, tile.first_row, tile.first_col, n, width, shared);
    auto& sums = *reinterpret_cast<typename Energies::Shared*>(shared + Products::RESULT_BYTES);
    Energies::fetch(tile, data, n, sums);
    __syncthreads();
    const auto* products = reinterpret_cast<const typename Products::Sum*>(shared);
    Energies::sum(tile, riesz, n, tiles, partial, sums,
                  [&](int row, int col) { return products[row * Products::PITCH + col]; });
}

// Shared memory of a kernel of tiles with their energies.
template <Math MATH, int SIDE, bool FAST>
constexpr int tile_bytes() {
    using Products = RowProducts<MATH, SIDE>;
    using Shared = typename TileEnergies<SIDE, Products::THREADS, FAST>::Shared;
    const int stages = Products::STAGES * Products::STAGE_BYTES, after = Products::RESULT_BYTES + int(sizeof(Shared));
    return stages > after ? stages : after;
}

}  // namespace sphere::cuda
