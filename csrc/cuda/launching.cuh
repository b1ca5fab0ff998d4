#pragma once

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace sphere::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs a kernel in `blocks` blocks, which know themselves by block_index(): there may be a few more of them.
template <class Kernel, class... Arguments>
Status launched(const char* name, Kernel kernel, int64_t blocks, int threads, int shared_bytes, Stream stream,
                const Arguments&... arguments) {
    if (blocks == 0) return {};
    constexpr int64_t ACROSS = int64_t(1) << 30;
    const dim3 grid(unsigned(std::min(blocks, ACROSS)), unsigned(ceil_div(blocks, ACROSS)));
    int code = cudaSuccess;
    if (shared_bytes > 48 << 10)
        code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (code == cudaSuccess) {
        CUDA_LAUNCH(kernel, grid, threads, shared_bytes, static_cast<cudaStream_t>(stream), arguments...);
        code = cudaGetLastError();
    }
    return {code, name};
}

// Cuts the caller's workspace, or measures what it must hold where there is none yet.
class Workspace {
  public:
    explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        T* taken = reinterpret_cast<T*>(memory_ + bytes_);
        bytes_ += ceil_div(count * int64_t(sizeof(T)), 16) * 16;
        return taken;
    }
    int64_t bytes() const { return bytes_; }

  private:
    char* memory_;
    int64_t bytes_ = 0;
};

}  // namespace sphere::cuda
