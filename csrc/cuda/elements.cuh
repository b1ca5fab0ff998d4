#pragma once

#include "cuda/device.cuh"
#include "cuda/launch.h"

// Elements of the four types, to and from what is computed with.
namespace sphere::cuda {

__device__ inline double widened(double x) { return x; }
__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widened(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, double& to) { to = x; }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half(x); }

__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(double x, float& to) { to = float(x); }

// Rounded towards zero with an odd last bit where that is inexact: what rounds it further rounds as if it was the
// first.
__device__ inline float to_odd(double x) {
    const float nearest = float(x);
    if (!(nearest < x || nearest > x)) return nearest;
    const uint32_t bits = __float_as_uint(nearest);
    return __uint_as_float((fabs(double(nearest)) > fabs(x) ? bits - 1 : bits) | 1);
}
__device__ inline void narrow(double x, __nv_bfloat16& to) { to = __float2bfloat16(to_odd(x)); }
__device__ inline void narrow(double x, __half& to) { to = __float2half(to_odd(x)); }

// The element `offset` elements on.
__device__ inline double element(const void* data, Type type, int64_t offset) {
    if (type == Type::float64) return static_cast<const double*>(data)[offset];
    if (type == Type::float32) return static_cast<const float*>(data)[offset];
    if (type == Type::bfloat16) return widened(static_cast<const __nv_bfloat16*>(data)[offset]);
    return widened(static_cast<const __half*>(data)[offset]);
}

// Rounds x to that element.
template <class T>
__device__ inline void set_element(void* data, Type type, int64_t offset, T x) {
    if (type == Type::float64)
        narrow(x, static_cast<double*>(data)[offset]);
    else if (type == Type::float32)
        narrow(x, static_cast<float*>(data)[offset]);
    else if (type == Type::bfloat16)
        narrow(x, static_cast<__nv_bfloat16*>(data)[offset]);
    else
        narrow(x, static_cast<__half*>(data)[offset]);
}

}  // namespace sphere::cuda
