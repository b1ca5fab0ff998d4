#include "cuda/stages.h"

namespace sphere::cuda {

namespace {

struct PairMemory {
    bool fast;
    int side;
    int64_t count, n, width, tiles;
    void* packed;
    RowData data;
    double* partial;
    int64_t bytes;

    PairMemory(const Batch& weight, const Riesz& riesz, void* memory)
        : fast(is_fast(riesz, weight.first.type == Type::float64)),
          side(energy_side(weight.first.rows, fast)),
          count(weight.count),
          n(weight.first.rows),
          width(packed_width(weight.first.cols)),
          tiles(ceil_div(n, side)) {
        Workspace workspace(memory);
        packed = workspace.take<char>(count * n * width * size_of(weight.first.type));
        data = take_row_data(workspace, count * n);
        partial = workspace.take<double>(count * tiles * n);
        bytes = workspace.bytes();
    }
};

template <Math MATH, int SIDE, bool FAST>
Status energies_of_tiles(const PairMemory& memory, const Riesz& riesz, Stream stream) {
    using Element = typename Operand<MATH>::Element;
    return launched("pair_energy_kernel", pair_energy_kernel<MATH, SIDE, FAST>,
                    memory.count * triangle_size(memory.tiles), RowProducts<MATH, SIDE>::THREADS,
                    tile_bytes<MATH, SIDE, FAST>(), stream, static_cast<const Element*>(memory.packed), memory.data,
                    memory.count, memory.n, memory.width, memory.tiles, riesz, memory.partial);
}

}  // namespace

int64_t pair_energy_workspace(const Batch& weight, const Riesz& riesz) {
    return PairMemory(weight, riesz, nullptr).bytes;
}

Status pair_energy(const Batch& weight, const Riesz& riesz, Precision precision, void* workspace, double* energies,
                   Stream stream) {
    const PairMemory memory(weight, riesz, workspace);
    Status status = pack_rows(weight, true, precision, memory.packed, memory.data, stream);
    if (status.code) return status;
    status = with_math(weight.first.type, precision, [&](auto math) {
        constexpr Math MATH = decltype(math)::value;
        if constexpr (MATH != Math::fp64) {
            if (memory.fast && memory.side == LARGE) return energies_of_tiles<MATH, LARGE, true>(memory, riesz, stream);
            if (memory.fast) return energies_of_tiles<MATH, SMALL, true>(memory, riesz, stream);
        }
        return energies_of_tiles<MATH, SMALL, false>(memory, riesz, stream);
    });
    if (status.code) return status;
    return sum_energies(&weight, nullptr, memory.data, memory.count, memory.n, memory.side, riesz, memory.fast,
                        memory.partial, energies, stream);
}

}  // namespace sphere::cuda
