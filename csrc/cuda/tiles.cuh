#pragma once

#include <cstdint>

#include "cuda/device.cuh"

// The order in which tiles are computed: bands of tile rows, column by column, so that the blocks that run at a time
// share the rows they read while these are in the cache.
namespace sphere::cuda {

constexpr int64_t BAND = 8;

struct TileIndex {
    int64_t row, col;
};

__host__ __device__ inline int64_t triangle_size(int64_t side) { return side * (side + 1) / 2; }

// The tile with this place among those on and above the diagonal of side x side ones.
__host__ __device__ inline TileIndex triangle_tile(int64_t place, int64_t side) {
    int64_t first = 0, height = side < BAND ? side : BAND;
    for (int64_t count; place >= (count = triangle_size(height) + height * (side - first - height));) {
        place -= count;
        first += height;
        height = side - first < BAND ? side - first : BAND;
    }
    if (place >= triangle_size(height)) {
        place -= triangle_size(height);
        return {first + place % height, first + height + place / height};
    }
    int64_t col = 0;  // the band's own triangle, whose columns grow
    while (place > col) place -= ++col;
    return {first + place, first + col};
}

// The tile with this place among rows x cols ones.
__host__ __device__ inline TileIndex rectangle_tile(int64_t place, int64_t rows, int64_t cols) {
    const int64_t first = place / (BAND * cols) * BAND, within = place % (BAND * cols);
    const int64_t height = rows - first < BAND ? rows - first : BAND;
    return {first + within % height, within / height};
}

}  // namespace sphere::cuda
