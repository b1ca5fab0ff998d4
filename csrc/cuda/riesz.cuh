#pragma once

#include "common/riesz.h"
#include "cuda/device.cuh"

// The energy of a pair in fp64 from `minus = |unit_i - unit_j|^2`, `plus = |unit_i + unit_j|^2` and `deficit`, the sum
// of the two rows' deficits; and that of a far pair in fp32.
namespace sphere::cuda {

// Whether a tile's energies are computed in fp32.
inline bool is_fast(const Riesz& riesz, bool wide) { return !wide && fast_exponent(riesz); }

__device__ inline double infinity() { return double(INFINITY); }

__device__ inline bool is_near(double minus, double plus, double deficit, const Riesz& riesz) {
    if (riesz.angular) return (plus < minus ? plus : minus) + deficit < NEAR;
    return minus < NEAR || (riesz.half_space && plus < NEAR);
}

__device__ inline double pair_value(double minus, double plus, double deficit, const Riesz& riesz) {
    double same = minus, opposite = plus;
    if (riesz.angular) {
        const bool flipped = plus < minus;
        const double folded = angle_from((flipped ? plus : minus) + deficit);
        const double angle = flipped ? PI - folded : folded;
        same = angle * angle;
        const double other = flipped ? folded : PI - folded;
        opposite = other * other;
    }
    const double value = riesz_value(clamped(same), riesz.s);
    return riesz.half_space ? value + riesz_value(clamped(opposite), riesz.s) : value;
}

// f_s(t) / f_s(sqrt 2) - 1 for s = 1 or 2 of the unit rows' inner product g, infinity for a near pair: small, and so is
// its rounding.
__device__ inline float excess(float g, float half_deficit, bool squared) {
    const float u = g + half_deficit;           // 1 - t^2 / 2
    const float rest = half_deficit - (u - g);  // what rounding took from it
    const float half_square = 1.0f - u;
    const float y = squared ? 1.0f / half_square : rsqrtf(half_square);
    const float value = squared ? u * y + y * y * rest : u * y * y / (1.0f + y) + 0.5f * (y * y * y) * rest;
    return half_square < float(0.5 * NEAR) ? float(infinity()) : value;
}

}  // namespace sphere::cuda
