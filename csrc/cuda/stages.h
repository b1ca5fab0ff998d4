#pragma once

#include "cuda/launching.cuh"
#include "cuda/pairs.cuh"

// Steps before and after the tiles, for the energy of a weight and that of an updated Gram matrix alike.
namespace sphere::cuda {

constexpr int LARGE = 128, SMALL = 64;  // sides of tiles

// The tile of matrices with n rows: a general one spends its time in fp64, an update in memory.
inline int energy_side(int64_t n, bool fast) { return fast && n > LARGE ? LARGE : SMALL; }

// Of packed rows: 16-byte copies of any type.
inline int64_t packed_width(int64_t d) { return std::max<int64_t>(1, ceil_div(d, 16)) * 16; }

inline RowData take_row_data(Workspace& workspace, int64_t count) {
    return {workspace.take<double>(count), workspace.take<double>(count), workspace.take<double>(count)};
}

// The constant subtracted from the energy of every pair before the sums.
inline double baseline(const Riesz& riesz, bool fast) { return !fast ? 0.0 : riesz.s == 1 ? std::sqrt(0.5) : 0.5; }

// See rows_pack_kernel; packed[count, rows, packed_width(cols)] of the type of weight.
Status pack_rows(const Batch& weight, bool normalize, Precision precision, void* packed, const RowData& data,
                 Stream stream);

// See diagonal_rows_kernel; of a type fp32 or fp64.
Status rows_of_diagonal(const void* diagonal, Type type, int64_t count, const RowData& data, Stream stream);

// Energies [count, n] from the sums of tiles, those with near pairs computed anew; weight or gram may be null.
Status sum_energies(const Batch* weight, const Batch* gram, const RowData& data, int64_t count, int64_t n, int side,
                    const Riesz& riesz, bool fast, double* partial, double* energies, Stream stream);

}  // namespace sphere::cuda
