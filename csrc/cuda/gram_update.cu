#include "cuda/gram.cuh"
#include "cuda/stages.h"

namespace sphere::cuda {

namespace {

struct UpdateMemory {
    int64_t count, n, width, tiles;
    void *first, *second;
    RowData data;
    double* partial;
    int64_t bytes;

    UpdateMemory(const Batch& gram, const Batch& update, void* memory)
        : count(gram.count), n(gram.first.rows), width(packed_width(update.first.cols)), tiles(ceil_div(n, SMALL)) {
        Workspace workspace(memory);
        first = workspace.take<char>(count * n * width * size_of(gram.first.type));
        second = workspace.take<char>(count * n * width * size_of(gram.first.type));
        data = take_row_data(workspace, count * n);
        partial = workspace.take<double>(count * tiles * n);
        bytes = workspace.bytes();
    }
};

template <Math MATH, bool FAST>
Status update_tiles(const UpdateMemory& memory, const Batch& gram, const void* diagonal, const Riesz& riesz,
                    Stream stream) {
    using Element = typename Operand<MATH>::Element;
    using Sum = typename Operand<MATH>::Sum;
    return launched("gram_update_kernel", gram_update_kernel<MATH, SMALL, FAST>,
                    memory.count * triangle_size(memory.tiles), RowProducts<MATH, SMALL>::THREADS,
                    tile_bytes<MATH, SMALL, FAST>(), stream, static_cast<const Element*>(memory.first),
                    static_cast<const Element*>(memory.second), static_cast<const Sum*>(diagonal), memory.data,
                    memory.width, memory.tiles, riesz, gram, memory.partial);
}

}  // namespace

int64_t gram_update_energy_workspace(const Batch& gram, const Batch& first) {
    return UpdateMemory(gram, first, nullptr).bytes;
}

Status gram_update_energy(const Batch& gram, const Batch& first, const Batch& second, const void* diagonal,
                          const Batch* weight, const Riesz& riesz, Precision precision, void* workspace,
                          double* energies, Stream stream) {
    const UpdateMemory memory(gram, first, workspace);
    const bool wide = gram.first.type == Type::float64, fast = is_fast(riesz, wide);
    Status status = pack_rows(first, false, precision, memory.first, memory.data, stream);
    if (!status.code) status = pack_rows(second, false, precision, memory.second, memory.data, stream);
    if (!status.code)
        status = rows_of_diagonal(diagonal, gram.first.type, memory.count * memory.n, memory.data, stream);
    if (status.code) return status;
    if (wide)
        status = update_tiles<Math::fp64, false>(memory, gram, diagonal, riesz, stream);
    else
        status = with_fp32_math(precision, [&](auto math) {
            constexpr Math MATH = decltype(math)::value;
            return fast ? update_tiles<MATH, true>(memory, gram, diagonal, riesz, stream)
                        : update_tiles<MATH, false>(memory, gram, diagonal, riesz, stream);
        });
    if (status.code) return status;
    return sum_energies(weight, &gram, memory.data, memory.count, memory.n, SMALL, riesz, fast, memory.partial,
                        energies, stream);
}

}  // namespace sphere::cuda
