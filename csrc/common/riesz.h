#pragma once

#include <math.h>

#include "common/matrix.h"

// The energy of a pair of unit rows w / (|w| + EPSILON), in fp64.
namespace sphere {

constexpr double EPSILON = 1e-8;
constexpr double NEAR = 1e-3;    // squared distances below it are recomputed from the difference of the rows
constexpr double CLAMP = 1e-12;  // the smallest squared distance
constexpr double PI = 3.14159265358979323846;

// In an unnamed namespace, since files of several instruction sets include it.
namespace {

SHARED_CODE inline double riesz_value(double square, double s) {  // f_s(t) from t^2
    if (s == 1) return 1 / sqrt(square);
    if (s == 2) return 1 / square;
#if defined(__CUDACC__) || defined(CUDA_CPU_SHIM)  // where pow takes too many registers
    return s == 0 ? -0.5 * log(square) : exp(log(square) * (-0.5 * s));
#else
    return s == 0 ? -0.5 * log(square) : pow(square, -0.5 * s);
#endif
}

// NaN stays, and what a lower infinity leaves is no plausible number.
SHARED_CODE inline double clamped(double square) { return square < CLAMP ? CLAMP + (square - square) : square; }

SHARED_CODE inline double angle_from(double square) {  // arccos(g) of 2 - 2 g, for g >= 0
    return 2 * asin(0.5 * sqrt(square < 0 ? 0.0 : square));
}

SHARED_CODE inline double deficit_of(double norm) {  // 1 - |unit row|^2, without cancellation
    const double length = norm + EPSILON;
    return EPSILON * (norm + length) / (length * length);
}

SHARED_CODE inline double antipode_square(double norm, bool angular) {  // squared distance of a row to its own negative
    const double ratio = norm / (norm + EPSILON);
    if (!angular) return clamped(4 * ratio * ratio);
    const double angle = PI - angle_from(2 * deficit_of(norm));
    return angle * angle;
}

// The exponent, where the excess of a pair over a right angle's energy has a formula; else 0.
inline int fast_exponent(const Riesz& riesz) {
    if (riesz.angular || riesz.half_space) return 0;
    return riesz.s == 1 ? 1 : riesz.s == 2 ? 2 : 0;
}

}  // namespace

}  // namespace sphere
