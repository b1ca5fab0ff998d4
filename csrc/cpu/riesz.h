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

// The exponent, where a tile's pairs are computed in vectors; else 0.
inline int fast_exponent(const sphere::Riesz& riesz) {
    if (riesz.angular || riesz.half_space) return 0;
    return riesz.s == 1 ? 1 : riesz.s == 2 ? 2 : 0;
}

// What is taken from every pair's energy before it is summed: the value at a right angle where the sums are of fp32.
inline double baseline(const sphere::Riesz& riesz) { return fast_exponent(riesz) ? riesz_value(2, riesz.s) : 0; }

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
