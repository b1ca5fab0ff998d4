#pragma once

#include <sys/mman.h>

#include <string>

#include "../../native/cpp/naive.h"
#include "cuda/launch.h"
#include "cuda_cpu.h"

// Batches of matrices, and other memory, that end at what must not be touched: a page, or a sanitizer's red zone.

using sphere::Batch;

enum class Layout { rows, columns, spread };

class Guarded {
  public:
    // Without values: NaN.
    Guarded(Type type, int64_t count, int64_t rows, int64_t cols, Layout layout = Layout::rows,
            const Dense& values = {}) {
        const int64_t row = layout == Layout::rows ? cols : layout == Layout::columns ? 1 : 3 * cols + 2;
        const int64_t col = layout == Layout::rows ? 1 : layout == Layout::columns ? rows : 3;
        const int64_t each = rows && cols ? (rows - 1) * row + (cols - 1) * col + 1 : 0;
        const int64_t stride = layout == Layout::spread ? each + 5 : each;
        allocate(size_t(count && each ? (count - 1) * stride + each : 0) * size_t(sphere::size_of(type)));
        batch = {{begin, type, rows, cols, row, col}, count, stride};
        for (size_t i = 0; i < values.size(); ++i) set(int64_t(i), values[i]);
    }
    explicit Guarded(int64_t size) { allocate(size_t(size)); }
    ~Guarded() {
#if defined(CUDA_CPU_SANITIZED)
        std::free(begin);
#else
        munmap(end_ - whole_, whole_ + cuda_cpu::PAGE);
#endif
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    Dense values() const {
        Dense all(size_t(batch.count * batch.first.rows * batch.first.cols));
        for (size_t i = 0; i < all.size(); ++i) all[i] = get(int64_t(i));
        return all;
    }
    std::string memory() const { return {begin, bytes}; }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(begin);
    }

    Batch batch{};
    char* begin = nullptr;
    size_t bytes = 0;

  private:
    void allocate(size_t size) {
        bytes = size;
#if defined(CUDA_CPU_SANITIZED)
        begin = static_cast<char*>(std::malloc(size));
#else
        whole_ = (size + cuda_cpu::PAGE - 1) / cuda_cpu::PAGE * cuda_cpu::PAGE;
        void* const from = mmap(nullptr, whole_ + cuda_cpu::PAGE, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (from == MAP_FAILED) std::abort();
        end_ = static_cast<char*>(from) + whole_;
        mprotect(end_, cuda_cpu::PAGE, PROT_NONE);
        begin = end_ - size;
#endif
        if (size >> 28) return;  // zeros, which take no memory before they are written
        for (size_t at = 0; at < size; ++at) begin[at] = char((size - at) % 2 ? 0x7f : 0xff);  // 0x7fff... is NaN
    }

    void* place(int64_t i) const {
        const Matrix& m = batch.first;
        const int64_t offset =
            i / (m.rows * m.cols) * batch.stride + i / m.cols % m.rows * m.row_stride + i % m.cols * m.col_stride;
        return begin + offset * sphere::size_of(m.type);
    }
    double get(int64_t i) const {
        const void* const at = place(i);
        switch (batch.first.type) {
            case Type::float64:
                return cuda_cpu::bits_as<double>(at);
            case Type::float32:
                return cuda_cpu::bits_as<float>(at);
            case Type::bfloat16:
                return cuda_cpu::from_bf16(cuda_cpu::bits_as<uint16_t>(at));
            default:
                return cuda_cpu::from_fp16(cuda_cpu::bits_as<uint16_t>(at));
        }
    }
    void set(int64_t i, double x) {
        const float single = float(x);
        const Type type = batch.first.type;
        const uint16_t half = type == Type::bfloat16 ? __double2bfloat16(x).bits : __double2half(x).bits;
        const void* const from = type == Type::float64   ? static_cast<const void*>(&x)
                                 : type == Type::float32 ? static_cast<const void*>(&single)
                                                         : &half;
        std::memcpy(place(i), from, size_t(sphere::size_of(type)));
    }

    char* end_ = nullptr;
    size_t whole_ = 0;
};
