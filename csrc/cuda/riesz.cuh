#pragma once

#include "cpu/matrix.h"
#include "cuda/device.cuh"

// The energy of a pair in fp64 from `minus = |unit_i - unit_j|^2`, `plus = |unit_i + unit_j|^2` and `lack`, what the
// squares of the two rows lack to 2; and that of a far pair in fp32.
namespace sphere::cuda {

constexpr double EPSILON = 1e-8;  // unit row: w / (|w| + EPSILON)
constexpr double NEAR = 1e-3;     // squared distances below it are recomputed from the difference of the rows
constexpr double CLAMP = 1e-12;   // the smallest squared distance
constexpr double PI = 3.14159265358979323846;

// Whether a tile's energies are computed in fp32.
inline bool is_fast(const Riesz& riesz, bool wide) {
    return !wide && !riesz.angular && !riesz.half_space && (riesz.s == 1 || riesz.s == 2);
}

__device__ inline double infinity() { return double(INFINITY); }

__device__ inline double lack_of(double norm) {  // 1 - |unit row|^2, without cancellation
    const double length = norm + EPSILON;
    return EPSILON * (norm + length) / (length * length);
}

// NaN stays, and what a lower infinity leaves is no plausible number.
__device__ inline double clamped(double square) { return square < CLAMP ? CLAMP + (square - square) : square; }

__device__ inline double riesz_value(double square, double s) {  // f_s(t) from t^2
    if (s == 1) return 1 / sqrt(square);
    if (s == 2) return 1 / square;
    return s == 0 ? -0.5 * log(square) : exp(log(square) * (-0.5 * s));
}

__device__ inline double angle_from(double square) {  // arccos(g) of 2 - 2 g, for g >= 0
    return 2 * asin(0.5 * sqrt(square < 0 ? 0.0 : square));
}

__device__ inline bool is_near(double minus, double plus, double lack, const Riesz& riesz) {
    if (riesz.angular) return (plus < minus ? plus : minus) + lack < NEAR;
    return minus < NEAR || (riesz.half_space && plus < NEAR);
}

__device__ inline double pair_value(double minus, double plus, double lack, const Riesz& riesz) {
    double same = minus, opposite = plus;
    if (riesz.angular) {
        const bool flipped = plus < minus;
        const double folded = angle_from((flipped ? plus : minus) + lack);
        const double angle = flipped ? PI - folded : folded;
        same = angle * angle;
        const double other = flipped ? folded : PI - folded;
        opposite = other * other;
    }
    const double value = riesz_value(clamped(same), riesz.s);
    return riesz.half_space ? value + riesz_value(clamped(opposite), riesz.s) : value;
}

__device__ inline double antipode_square(double norm, bool angular) {  // distance of a row to its own negative
    const double ratio = norm / (norm + EPSILON);
    if (!angular) return clamped(4 * ratio * ratio);
    const double angle = PI - angle_from(2 * lack_of(norm));
    return angle * angle;
}

// f_s(t) / f_s(sqrt 2) - 1 for s = 1 or 2 of the unit rows' inner product g, infinity for a near pair: small, and so is
// its rounding.
__device__ inline float excess(float g, float half_lack, bool squared) {
    const float u = g + half_lack;           // 1 - t^2 / 2
    const float rest = half_lack - (u - g);  // what rounding took from it
    const float half_square = 1.0f - u;
    const float y = squared ? 1.0f / half_square : rsqrtf(half_square);
    const float value = squared ? u * y + y * y * rest : u * y * y / (1.0f + y) + 0.5f * (y * y * y) * rest;
    return half_square < float(0.5 * NEAR) ? float(infinity()) : value;
}

}  // namespace sphere::cuda
