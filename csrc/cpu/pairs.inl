// Energies and slopes of the pairs in a tile of inner products.

#pragma once

#include "cpu/packing.inl"
#include "cpu/riesz.h"

namespace {

// --- one pair, in fp64: any exponent and distance, near pairs, the edges of a tile -------------------------------

template <class T>
INLINE double scale_of(const UnitRows<T>& rows, int64_t i) {
    if (rows.own_scale) return rows.scale[i];
    double norm;
    row_norms<T>(*rows.weight, i, 1, &norm);
    return 1 / (norm + EPSILON);
}

// |unit_i - sign unit_j|^2 from the rows themselves.
template <class T>
double exact_square(const UnitRows<T>& rows, int64_t i, int64_t j, int sign) {
    constexpr int64_t PARTS = 16;  // sums side by side, for the compiler to keep in vectors
    const Matrix& m = *rows.weight;
    const double scale = scale_of(rows, i), other = sign * scale_of(rows, j);
    double sums[PARTS] = {};
    with_elements(m, [&](auto* elements) {
        auto *left = elements + i * m.row_stride, *right = elements + j * m.row_stride;
        const auto add = [&](int64_t k, int64_t part, int64_t stride) {
            const double x = widen(left[k * stride]) * scale - widen(right[k * stride]) * other;
            sums[part] += x * x;
        };
        int64_t k = 0;
        if (m.col_stride == 1)
            for (; k + PARTS <= m.cols; k += PARTS)
                for (int64_t part = 0; part < PARTS; ++part) add(k + part, part, 1);
        for (; k < m.cols; ++k) add(k, k % PARTS, m.col_stride);
    });
    double total = 0;
    for (double part : sums) total += part;
    return total;
}

// |unit_i - sign unit_j|^2, and whether that is a near pair.
template <class T>
INLINE double euclidean_square(const UnitRows<T>& rows, double g, int64_t i, int64_t j, int sign, bool& near) {
    const double square = 2 - 2 * sign * g - (rows.deficit[i] + rows.deficit[j]);
    near = square < NEAR;
    return clamped(near && rows.weight ? exact_square(rows, i, j, sign) : square);
}

// Angle of unit_i to the nearer of unit_j and -unit_j; the pair's sign says which.
struct Folded {
    double angle;
    int sign;
    bool near;
    double whole() const { return sign < 0 ? PI - angle : angle; }
};

template <class T>
INLINE Folded folded_angle(const UnitRows<T>& rows, double g, int64_t i, int64_t j) {
    const int sign = g < 0 ? -1 : 1;
    const double square = 2 - 2 * fabs(g);
    if (!(square < NEAR && rows.weight)) return {angle_from(square), sign, square < NEAR};
    const double exact = exact_square(rows, i, j, sign);
    return {angle_from(exact + rows.deficit[i] + rows.deficit[j]), sign, true};
}

template <class T>
double pair_value(const UnitRows<T>& rows, const Riesz& riesz, double g, int64_t i, int64_t j) {
    if (riesz.angular) {
        const double angle = folded_angle(rows, g, i, j).whole();
        const double value = riesz_value(clamped(angle * angle), riesz.s);
        return riesz.half_space ? value + riesz_value(clamped((PI - angle) * (PI - angle)), riesz.s) : value;
    }
    bool near;
    const double value = riesz_value(euclidean_square(rows, g, i, j, 1, near), riesz.s);
    return riesz.half_space ? value + riesz_value(euclidean_square(rows, g, i, j, -1, near), riesz.s) : value;
}

struct Slope {
    double bulk;    // coefficient of unit_j in the derivative of the pair's energy in unit_i
    double radial;  // coefficient of unit_i
};

template <class T>
Slope pair_slope(const UnitRows<T>& rows, const Riesz& riesz, double g, double weight, int64_t i, int64_t j,
                 NearPairs* list) {
    Slope found = {0, 0};
    if (riesz.angular) {
        const Folded folded = folded_angle(rows, g, i, j);
        const double angle = folded.whole();
        double slope = angle * riesz_slope(angle * angle, riesz.s);
        if (riesz.half_space) slope -= (PI - angle) * riesz_slope((PI - angle) * (PI - angle), riesz.s);
        slope = folded.angle * folded.angle <= CLAMP ? 0 : weight * slope / sin(folded.angle);
        if (!folded.near) return {slope, 0};
        // slope unit_j = sign slope (sign unit_j - unit_i) + sign slope unit_i
        if (slope != 0) list->add(list, {i, j, folded.sign, folded.sign * slope});
        return {0, folded.sign * slope};
    }
    for (int sign = 1; sign >= (riesz.half_space ? -1 : 1); sign -= 2) {
        bool near;
        const double slope = weight * riesz_slope(euclidean_square(rows, g, i, j, sign, near), riesz.s);
        if (near) {
            if (slope != 0) list->add(list, {i, j, sign, slope});
        } else {
            found.bulk += sign * slope;
            found.radial -= slope;
        }
    }
    return found;
}

// --- a vector of far pairs: Euclidean, s = 1 or 2 -----------------------------------------------------------------

// With u = 1 - t^2 / 2, which for unit rows is their inner product, f_s(t) = f_s(sqrt(2)) (1 + excess).
template <int S, class V>
INLINE V fast_excess(V u, V rest) {
    if constexpr (S == 1)
        return inverse_sqrt_excess(u, rest);
    else
        return inverse_excess(u, rest);
}

// -f_s'(t) / t over its value at a right angle.
template <class T, int S>
constexpr T RIGHT_ANGLE_SLOPE = T(S == 1 ? 0.35355339059327376 : 0.5);

template <int S, class V>
INLINE V fast_slope(V u) {
    const V y = 1 + fast_excess<S>(u, V{});
    return S == 1 ? y * y * y : y * y;
}

// Visits a tile strip by strip, vector by vector. far(i, r, c, u, rest) gives the vector's contribution to both sums,
// over `unit`, where all of its pairs count and are far; other vectors go to single(i, r, c, g) -> double, pair by
// pair. S = 0: all of them do.
template <class T, int S, class Far, class Single>
INLINE void visit(const PairTile<T>& tile, const UnitRows<T>& rows, double unit, double* row_sums, double* col_sums,
                  Far far, Single single) {
    constexpr int P = LANES<T>, R = STRIP<T>;
    for (int64_t j = 0; j < tile.cols; ++j) col_sums[j] = 0;
    for (int64_t r = 0; r < tile.rows; r += R) {
        const int strip = int(tile.rows - r < R ? tile.rows - r : R);
        Vector<T> totals[R] = {};
        for (int q = 0; q < strip; ++q) row_sums[r + q] = 0;
        for (int64_t c = 0; c < tile.cols; c += P) {
            const int64_t first = tile.first_col + c;
            const bool inside = c + P <= tile.cols && first > tile.first_row + r + strip - 1;
            Vector<T> column = {};
            for (int q = 0; q < strip; ++q) {
                const int64_t i = tile.first_row + r + q;
                const T* g = tile.gram + (r + q) * TILE + c;
                if constexpr (S != 0)
                    if (inside) {
                        const Vector<T> deficit = rows.half_deficit[i] + load(rows.half_deficit + first);
                        const Vector<T> u = load(g) + deficit, rest = deficit - (u - load(g));
                        if (!any_below(1 - u, T(NEAR / 2))) {
                            const Vector<T> value = far(i, r + q, c, u, rest);
                            totals[q] += value;
                            column += value;
                            continue;
                        }
                    }
                const int64_t valid = tile.cols - c < P ? tile.cols - c : P;
                for (int l = 0; l < valid; ++l) {
                    const double value = first + l > i ? single(i, r + q, c + l, g[l]) : 0;
                    row_sums[r + q] += value;
                    col_sums[c + l] += value;
                }
            }
            if constexpr (S != 0)
                if (inside)
                    for (int l = 0; l < P; ++l) col_sums[c + l] += unit * column[l];
        }
        if constexpr (S != 0)
            for (int q = 0; q < strip; ++q) row_sums[r + q] += unit * sum<T>(totals[q]);
    }
}

template <class T, int S>
void energy_of(const PairTile<T>& tile, const UnitRows<T>& rows, const Riesz& riesz, double* row_sums,
               double* col_sums) {
    const double unit = baseline(riesz);
    visit<T, S>(
        tile, rows, unit, row_sums, col_sums,
        [&](int64_t, int64_t, int64_t, Vector<T> u, Vector<T> rest) { return fast_excess<S == 2 ? 2 : 1>(u, rest); },
        [&](int64_t i, int64_t, int64_t c, T g) { return pair_value(rows, riesz, g, i, tile.first_col + c) - unit; });
}

template <class T>
void energy_tile(const PairTile<T>& tile, const UnitRows<T>& rows, const Riesz& riesz, double* row_sums,
                 double* col_sums) {
    switch (fast_exponent(riesz)) {
        case 1:
            return energy_of<T, 1>(tile, rows, riesz, row_sums, col_sums);
        case 2:
            return energy_of<T, 2>(tile, rows, riesz, row_sums, col_sums);
        default:
            return energy_of<T, 0>(tile, rows, riesz, row_sums, col_sums);
    }
}

template <class T, int S>
void slopes_of(const PairTile<T>& tile, const UnitRows<T>& rows, const Riesz& riesz, T* slopes, int64_t ld,
               double* row_sums, double* col_sums, NearPairs* near) {
    for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t c = 0; c < tile.cols; ++c) slopes[r * ld + c] = 0;
    visit<T, S>(
        tile, rows, 1, row_sums, col_sums,
        [&](int64_t i, int64_t r, int64_t c, Vector<T> u, Vector<T>) {
            const Vector<T> weight = rows.narrow_upstream[i] + load(rows.narrow_upstream + tile.first_col + c);
            const Vector<T> slope = RIGHT_ANGLE_SLOPE<T, S> * weight * fast_slope<S == 2 ? 2 : 1>(u);
            store(slopes + r * ld + c, slope);
            return -slope;
        },
        [&](int64_t i, int64_t r, int64_t c, T g) {
            const int64_t j = tile.first_col + c;
            const double weight = rows.upstream[i] + rows.upstream[j];
            const Slope found = pair_slope(rows, riesz, g, weight, i, j, near);
            slopes[r * ld + c] = T(found.bulk);
            return found.radial;
        });
}

template <class T>
void slopes_tile(const PairTile<T>& tile, const UnitRows<T>& rows, const Riesz& riesz, T* slopes, int64_t ld,
                 double* row_sums, double* col_sums, NearPairs* near) {
    switch (fast_exponent(riesz)) {
        case 1:
            return slopes_of<T, 1>(tile, rows, riesz, slopes, ld, row_sums, col_sums, near);
        case 2:
            return slopes_of<T, 2>(tile, rows, riesz, slopes, ld, row_sums, col_sums, near);
        default:
            return slopes_of<T, 0>(tile, rows, riesz, slopes, ld, row_sums, col_sums, near);
    }
}

template <class T>
INLINE T cosine(T product, double scale, double other) {
    const double x = product;
    return T((x + (x - x)) * scale * other);  // infinity becomes NaN
}

template <class T>
void cosine_tile(const T* gram, int64_t ld, const PairTile<T>& tile, const double* scale, T* c) {
    for (int64_t r = 0; r < tile.rows; ++r, c += TILE) {
        const int64_t i = tile.first_row + r;
        const double own = scale[i];
        const double* others = scale + tile.first_col;
        const T* row = gram + i * ld + tile.first_col;
        for (int64_t j = i < tile.first_col ? 0 : i + 1 - tile.first_col; j < tile.cols; ++j)
            c[j] = cosine(row[j], own, others[j]);
    }
}

template <class T>
void update_tile(T* c, const PairTile<T>& tile, const double* scale, T* gram, int64_t ld) {
    for (int64_t r = 0; r < tile.rows; ++r, c += TILE) {
        const int64_t i = tile.first_row + r;
        const double own = scale[i];
        const double* others = scale + tile.first_col;
        T* row = gram + i * ld + tile.first_col;
        for (int64_t j = i < tile.first_col ? 0 : i + 1 - tile.first_col; j < tile.cols; ++j) {
            row[j] += c[j];
            c[j] = cosine(row[j], own, others[j]);
        }
    }
}

}  // namespace
