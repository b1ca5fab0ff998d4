#pragma once

#include <math.h>

#include "cpu/kernels.h"

// The energy of one pair in fp64. In an unnamed namespace, since files of several instruction sets include it.
namespace {

constexpr double PI = 3.14159265358979323846;

inline double riesz_value(double square, double s) {  // f_s(t) from t^2
    if (s == 1) return 1 / sqrt(square);
    if (s == 2) return 1 / square;
    return s == 0 ? -0.5 * log(square) : pow(square, -0.5 * s);
}

inline double riesz_slope(double square, double s) {  // -f_s'(t) / t from t^2; zero where the distance is clamped
    if (square <= sphere::CLAMP) return 0;
    return s == 0 ? 1 / square : s * riesz_value(square, s) / square;
}

// NaN stays, and what a lower infinity leaves is no plausible number.
inline double clamped(double square) { return square < sphere::CLAMP ? sphere::CLAMP + (square - square) : square; }

inline double angle_from(double square) { return 2 * asin(0.5 * sqrt(square < 0 ? 0 : square)); }  // of 2 - 2 g

// The energy of a pair of orthogonal rows of length 1.
inline double right_angle_value(const sphere::Riesz& riesz) {
    const double value = riesz_value(riesz.angular ? PI * PI / 4 : 2, riesz.s);
    return riesz.half_space ? 2 * value : value;
}

inline double lack_of(double norm) {  // 1 - |unit row|^2
    const double length = norm + sphere::EPSILON;
    return sphere::EPSILON * (norm + length) / (length * length);
}

// Squared distance of a row to its own negative.
inline double antipode_square(double norm, bool angular) {
    const double ratio = norm / (norm + sphere::EPSILON);
    if (!angular) return clamped(4 * ratio * ratio);
    const double angle = PI - angle_from(2 * lack_of(norm));
    return angle * angle;
}

// Coefficient of the unit row in the gradient of the energy between a row and its own negative.
inline double antipode_slope(double norm, const sphere::Riesz& riesz) {
    const double slope = riesz_slope(antipode_square(norm, riesz.angular), riesz.s);
    if (!riesz.angular) return -4 * slope;
    const double angle = angle_from(2 * lack_of(norm));
    return -2 * slope * (PI - angle) / sin(angle);
}

}  // namespace
