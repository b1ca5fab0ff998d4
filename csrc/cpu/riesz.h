#pragma once

#include "common/riesz.h"

// In an unnamed namespace, since files of several instruction sets include it.
namespace sphere {
namespace {

inline double riesz_slope(double square, double s) {  // -f_s'(t) / t from t^2; zero where the distance is clamped
    if (square <= CLAMP) return 0;
    return s == 0 ? 1 / square : s * riesz_value(square, s) / square;
}

// The constant subtracted from every pair's energy before the sums: the value at a right angle, for sums in fp32.
inline double baseline(const Riesz& riesz) { return fast_exponent(riesz) ? riesz_value(2, riesz.s) : 0; }

// Coefficient of the unit row in the gradient of the energy between a row and its own negative.
inline double antipode_slope(double norm, const Riesz& riesz) {
    const double slope = riesz_slope(antipode_square(norm, riesz.angular), riesz.s);
    if (!riesz.angular) return -4 * slope;
    const double angle = angle_from(2 * deficit_of(norm));
    return -2 * slope * (PI - angle) / sin(angle);
}

}  // namespace
}  // namespace sphere
