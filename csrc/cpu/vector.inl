// Vectors of one tier: GCC and Clang vector extensions, with intrinsics only where those have no word.
// Everything is in an unnamed namespace: an inline function with a name would be merged with another tier's.

#pragma once

#include <math.h>
#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"

#if defined(__AVX512F__)
#define SPHERE_BYTES 64
#elif defined(__AVX2__)
#define SPHERE_BYTES 32
#else
#define SPHERE_BYTES 16
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

using namespace sphere;

typedef float Floats __attribute__((vector_size(SPHERE_BYTES)));
typedef double Doubles __attribute__((vector_size(SPHERE_BYTES)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef Floats type;
};
template <>
struct VectorOf<double> {
    typedef Doubles type;
};

template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int LANES = SPHERE_BYTES / sizeof(T);

template <class T>
INLINE Vector<T> load(const T* from) {
    Vector<T> v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

template <class T>
INLINE void store(T* to, Vector<T> v) {
    __builtin_memcpy(to, &v, sizeof v);
}

template <class T>
INLINE Vector<T> broadcast(T x) {
    return x - Vector<T>{};
}

template <class T>
INLINE double sum(Vector<T> v) {
    double total = 0;
    for (int l = 0; l < LANES<T>; ++l) total += v[l];
    return total;
}

INLINE bool any_below(Floats v, float bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_LT_OQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_LT_OQ)) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_ps(_mm_cmplt_ps((__m128)v, _mm_set1_ps(bound))) != 0;
#else
    bool any = false;
    for (int l = 0; l < LANES<float>; ++l) any |= v[l] < bound;
    return any;
#endif
}

INLINE bool any_below(Doubles v, double bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_pd_mask((__m512d)v, _mm512_set1_pd(bound), _CMP_LT_OQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, _mm256_set1_pd(bound), _CMP_LT_OQ)) != 0;
#else
    bool any = false;
    for (int l = 0; l < LANES<double>; ++l) any |= v[l] < bound;
    return any;
#endif
}

// 1 / sqrt(x) - 1 and 1 / x - 1 for x = 1 - u - rest, where `rest` is what does not fit into u. A sum averages out
// roundings but no bias, so nothing small may be lost against something large on the way.

#if defined(__AVX2__)

// a b + c, rounded once.
INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

// About 1 / sqrt(x) and 1 / x: to 2^-11 at least.
INLINE Floats inverse_sqrt_estimate(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)x);
#else
    return (Floats)_mm256_rsqrt_ps((__m256)x);
#endif
}

INLINE Floats inverse_estimate(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
#else
    return (Floats)_mm256_rcp_ps((__m256)x);
#endif
}

// From an estimate y, the residual h = 1 - x y^2 (or 1 - x y) with all that x lost in rounding, and as many terms of
// the series in h as fp32 sees.
INLINE Floats inverse_sqrt_excess(Floats u, Floats rest) {
    const Floats x = 1 - u, lost = ((1 - x) - u) - rest;
    const Floats y = inverse_sqrt_estimate(x), p = x * y;
    const Floats h = fused(-p, y, 1 - Floats{}) - y * (fused(x, y, -p) + lost * y);
    return (y - 1) + (y * h) * (0.5f + h * (0.375f + 0.3125f * h));
}

INLINE Floats inverse_excess(Floats u, Floats rest) {
    const Floats x = 1 - u, lost = ((1 - x) - u) - rest;
    const Floats y = inverse_estimate(x);
    const Floats h = fused(-x, y, 1 - Floats{}) - lost * y;
    return (y - 1) + (y * h) * (1 + h * (1 + h));
}

#else  // without fused operations in fp64

INLINE Floats inverse_sqrt_excess(Floats u, Floats rest) {
    Floats e = {};
    for (int l = 0; l < LANES<float>; ++l) {
        const double v = double(u[l]) + double(rest[l]), y = 1 / sqrt(1 - v);
        e[l] = float(v * y * y / (1 + y));
    }
    return e;
}

INLINE Floats inverse_excess(Floats u, Floats rest) {
    Floats e = {};
    for (int l = 0; l < LANES<float>; ++l) {
        const double v = double(u[l]) + double(rest[l]);
        e[l] = float(v / (1 - v));
    }
    return e;
}

#endif

INLINE Doubles inverse_sqrt_excess(Doubles u, Doubles) {
    Doubles e = {};
    for (int l = 0; l < LANES<double>; ++l) {
        const double y = 1 / sqrt(1 - u[l]);
        e[l] = u[l] * y * y / (1 + y);
    }
    return e;
}

INLINE Doubles inverse_excess(Doubles u, Doubles) { return u / (1 - u); }

// --- elements of the four types ---------------------------------------------------------------------------------

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

INLINE float as_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

INLINE double widen(double x) { return x; }
INLINE float widen(float x) { return x; }
INLINE float widen(Bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }

INLINE float widen(Float16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    // Shift exponent and fraction into place; the multiplication moves the bias and normalises what is subnormal.
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    const bool special = (x.bits & 0x7c00) == 0x7c00;
    const float value = special ? as_float(rest | 0x7f800000) : as_float(rest) * as_float(0x77800000);
    return as_float(as_bits(value) | sign);
#endif
}

// Rounded to nearest, ties to even, NaN kept.
template <class E, class T>
struct Round {
    static INLINE E to(T x) { return E(x); }
};

INLINE Bfloat16 round_bfloat16(float x) {
    const uint32_t bits = as_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

INLINE Float16 round_float16(float x) {
#if defined(__F16C__)
    return {uint16_t(_cvtss_sh(x, 0))};
#else
    const uint32_t sign = (as_bits(x) >> 16) & 0x8000, bits = as_bits(x) & 0x7fffffff;
    if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
    if (bits < 0x38800000)  // subnormal: adding 1/2 puts its unit at the end of a float, which rounds it
        return {uint16_t(sign | (as_bits(as_float(bits) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | ((bits + 0xc8000fff + ((bits >> 13) & 1)) >> 13))};
#endif
}

// A double goes to 16 bits by way of a float rounded to odd, so that it is rounded once in effect.
INLINE float round_to_odd(double x) {
    const float near = float(x);
    if (double(near) == x || x != x || near - near != 0) return near;
    const uint32_t bits = as_bits(near);
    if (bits & 1) return near;
    const bool past = __builtin_fabs(double(near)) > __builtin_fabs(x);
    return as_float(past ? bits - 1 : bits + 1);
}

INLINE float narrow(float x) { return x; }
INLINE float narrow(double x) { return round_to_odd(x); }

template <class T>
struct Round<Bfloat16, T> {
    static INLINE Bfloat16 to(T x) { return round_bfloat16(narrow(x)); }
};
template <class T>
struct Round<Float16, T> {
    static INLINE Float16 to(T x) { return round_float16(narrow(x)); }
};

// Calls f with a pointer to the elements of a matrix.
template <class F>
INLINE void with_elements(const Matrix& matrix, F f) {
    switch (matrix.type) {
        case Type::float64:
            return f(static_cast<double*>(matrix.data));
        case Type::float32:
            return f(static_cast<float*>(matrix.data));
        case Type::bfloat16:
            return f(static_cast<Bfloat16*>(matrix.data));
        case Type::float16:
            return f(static_cast<Float16*>(matrix.data));
    }
}

}  // namespace
