// The kernels of every instruction set that runs here, against loops in fp64. Made for sanitizers: buffers are of exact
// size and on the heap, and what the kernels allocate begins as NaN.

#include <cstdlib>
#include <new>
#include <string>

#include "cpu/gram.h"
#include "cpu/pair_energy.h"
#include "cpu/projection.h"
#include "cpu/tiers.h"
#include "naive.h"

using namespace sphere;

// What `Buffer` calls. Its size is not rounded up, as aligned_alloc would have it, so that an overrun is seen.
void* operator new(std::size_t size, std::align_val_t alignment) {
    void* data = nullptr;
    if (posix_memalign(&data, std::size_t(alignment), size ? size : 1)) throw std::bad_alloc();
    return std::memset(data, 0xff, size);
}
void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }

namespace {

int failures = 0;
std::string where;

void compare(const char* what, const Dense& actual, const Dense& expected, double tolerance) {
    double size = 0;
    for (double x : expected) size = std::fmax(size, std::fabs(x));
    for (size_t i = 0; i < expected.size(); ++i)
        if (!(std::fabs(actual[i] - expected[i]) <= tolerance * (size + 1e-30))) {
            std::fprintf(stderr, "%s, %s: element %zu is %.17g, expected %.17g\n", where.c_str(), what, i, actual[i],
                         expected[i]);
            ++failures;
            return;
        }
}

template <class T>
constexpr double ROUNDING = sizeof(T) == 4 ? 4e-6 : 1e-11;

constexpr Riesz KINDS[] = {{1, false, false}, {2, false, false}, {0, false, true}, {3, true, false}, {1, true, true}};

template <class T>
void check_energy(const Exact& weight, int tier, int threads) {
    const int64_t n = weight.matrix.rows, d = weight.matrix.cols;
    const Dense values = weight.values(), upstream = random_values(n);
    for (const Riesz& riesz : KINDS) {
        if (size_of(weight.matrix.type) == 2 && riesz.s != 1) continue;  // only reading differs from fp32
        const Exact energies(Type::float64, n, 1, Exact::BY_ROWS, {}), gradient(type_of<T>, n, d, Exact::BY_ROWS, {});
        const Exact factors(Type::float64, n, 1, Exact::BY_ROWS, upstream);
        pair_energy<T>(weight.matrix, riesz, tier, threads, static_cast<double*>(energies.matrix.data));
        // In few dimensions pairs are close, and their distances cancel.
        if (d > 6) compare("energy", energies.values(), energies_of(values, n, d, riesz), 100 * ROUNDING<T>);
        pair_energy_backward<T>(static_cast<const double*>(factors.matrix.data), weight.matrix, riesz, tier, threads,
                                static_cast<T*>(gradient.matrix.data));
        if (d < 7 || n < 2 || n * d > 3000) {
            for (double x : gradient.values())
                if (x != x) compare("gradient", {x}, {0}, 1);
            continue;
        }
        // Along a direction, by a difference of two energies.
        const Dense direction = random_values(n * d);
        double slope[2] = {0, 0}, along = 0;
        for (int side = 0; side < 2; ++side) {
            Dense moved = values;
            for (size_t k = 0; k < moved.size(); ++k) moved[k] += (side ? -1e-5 : 1e-5) * direction[k];
            const Dense each = energies_of(moved, n, d, riesz);
            for (size_t i = 0; i < each.size(); ++i) slope[side] += upstream[i] * each[i];
        }
        const Dense found = gradient.values();
        double size = 0;
        for (size_t k = 0; k < found.size(); ++k)
            along += found[k] * direction[k], size += std::fabs(found[k] * direction[k]);
        compare("gradient", {along, size}, {(slope[0] - slope[1]) / 2e-5, size}, 1e-4);
    }
}

template <class T>
void check_gram(const Exact& weight, int tier, int threads) {
    const int64_t n = weight.matrix.rows, d = weight.matrix.cols;
    for (int normalize = 0; normalize < 2; ++normalize) {
        const Dense rows = normalize ? unit_rows(weight.values(), n, d) : weight.values();
        const Exact out(type_of<T>, n, n, Exact::BY_ROWS, {});
        gram<T>(weight.matrix, normalize != 0, tier, threads, static_cast<T*>(out.matrix.data));
        compare("gram", out.values(), multiply(rows, turned(rows, n, d), n, d, n), ROUNDING<T>);
    }
}

template <class T>
void check_update(const Exact& weight, int64_t b, Exact::Layout layout, int tier, int threads) {
    const int64_t n = weight.matrix.rows, d = weight.matrix.cols;
    const Dense before = weight.values(), left = random_values(n * b), right = random_values(b * d);
    Dense after = multiply(left, right, n, b, d);
    for (size_t i = 0; i < after.size(); ++i) after[i] += before[i];
    const auto products = [&](const Dense& rows, int64_t count) {
        return multiply(rows, turned(rows, count, d), count, d, count);
    };
    const Exact updated(weight.matrix.type == Type::float64 ? Type::float64 : Type::float32, n, d, layout, after);
    const Exact r(type_of<T>, n, b, layout, left), inner(type_of<T>, b, b, layout, products(right, b));
    const Exact cross(type_of<T>, n, b, layout, multiply(before, turned(right, b, d), n, d, b));
    for (const Riesz& riesz : KINDS)
        for (int known = 0; known < 2; ++known) {
            const Exact matrix(type_of<T>, n, n, Exact::BY_ROWS, products(before, n));
            const Exact energies(Type::float64, n, 1, Exact::BY_ROWS, {});
            gram_update_energy<T>(matrix.matrix, r.matrix, cross.matrix, inner.matrix,
                                  known ? &updated.matrix : nullptr, riesz, tier, threads,
                                  static_cast<double*>(energies.matrix.data));
            compare("updated gram", matrix.values(), products(after, n), ROUNDING<T>);
            if (d > 6) compare("energy of it", energies.values(), energies_of(after, n, d, riesz), 300 * ROUNDING<T>);
            const auto first = energies.values();
            gram_energy<T>(matrix.matrix, known ? &updated.matrix : nullptr, riesz, tier, threads,
                           static_cast<double*>(energies.matrix.data));
            compare("energy of a kept gram", energies.values(), first, 0);
        }
}

template <class T>
void check_subtraction(const Exact& factor, int tier, int threads) {
    const int64_t n = factor.matrix.rows, b = factor.matrix.cols;
    const Dense some = random_values(n * n);
    Dense upper(some.size(), std::nan("")), expected(some.size());  // of what comes in, no more than that is read
    const Dense products = multiply(factor.values(), turned(factor.values(), n, b), n, b, n);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = i; j < n; ++j) {
            upper[size_t(i * n + j)] = some[size_t(i * n + j)];
            expected[size_t(i * n + j)] = expected[size_t(j * n + i)] =
                some[size_t(i * n + j)] - products[size_t(i * n + j)];
        }
    const Exact from(type_of<T>, n, n, Exact::BY_ROWS, upper);
    subtract_gram<T>(from.matrix, factor.matrix, tier, threads);
    compare("difference", from.values(), expected, ROUNDING<T>);
    // Every second row and the first third of the columns of something larger.
    const Exact larger(type_of<T>, 2 * n, 3 * n, Exact::BY_ROWS, {});
    Matrix inside = larger.matrix;
    inside.rows = inside.cols = n, inside.row_stride *= 2;
    T* const elements = static_cast<T*>(inside.data);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = i; j < n; ++j) elements[i * inside.row_stride + j] = T(some[size_t(i * n + j)]);
    subtract_gram<T>(inside, factor.matrix, tier, threads);
    const Dense after = larger.values();
    Dense found, outside;
    for (int64_t i = 0; i < 2 * n; ++i)
        for (int64_t j = 0; j < 3 * n; ++j) {
            const double x = after[size_t(i * 3 * n + j)];
            if (i % 2 == 0 && j < n)
                found.push_back(x);
            else
                outside.push_back(x != x ? 0 : 1);
        }
    compare("difference within", found, expected, ROUNDING<T>);
    compare("what is around it", outside, Dense(outside.size()), 0);
}

template <class T>
void check_projection(Type type, int64_t n, int64_t b, int64_t d, int64_t r, Exact::Layout layout, int tier,
                      int threads) {
    const Exact update(type, n, d, layout, random_values(n * d)), basis(type, d, r, layout, random_values(d * r));
    const Exact left(type, n, b, layout, random_values(n * b)), right(type, b, d, layout, random_values(b * d));
    const auto projected = [&](const Exact& m, int64_t rows) {
        const Dense part = multiply(m.values(), basis.values(), rows, d, r);
        const Dense inside = multiply(part, turned(basis.values(), d, r), rows, r, d);
        Dense all = m.values();
        for (size_t i = 0; i < all.size(); ++i) all[i] -= 0.25 * inside[i];
        return all;
    };
    const double tolerance = type == Type::bfloat16 ? 0.004 : type == Type::float16 ? 0.0005 : ROUNDING<T>;
    for (int low_rank = 0; low_rank < 2; ++low_rank)
        for (int accumulate = 0; accumulate < 2; ++accumulate) {
            const Dense start = random_values(n * d);
            const Exact out(type, n, d, layout, accumulate ? start : Dense{});
            Dense expected = low_rank ? multiply(left.values(), projected(right, b), n, b, d) : projected(update, n);
            if (accumulate)
                for (size_t i = 0; i < expected.size(); ++i) expected[i] += out.values()[i];
            project<T>(low_rank ? right.matrix : update.matrix, basis.matrix, 0.25, low_rank ? &left.matrix : nullptr,
                       out.matrix, accumulate != 0, tier, threads);
            compare("projection", out.values(), expected, tolerance);
        }
}

template <class T>
void check(Type type, int tier, int threads) {
    const std::string name = built_tiers()[size_t(tier)] + ", type " + std::to_string(int(type));
    const Exact::Layout layouts[] = {Exact::BY_ROWS, Exact::BY_COLUMNS, Exact::SPREAD};
    constexpr int64_t SIZES[][2] = {{0, 5},   {1, 1},  {1, 7},  {2, 3},   {3, 1},   {4, 9},    {5, 8},   {7, 15},
                                    {8, 17},  {9, 31}, {15, 3}, {16, 33}, {17, 65}, {31, 127}, {33, 16}, {48, 5},
                                    {49, 64}, {65, 7}, {95, 4}, {96, 3},  {97, 9},  {3, 0},    {10, 300}};
    for (const auto& size : SIZES)
        for (const auto layout : layouts) {
            const int64_t n = size[0], d = size[1];
            where = name + ", " + std::to_string(n) + " x " + std::to_string(d) + ", layout " + std::to_string(layout);
            Dense values = random_values(n * d);
            if (n > 8)  // a near pair, an opposite one, a zero row
                for (int64_t k = 0; k < d; ++k) {
                    values[size_t(5 * d + k)] = values[size_t(d + k)] * 1.0625;
                    values[size_t(6 * d + k)] = -values[size_t(2 * d + k)];
                    values[size_t(7 * d + k)] = 0;
                }
            const Exact coincident(type, n, d, layout, values), generic(type, n, d, layout, random_values(n * d));
            const Exact out(Type::float64, n, 1, Exact::BY_ROWS, {}), gradient(type_of<T>, n, d, Exact::BY_ROWS, {});
            for (const Riesz& riesz : KINDS) {  // for the sanitizers: what they are is tested from Python
                pair_energy<T>(coincident.matrix, riesz, tier, threads, static_cast<double*>(out.matrix.data));
                pair_energy_backward<T>(static_cast<const double*>(out.matrix.data), coincident.matrix, riesz, tier,
                                        threads, static_cast<T*>(gradient.matrix.data));
            }
            if (layouts[(n + d + int64_t(type)) % 3] != layout) continue;  // loops in fp64 take their time
            check_energy<T>(generic, tier, threads);
            check_gram<T>(coincident, tier, threads);
            if (type == type_of<T>) {
                check_update<T>(generic, 1 + n % 4, layout, tier, threads);
                check_subtraction<T>(generic, tier, threads);
            }
            check_projection<T>(type, n, 1 + n % 5, d, d / 2, layout, tier, threads);
            check_projection<T>(type, d, 0, n, 1, layout, tier, threads);
        }
}

// More than one tile, group and chunk; too long for loops, so finiteness is all that is asked.
template <class T>
void check_large(int tier, int threads) {
    constexpr int64_t SIZES[][2] = {{1100, 3}, {3100, 2}, {60, 60000}, {6200, 4}};
    for (const auto& size : SIZES) {
        const int64_t n = size[0], d = size[1];
        const Exact weight(type_of<T>, n, d, Exact::BY_ROWS, random_values(n * d));
        const Exact energies(Type::float64, n, 1, Exact::BY_ROWS, {}), gradient(type_of<T>, n, d, Exact::BY_ROWS, {});
        where = built_tiers()[size_t(tier)] + ", " + std::to_string(n) + " x " + std::to_string(d);
        pair_energy<T>(weight.matrix, {1, false, false}, tier, threads, static_cast<double*>(energies.matrix.data));
        pair_energy_backward<T>(static_cast<const double*>(energies.matrix.data), weight.matrix, {1, false, false},
                                tier, threads, static_cast<T*>(gradient.matrix.data));
        const Exact matrix(type_of<T>, n < 2000 ? n : 0, n < 2000 ? n : 0, Exact::BY_ROWS,
                           Dense(size_t(n < 2000 ? n * n : 0)));
        if (n < 2000) subtract_gram<T>(matrix.matrix, weight.matrix, tier, threads);
        for (const Exact* result : {&energies, &gradient, &matrix})
            for (double x : result->values())
                if (!(std::fabs(x) < 1e30)) {
                    std::fprintf(stderr, "%s: %g\n", where.c_str(), x);
                    ++failures;
                    return;
                }
    }
}

}  // namespace

int main() {
    const auto built = built_tiers(), usable = usable_tiers();
    for (size_t tier = 0; tier < built.size(); ++tier) {
        bool runs = false;
        for (const auto& name : usable) runs |= name == built[tier];
        if (!runs) continue;
        check<float>(Type::float32, int(tier), 2);
        check<double>(Type::float64, int(tier), 2);
        check<float>(Type::bfloat16, int(tier), 1);
        check<float>(Type::float16, int(tier), 1);
        check_large<float>(int(tier), 2);
        check_large<double>(int(tier), 2);
        std::printf("%s: %d failures\n", built[tier].c_str(), failures);
    }
    return failures != 0;
}
