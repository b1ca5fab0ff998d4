#include "cuda/near_pairs.cuh"
#include "cuda/rows.cuh"
#include "cuda/stages.h"

namespace sphere::cuda {

namespace {

template <class T>
Status pack_rows_of(const Batch& weight, bool normalize, bool round_to_tf32, void* packed, const RowData& data,
                    Stream stream) {
    const int64_t blocks = ceil_div(weight.count * weight.first.rows, ROW_THREADS / 32);
    return launched("rows_pack_kernel", rows_pack_kernel<T>, blocks, ROW_THREADS, 0, stream, weight, normalize,
                    round_to_tf32, packed_width(weight.first.cols), static_cast<T*>(packed), data);
}

template <class T>
Status rows_of_diagonal_of(const void* diagonal, int64_t count, const RowData& data, Stream stream) {
    return launched("diagonal_rows_kernel", diagonal_rows_kernel<T>, ceil_div(count, ROW_THREADS), ROW_THREADS, 0,
                    stream, static_cast<const T*>(diagonal), count, data);
}

}  // namespace

Status pack_rows(const Batch& weight, bool normalize, Precision precision, void* packed, const RowData& data,
                 Stream stream) {
    const auto pack = [&](auto of) {
        return of(weight, normalize, precision == Precision::tf32, packed, data, stream);
    };
    const Type type = weight.first.type;
    if (type == Type::float64) return pack(pack_rows_of<double>);
    if (type == Type::float32) return pack(pack_rows_of<float>);
    return type == Type::bfloat16 ? pack(pack_rows_of<__nv_bfloat16>) : pack(pack_rows_of<__half>);
}

Status rows_of_diagonal(const void* diagonal, Type type, int64_t count, const RowData& data, Stream stream) {
    const auto of = type == Type::float64 ? rows_of_diagonal_of<double> : rows_of_diagonal_of<float>;
    return of(diagonal, count, data, stream);
}

Status sum_energies(const Batch* weight, const Batch* gram, const RowData& data, int64_t count, int64_t n, int side,
                    const Riesz& riesz, bool fast, double* partial, double* energies, Stream stream) {
    const int64_t tiles = ceil_div(n, side);
    const Batch none{};
    const Status status = launched("near_energy_kernel", near_energy_kernel, ceil_div(count * tiles * n, SUM_THREADS),
                                   SUM_THREADS, 0, stream, weight ? *weight : none, gram ? *gram : none, data, count, n,
                                   tiles, int64_t(side), riesz, baseline(riesz, fast), partial);
    if (status.code) return status;
    return launched("energy_sum_kernel", energy_sum_kernel, ceil_div(count * n, SUM_THREADS), SUM_THREADS, 0, stream,
                    partial, data, count, n, tiles, riesz, baseline(riesz, fast), energies);
}

int device_count(int* count) {
    const int code = cudaGetDeviceCount(count);
    cudaGetLastError();  // the next launch is not to report it
    return code;
}

const char* message_of(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

bool no_device(int code) { return code == 35 || code == 100; }  // cudaErrorInsufficientDriver, cudaErrorNoDevice

#if defined(CUDA_CPU_SHIM)
int toolkit() { return 0; }
std::vector<int> architectures() { return {}; }
#else
int toolkit() { return CUDART_VERSION; }
std::vector<int> architectures() {
    std::vector<int> found{__CUDA_ARCH_LIST__};
    for (int& arch : found) arch /= 10;
    return found;
}
#endif

}  // namespace sphere::cuda
