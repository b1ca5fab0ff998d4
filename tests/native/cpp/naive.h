#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "common/matrix.h"
#include "cpu/views.h"

// What the kernels compute, in loops in fp64, and matrices in buffers of exactly their size.

using sphere::Matrix;
using sphere::Riesz;
using sphere::Type;
using Dense = std::vector<double>;  // row after row

inline double random_number() {  // roughly normal, the same on every machine
    static uint64_t state = 88172645463325252u;
    double total = 0;
    for (int i = 0; i < 4; ++i) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        total += double(state >> 11) / 9007199254740992.0 - 0.5;
    }
    return total;
}

inline uint16_t cut_bits(float x) {  // to bfloat16, towards zero: what is left is what counts
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t(bits >> 16);
}

// A matrix and nothing around it: the first and the last byte belong to elements.
class Exact {
  public:
    enum Layout { BY_ROWS, BY_COLUMNS, SPREAD };

    Exact(Type type, int64_t rows, int64_t cols, Layout layout, const Dense& values) {
        const int64_t row = layout == BY_ROWS ? cols : layout == BY_COLUMNS ? 1 : 3 * cols + 2;
        const int64_t col = layout == BY_ROWS ? 1 : layout == BY_COLUMNS ? rows : 3;
        const int64_t last = rows && cols ? (rows - 1) * row + (cols - 1) * col + 1 : 0;
        data_ = std::malloc(size_t(last * sphere::size_of(type)));
        std::memset(data_, 0xff, size_t(last * sphere::size_of(type)));  // NaN between the elements
        matrix = {data_, type, rows, cols, row, col};
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < cols; ++j) set(i, j, values.empty() ? std::nan("") : values[size_t(i * cols + j)]);
    }
    ~Exact() { std::free(data_); }
    Exact(const Exact&) = delete;
    Exact& operator=(const Exact&) = delete;

    double get(int64_t i, int64_t j) const {
        const void* at = address(i, j);
        switch (matrix.type) {
            case Type::float64:
                return *static_cast<const double*>(at);
            case Type::float32:
                return *static_cast<const float*>(at);
            default:
                break;
        }
        const uint16_t bits = *static_cast<const uint16_t*>(at);
        if (matrix.type == Type::bfloat16) {
            const uint32_t wide = uint32_t(bits) << 16;
            float x;
            std::memcpy(&x, &wide, 4);
            return x;
        }
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        const double size = exponent == 31 ? (fraction ? std::nan("") : std::numeric_limits<double>::infinity())
                            : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                           : std::ldexp(fraction, -24);
        return bits >> 15 ? -size : size;
    }

    Dense values() const {
        Dense all;
        for (int64_t i = 0; i < matrix.rows; ++i)
            for (int64_t j = 0; j < matrix.cols; ++j) all.push_back(get(i, j));
        return all;
    }

    Matrix matrix;

  private:
    void* address(int64_t i, int64_t j) const { return sphere::part(matrix, i, 1, j, 1).data; }

    void set(int64_t i, int64_t j, double value) {
        void* at = address(i, j);
        switch (matrix.type) {
            case Type::float64:
                *static_cast<double*>(at) = value;
                return;
            case Type::float32:
                *static_cast<float*>(at) = float(value);
                return;
            case Type::bfloat16:
                *static_cast<uint16_t*>(at) = cut_bits(float(value));
                return;
            case Type::float16:
                break;
        }
        // Multiples of 2^-8 below 8 are exact in both formats; a NaN is one.
        const double steps = value != value ? 0 : std::fmin(std::fabs(std::round(value * 256)), 2047);
        int exponent = 0;
        const double half = std::frexp(steps, &exponent);
        const int fraction = steps ? int(std::round(half * 2048)) & 1023 : 0;
        const int biased = steps ? exponent - 1 - 8 + 15 : 0;
        const int bits = value != value ? 0x7e00 : (value < 0 ? 0x8000 : 0) | biased << 10 | fraction;
        *static_cast<uint16_t*>(at) = uint16_t(bits);
    }

    void* data_;
};

inline Dense random_values(int64_t count) {
    Dense values;
    for (int64_t i = 0; i < count; ++i) values.push_back(random_number());
    return values;
}

inline Dense multiply(const Dense& a, const Dense& b, int64_t rows, int64_t depth, int64_t cols) {
    Dense c(size_t(rows * cols));
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < depth; ++k)
            for (int64_t j = 0; j < cols; ++j)
                c[size_t(i * cols + j)] += a[size_t(i * depth + k)] * b[size_t(k * cols + j)];
    return c;
}

inline Dense turned(const Dense& a, int64_t rows, int64_t cols) {
    Dense t(a.size());
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) t[size_t(j * rows + i)] = a[size_t(i * cols + j)];
    return t;
}

inline Dense unit_rows(Dense rows, int64_t n, int64_t d) {
    for (int64_t i = 0; i < n; ++i) {
        double square = 0;
        for (int64_t k = 0; k < d; ++k) square += rows[size_t(i * d + k)] * rows[size_t(i * d + k)];
        for (int64_t k = 0; k < d; ++k) rows[size_t(i * d + k)] /= std::sqrt(square) + 1e-8;
    }
    return rows;
}

// Energy of a pair from its difference: f(t) for t, or for the angle.
inline double pair_energy_of(const double* x, const double* y, int64_t d, const Riesz& riesz) {
    double square = 0, inner = 0;
    for (int64_t k = 0; k < d; ++k) square += (x[k] - y[k]) * (x[k] - y[k]), inner += x[k] * y[k];
    const double t = riesz.angular ? std::acos(std::fmax(-1, std::fmin(1, inner))) : std::sqrt(square);
    return riesz.s == 0 ? -std::log(std::fmax(t, 1e-6)) : std::pow(std::fmax(t, 1e-6), -riesz.s);
}

inline Dense energies_of(const Dense& weight, int64_t n, int64_t d, const Riesz& riesz) {
    const Dense unit = unit_rows(weight, n, d);
    Dense minus = unit, energies(static_cast<size_t>(n));
    for (double& x : minus) x = -x;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) {
            if (i != j) energies[size_t(i)] += pair_energy_of(&unit[size_t(i * d)], &unit[size_t(j * d)], d, riesz);
            if (riesz.half_space)
                energies[size_t(i)] += pair_energy_of(&unit[size_t(i * d)], &minus[size_t(j * d)], d, riesz);
        }
    return energies;
}
