#pragma once

#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

// In an unnamed namespace, since files of several instruction sets include it.
namespace {

// to[j, i] = from[i, j] for rows x cols of `from`.
template <class T>
inline void transpose(const T* from, int64_t from_ld, int64_t rows, int64_t cols, T* to, int64_t to_ld) {
    int64_t whole_rows = 0, whole_cols = 0;
#if defined(__SSE2__)
    if constexpr (sizeof(T) == 4) {
        whole_rows = rows / 4 * 4, whole_cols = cols / 4 * 4;
        for (int64_t j = 0; j < whole_cols; j += 4)
            for (int64_t i = 0; i < whole_rows; i += 4) {
                const T* f = from + i * from_ld + j;
                T* t = to + j * to_ld + i;
                __m128 a = _mm_loadu_ps(f), b = _mm_loadu_ps(f + from_ld);
                __m128 c = _mm_loadu_ps(f + 2 * from_ld), d = _mm_loadu_ps(f + 3 * from_ld);
                _MM_TRANSPOSE4_PS(a, b, c, d);
                _mm_storeu_ps(t, a);
                _mm_storeu_ps(t + to_ld, b);
                _mm_storeu_ps(t + 2 * to_ld, c);
                _mm_storeu_ps(t + 3 * to_ld, d);
            }
    }
#endif
    for (int64_t j = 0; j < cols; ++j)
        for (int64_t i = j < whole_cols ? whole_rows : 0; i < rows; ++i) to[j * to_ld + i] = from[i * from_ld + j];
}

}  // namespace
