// What cuda_cpu.h does with kernels that are right and, each by a name, with kernels that are not.

#include <cstdio>
#include <vector>

#include "cuda_cpu.h"

namespace {

constexpr int THREADS = 64;

// Row-major a [16, K] and b [K, 8], in the fragments that the PTX manual draws, to c [16, 8].
template <int K, class Put, class Multiply>
__device__ void multiply(const double* a, const double* b, float* c, Put put, Multiply with) {
    const int lane = int(threadIdx.x), group = lane >> 2, in_group = lane & 3;
    uint32_t fragment_a[4] = {}, fragment_b[2] = {};
    constexpr int IN_REGISTER = K / 8;
    for (int i = 0; i < 4 * IN_REGISTER; ++i) {
        int row, col;
        if (K == 8) {
            row = i == 0 || i == 2 ? group : group + 8;
            col = i < 2 ? in_group : in_group + 4;
        } else {
            row = (i >= 0 && i < 2) || (i >= 4 && i < 6) ? group : group + 8;
            col = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        }
        fragment_a[i / IN_REGISTER] |= put(a[row * K + col], i % IN_REGISTER);
    }
    for (int i = 0; i < 2 * IN_REGISTER; ++i) {
        const int row = K == 8 ? in_group + 4 * i : i < 2 ? in_group * 2 + i : in_group * 2 + (i & 1) + 8;
        fragment_b[i / IN_REGISTER] |= put(b[row * 8 + group], i % IN_REGISTER);
    }
    float fragment_c[4];
    for (int i = 0; i < 4; ++i) fragment_c[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    with(fragment_c, fragment_a, fragment_b);
    for (int i = 0; i < 4; ++i) c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = fragment_c[i];
}

__global__ void multiply_kernel(const double* a, const double* b, float* c, int kind) {
    const auto tf32 = [](double x, int) { return to_tf32(float(x)); };
    const auto bf16 = [](double x, int place) { return uint32_t(__float2bfloat16(float(x)).bits) << 16 * place; };
    const auto fp16 = [](double x, int place) { return uint32_t(__float2half(float(x)).bits) << 16 * place; };
    if (kind == 0) multiply<8>(a, b, c, tf32, [](auto&... f) { mma_m16n8k8_tf32(f...); });
    if (kind == 1) multiply<16>(a, b, c, bf16, [](auto&... f) { mma_m16n8k16_bf16(f...); });
    if (kind == 2) multiply<16>(a, b, c, fp16, [](auto&... f) { mma_m16n8k16_fp16(f...); });
}

bool products_are_right() {
    for (int kind = 0; kind < 3; ++kind) {
        const int depth = kind ? 16 : 8;
        std::vector<double> a, b;
        std::vector<float> c, expected;
        for (int i = 0; i < 16 * depth; ++i) a.push_back(i * 37 % 101 - 40);  // exact in every format, all different
        for (int i = 0; i < 8 * depth; ++i) b.push_back(i * 53 % 103 - 60);
        for (int i = 0; i < 16 * 8; ++i) c.push_back(float(i)), expected.push_back(float(i));
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 8; ++j)
                for (int k = 0; k < depth; ++k)
                    expected[size_t(i * 8 + j)] += float(a[size_t(i * depth + k)] * b[size_t(k * 8 + j)]);
        CUDA_LAUNCH(multiply_kernel, 1, 32, 0, nullptr, a.data(), b.data(), c.data(), kind);
        if (cudaGetLastError() != cudaSuccess || c != expected) return false;
    }
    return true;
}

// Neighbours exchange values: right, or with one thing missing.
enum Fault { NONE, NO_WAIT, NO_BARRIER, NO_BARRIER_AFTER, WAITS_FOR_ALL_BUT_ONE };

__global__ void rotate_kernel(const float* from, float* to, int rounds, int fault) {
    CUDA_DYN_SMEM(float, dynamic);
    const int i = int(threadIdx.x);
    for (int round = 0; round < rounds; ++round) {
        cp_async16(dynamic + 4 * i, from + (int(blockIdx.x) * rounds + round) * 4 * THREADS + 4 * i, 16);
        cp_async_commit();
        if (fault == WAITS_FOR_ALL_BUT_ONE)
            cp_async_wait<1>();
        else if (fault != NO_WAIT)
            cp_async_wait<0>();
        if (fault != NO_BARRIER) __syncthreads();
        const float x = dynamic[(4 * i + 5) % (4 * THREADS)];
        to[(int(blockIdx.x) * rounds + round) * THREADS + i] = x;
        if (fault != NO_BARRIER_AFTER) __syncthreads();
    }
    cp_async_wait<0>();
}

__global__ void unwritten_kernel(float* to) {
    __shared__ float some[THREADS];
    if (threadIdx.x % 2) some[threadIdx.x] = 1;
    __syncthreads();
    to[threadIdx.x] = some[threadIdx.x];
}

__global__ void same_place_kernel(float* to) { to[0] = 1; }

__global__ void reach_kernel(float* to, int place) {
    CUDA_DYN_SMEM(float, dynamic);
    to[threadIdx.x] = dynamic[place];
}

__global__ void fault_kernel(const std::string& fault) {
    CUDA_DYN_SMEM(float, dynamic);
    static const float from[8] = {};
    const unsigned i = threadIdx.x;
    if (fault == "divergent barrier") {
        if (i < 32)
            __syncthreads();
        else
            __syncthreads();
    } else if (fault == "deadlock") {
        if (i < 32) __syncthreads();
        if (i < 32) __shfl_xor_sync(0xffffffffu, 1, 1);
        if (i >= 32 && i < 48) __shfl_xor_sync(0xffffffffu, 1, 1);
        if (i >= 48) __syncwarp();
    } else if (fault == "exited lane") {
        if (i != 3) __syncwarp();
    } else if (fault == "not in mask") {
        __shfl_xor_sync(0xfu, 1, 1);
    } else if (fault == "unaligned source") {
        cp_async16(dynamic, from + 1, 16);
    } else if (fault == "unaligned destination") {
        cp_async16(dynamic + 2, from, 16);
    } else if (fault == "not shared") {
        cp_async16(const_cast<float*>(from) + 4, from, 16);
    } else if (fault == "reads too much") {
        cp_async16(dynamic, from, 20);
    } else if (fault == "in flight") {
        cp_async16(dynamic, from, 16);
        cp_async_commit();
    } else if (fault == "not committed") {
        cp_async16(dynamic, from, 16);
        cp_async_wait<0>();
    }
}

int rotate(int fault) {
    constexpr int BLOCKS = 3, ROUNDS = 4;
    std::vector<float> from(BLOCKS * ROUNDS * 4 * THREADS + 4), to(BLOCKS * ROUNDS * THREADS);
    float* const aligned = from.data() + (16 - reinterpret_cast<uintptr_t>(from.data()) % 16) % 16 / 4;
    for (int i = 0; i < BLOCKS * ROUNDS * 4 * THREADS; ++i) aligned[i] = float(i);
    CUDA_LAUNCH(rotate_kernel, BLOCKS, THREADS, 16 * THREADS, nullptr, aligned, to.data(), ROUNDS, fault);
    if (const auto code = cudaGetLastError()) return std::puts(cudaGetErrorString(code)), 1;
    for (int round = 0; round < BLOCKS * ROUNDS; ++round)
        for (int i = 0; i < THREADS; ++i)
            if (to[size_t(round * THREADS + i)] != float(4 * round * THREADS + (4 * i + 5) % (4 * THREADS)))
                return std::puts("a wrong value"), 1;
    return 0;
}

}  // namespace

int main(int, char** arguments) {
    const std::string what = arguments[1];
    std::vector<float> to(THREADS);
    if (what == "products") return products_are_right() ? 0 : 1;
    if (what == "rotate") return rotate(std::atoi(arguments[2]));
    if (what == "unwritten") {
        CUDA_LAUNCH(unwritten_kernel, 3, THREADS, 0, nullptr, to.data());
        for (int i = 0; i < THREADS; ++i)
            if ((to[size_t(i)] == 1) != (i % 2 == 1) || (to[size_t(i)] != to[size_t(i)]) != (i % 2 == 0)) return 1;
        return 0;
    }
    if (what == "same place") {
        CUDA_LAUNCH(same_place_kernel, 6, 1, 0, nullptr, to.data());
    } else if (what == "reach") {
        CUDA_LAUNCH(reach_kernel, 1, THREADS, 4 * THREADS, nullptr, to.data(), std::atoi(arguments[2]));
    } else if (what == "shared") {
        const int bytes = std::atoi(arguments[2]);
        if (arguments[3])
            std::printf("%d ", cudaFuncSetAttribute(reach_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        CUDA_LAUNCH(reach_kernel, 1, THREADS, size_t(bytes), nullptr, to.data(), 0);
    } else if (what == "grid") {
        CUDA_LAUNCH(same_place_kernel, dim3(1, 65536), 1, 0, nullptr, to.data());
    } else {
        CUDA_LAUNCH(fault_kernel, 2, THREADS, 16 * THREADS, nullptr, what);
    }
    const cudaError_t code = cudaGetLastError();
    std::printf("%d %s\n", int(code), cudaGetErrorString(code));
    return code != cudaSuccess;
}
