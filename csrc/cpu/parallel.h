#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace sphere {

// How many of `asked` threads may be used: one in a forked child, where the parent's pool of threads does not exist
// and waiting for it would never end.
int usable_threads(int asked);

// Calls f(index, worker) for every index, in any order; worker < threads names who does. The first exception comes
// out at the end.
template <class F>
void parallel_for(int64_t count, int threads, F f) {
    if (threads <= 1 || count <= 1) {
        for (int64_t i = 0; i < count; ++i) f(i, 0);
        return;
    }
#if defined(_OPENMP)
    std::exception_ptr failure;
#pragma omp parallel num_threads(threads)
    {
        const int worker = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; ++i) try {
                f(i, worker);
            } catch (...) {
#pragma omp critical
                failure = std::current_exception();
            }
    }
    if (failure) std::rethrow_exception(failure);
#else
    for (int64_t i = 0; i < count; ++i) f(i, 0);
#endif
}

// Uninitialised memory on a cache line's boundary.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t count)
        : data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(count), ALIGNMENT))) {}
    ~Buffer() { ::operator delete(data_, ALIGNMENT); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* get() const { return data_; }
    T& operator[](int64_t i) const { return data_[i]; }

  private:
    static constexpr std::align_val_t ALIGNMENT{64};
    T* data_;
};

}  // namespace sphere
