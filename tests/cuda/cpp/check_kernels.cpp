// The CUDA kernels on the CPU against loops in fp64, in every order of threads and with copies that land early and
// late: the bits must be the same in all of them. Every buffer ends at memory that must not be touched and begins as
// NaN.
//
// check_kernels [all|few] [name]: in all orders or in two; of all checks or of those whose names begin so. The first
// that fails is named, and ends the program.

#include <unistd.h>

#include <csignal>
#include <functional>

#include "guarded.h"

using namespace sphere::cuda;
using sphere::Type;

namespace {

constexpr Type F64 = Type::float64, F32 = Type::float32, BF16 = Type::bfloat16, F16 = Type::float16;
constexpr Precision IEEE = Precision::ieee, TF32X3 = Precision::tf32x3, TF32 = Precision::tf32;
constexpr Riesz PLAIN = {1, false, false}, SQUARED = {2, false, false}, LOG_BOTH = {0, false, true};
constexpr double PI = 3.14159265358979323846;
constexpr Riesz ANGLES = {3, true, false}, ANGLES_BOTH = {1, true, true};
const char* const TYPES[] = {"fp64", "fp32", "bf16", "fp16"};
const char* const PRECISIONS[] = {"ieee", "tf32x3", "tf32"};

std::vector<std::pair<const char*, const char*>> orders;
std::string only, where;
char where_in_handler[200];

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "%s: %s\n", where.c_str(), what.c_str());
    std::exit(1);
}

[[maybe_unused]] void out_of_bounds(int) {
    const ssize_t written = write(2, where_in_handler, std::strlen(where_in_handler));
    _exit(written < 0 ? 3 : 2);
}

// `bound` of an expected element is how far from it the actual one may be.
template <class Bound>
void compare(const char* what, const Dense& actual, const Dense& expected, Bound bound) {
    for (size_t i = 0; i < expected.size(); ++i) {
        if (std::fabs(actual[i] - expected[i]) <= bound(expected[i])) continue;
        char text[200];
        std::snprintf(text, sizeof text, "%s: element %zu is %.17g, expected %.17g within %.2g", what, i, actual[i],
                      expected[i], bound(expected[i]));
        fail(text);
    }
}

// Runs a check, which returns the memory that it wrote, in every order.
void check(const std::string& name, const std::function<std::string()>& run) {
    if (name.compare(0, only.size(), only)) return;
    std::string first;
    for (const auto& [order, copies] : orders) {
        setenv("CUDA_CPU_ORDER", order, 1);
        setenv("CUDA_CPU_ASYNC", copies, 1);
        where = name + ", " + order + ", " + copies;
        std::snprintf(where_in_handler, sizeof where_in_handler, "%s: memory that is not the kernel's\n",
                      where.c_str());
        const std::string memory = run();
        if (first.empty()) first = memory;
        if (memory != first) fail("bits differ between orders");
    }
}

void must_work(const Status& status) {
    if (status.code) fail(std::string("launch: ") + message_of(status.code));
}

void must_be_untouched(const Guarded& before, const Guarded& after) {
    if (before.memory() != after.memory()) fail("writes what it only reads");
}

std::string named(const char* kernel, Type type, Precision precision, std::initializer_list<int64_t> sizes) {
    std::string name = std::string(kernel) + " " + TYPES[int(type)];
    if (type == F32) name += std::string(" ") + PRECISIONS[int(precision)];
    for (const int64_t size : sizes) name += " " + std::to_string(size);
    return name;
}

// Random rows; if there are more than 8, with a duplicate, an opposite and a near one at the other end, and a zero row.
Dense rows_of(int64_t n, int64_t d) {
    Dense rows = random_values(n * d);
    const auto row = [&](int64_t i) { return &rows[size_t((i + n) % n * d)]; };
    for (int64_t k = 0; n > 8 && k < d; ++k) {
        row(-1)[k] = 2 * row(0)[k];
        row(-2)[k] = -row(1)[k];
        row(-3)[k] = row(2)[k] + 0.01 * row(3)[k];
        row(n / 2)[k] = 0;
    }
    return rows;
}

Dense stacked(int64_t count, const std::function<Dense(int64_t)>& one) {
    Dense all;
    for (int64_t m = 0; m < count; ++m) {
        const Dense each = one(m);
        all.insert(all.end(), each.begin(), each.end());
    }
    return all;
}

Dense part_of(const Dense& all, int64_t index, int64_t size) {
    return Dense(all.begin() + index * size, all.begin() + (index + 1) * size);
}

// The energies that inner products of rows stand for; of near pairs, those of the rows, if these are known.
Dense energies_of_gram(const Dense& gram, const Dense* rows, int64_t n, int64_t d, const Riesz& riesz) {
    Dense energies(static_cast<size_t>(n)), length(static_cast<size_t>(n)), deficit(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
        const double norm = std::sqrt(std::fmax(0, gram[size_t(i * n + i)]));
        length[size_t(i)] = norm + 1e-8;
        deficit[size_t(i)] = 1e-8 * (norm + length[size_t(i)]) / length[size_t(i)] / length[size_t(i)];
    }
    const Dense unit = rows ? unit_rows(*rows, n, d) : Dense();
    const auto value = [&](int64_t i, int64_t j, double sign) {
        const bool direction = gram[size_t(i * n + i)] > 0 && gram[size_t(j * n + j)] > 0;
        const double inner = direction ? sign * gram[size_t(i * n + j)] / length[size_t(i)] / length[size_t(j)] : 0;
        const double less = deficit[size_t(i)] + deficit[size_t(j)];
        const bool flipped = riesz.angular && inner < 0;  // an angle comes from the nearer of the two directions
        double square = (riesz.angular ? 2 : 2 - less) - 2 * (flipped ? -inner : inner);
        if (rows && square < 1e-3 && i != j) {
            square = riesz.angular ? less : 0;
            for (int64_t k = 0; k < d; ++k) {
                const double other = (flipped ? -sign : sign) * unit[size_t(j * d + k)];
                square += (unit[size_t(i * d + k)] - other) * (unit[size_t(i * d + k)] - other);
            }
        }
        double t = std::sqrt(std::fmax(0, square));
        if (riesz.angular) t = 2 * std::asin(0.5 * t);
        if (flipped) t = PI - t;
        return riesz.s == 0 ? -std::log(std::fmax(t, 1e-6)) : std::pow(std::fmax(t, 1e-6), -riesz.s);
    };
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) {
            if (i != j) energies[size_t(i)] += value(i, j, 1);
            if (riesz.half_space) energies[size_t(i)] += value(i, j, -1);
        }
    return energies;
}

Dense exact_energies(const Dense& rows, int64_t n, int64_t d, const Riesz& riesz) {
    return energies_of_gram(multiply(rows, turned(rows, n, d), n, d, n), &rows, n, d, riesz);
}

void check_energy(Type type, Precision precision, int64_t count, int64_t n, int64_t d, Layout layout,
                  const Riesz& riesz) {
    const std::string name =
        named("energy", type, precision, {count, n, d, int(layout), int64_t(riesz.s), riesz.angular});
    if (name.compare(0, only.size(), only)) return;
    const Guarded weight(type, count, n, d, layout, stacked(count, [&](int64_t) { return rows_of(n, d); }));
    const Dense values = weight.values();
    const Dense expected =
        stacked(count, [&](int64_t m) { return exact_energies(part_of(values, m, n * d), n, d, riesz); });
    const double budget = type == F64 ? 1e-10 : precision == TF32 && type == F32 ? 1e-4 : d < 7 ? 1e-5 : 3e-7;
    check(name, [&] {
        const Guarded read(type, count, n, d, layout, values);
        const Guarded memory(pair_energy_workspace(read.batch, riesz)), energies(F64, 1, count, n);
        must_work(pair_energy(read.batch, riesz, precision, memory.begin, energies.as<double>(), nullptr));
        compare("energy", energies.values(), expected, [&](double e) { return budget * (std::fabs(e) + double(n)); });
        must_be_untouched(weight, read);
        return energies.memory();
    });
}

void check_update(Type type, Precision precision, int64_t count, int64_t n, int64_t b, Layout layout,
                  const Riesz& riesz, bool with_weight) {
    constexpr int64_t D = 24;
    const std::string name =
        named("update", type, precision, {count, n, b, int(layout), int64_t(riesz.s), riesz.angular, with_weight});
    if (name.compare(0, only.size(), only)) return;
    Dense before, after, left, half, weights, diagonal;
    for (int64_t m = 0; m < count; ++m) {
        const Dense weight = with_weight ? rows_of(n, D) : random_values(n * D), r = random_values(n * b),
                    x = random_values(b * D);
        Dense older = multiply(r, x, n, b, D);
        for (size_t i = 0; i < older.size(); ++i) older[i] = weight[i] - older[i];
        const Dense first = multiply(older, turned(older, n, D), n, D, n),
                    last = multiply(weight, turned(weight, n, D), n, D, n);
        const Dense cross = multiply(older, turned(x, b, D), n, D, b),
                    inner = multiply(r, multiply(x, turned(x, b, D), b, D, b), n, b, b);
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j)
                before.push_back(j < i ? std::nan("") : first[size_t(i * n + j)]);  // not to be read
            for (int64_t k = 0; k < b; ++k) left.push_back(cross[size_t(i * b + k)] + 0.5 * inner[size_t(i * b + k)]);
            for (int64_t k = 0; k < b; ++k) left.push_back(r[size_t(i * b + k)]);
            for (int64_t k = 0; k < b; ++k) half.push_back(r[size_t(i * b + k)]);
            for (int64_t k = 0; k < b; ++k) half.push_back(left[left.size() - size_t(2 * b) + size_t(k)]);
            diagonal.push_back(last[size_t(i * n + i)]);
        }
        after.insert(after.end(), last.begin(), last.end());
        weights.insert(weights.end(), weight.begin(), weight.end());
    }
    const Guarded first(type, count, n, 2 * b, layout, left), second(type, count, n, 2 * b, Layout::columns, half);
    const Guarded rows(type, count, n, D, layout, weights), squares(type, 1, count, n, Layout::rows, diagonal);
    const Dense known = rows.values();
    const double rounding = type == F64 ? 1e-12 : precision == TF32 ? 1e-3 : 2e-6;
    check(name, [&] {
        const Guarded gram(type, count, n, n, layout, before), energies(F64, 1, count, n);
        const Guarded memory(gram_update_energy_workspace(gram.batch, first.batch));
        must_work(gram_update_energy(gram.batch, first.batch, second.batch, squares.begin,
                                     with_weight ? &rows.batch : nullptr, riesz, precision, memory.begin,
                                     energies.as<double>(), nullptr));
        const Dense updated = gram.values();
        compare("gram", updated, after, [&](double) { return rounding * double(D + b); });
        for (int64_t m = 0; m < count; ++m) {
            const Dense own = part_of(updated, m, n * n), known_own = part_of(known, m, n * D);
            if (own != turned(own, n, n)) fail("the matrix is not symmetric");
            for (int64_t i = 0; i < n; ++i)
                if (own[size_t(i * n + i)] != squares.values()[size_t(m * n + i)])
                    fail("the diagonal is not the one given");
            const Dense expected = energies_of_gram(own, with_weight ? &known_own : nullptr, n, D, riesz);
            compare("energy", part_of(energies.values(), m, n), expected,
                    [&](double e) { return (type == F64 ? 1e-9 : 1e-6) * (std::fabs(e) + double(n)); });
        }
        return gram.memory() + energies.memory();
    });
}

struct Shapes {
    int64_t count, rows, depth, cols;
};

void check_product(const Type (&types)[4], bool wide, Precision precision, const Shapes& shapes, Layout layout,
                   bool add, bool accumulate) {
    const auto [count, rows, depth, cols] = shapes;
    const std::string name = named("product", wide ? F64 : F32, precision,
                                   {count, rows, depth, cols, int(types[0]), int(types[1]), int(types[2]),
                                    int(types[3]), int(layout), add, accumulate});
    if (name.compare(0, only.size(), only)) return;
    const Guarded left(types[0], count, rows, depth, layout, random_values(count * rows * depth));
    Guarded right(types[1], 1, depth, cols, layout == Layout::rows ? Layout::columns : Layout::rows,
                  random_values(depth * cols));
    right.batch.stride = 0, right.batch.count = count;  // one for all
    const Guarded addend(types[2], count, rows, cols, layout, random_values(count * rows * cols));
    const Dense start = random_values(count * rows * cols);
    const Guarded begun(types[3], count, rows, cols, layout, start);
    constexpr double FACTOR = -0.75;
    Dense right_values = right.values();
    right_values.resize(size_t(depth * cols));
    Dense expected = stacked(count, [&](int64_t m) {
        return multiply(part_of(left.values(), m, rows * depth), right_values, rows, depth, cols);
    });
    const Dense more = addend.values(), old = begun.values();
    for (size_t i = 0; i < expected.size(); ++i)
        expected[i] = FACTOR * expected[i] + (add ? more[i] : 0) + (accumulate ? old[i] : 0);
    const bool halves = int(types[0]) > 1 && int(types[1]) > 1;
    const double summed = (wide ? 1e-14 : precision == TF32 && !halves ? 1e-3 : 1e-6) * std::sqrt(double(depth) + 1);
    const int fraction = types[3] == BF16 ? 7 : types[3] == F16 ? 10 : types[3] == F32 ? 23 : 52;
    const auto bound = [&](double x) { return summed + (x == 0 ? 0 : std::ldexp(0.5, std::ilogb(x) - fraction)); };
    check(name, [&] {
        const Guarded out(types[3], count, rows, cols, layout, accumulate ? start : Dense());
        must_work(product(left.batch, right.batch, add ? &addend.batch : nullptr, out.batch, FACTOR, accumulate, wide,
                          precision, nullptr));
        compare("product", out.values(), expected, bound);
        return out.memory();
    });
}

// What fp32 in between would round a second time: just above the middle of two 16-bit numbers, the lower of them even.
void check_rounding() {
    for (const Type type : {BF16, F16}) {
        const double unit = type == BF16 ? 0x1p-7 : 0x1p-10;
        const Dense values = {1 + unit / 2 + 0x1p-40, -(1 + unit / 2 + 0x1p-40), 1 + 1.5 * unit - 0x1p-40,
                              1 + unit / 2};
        const Guarded left(F64, 1, 4, 1, Layout::rows, values), right(F64, 1, 1, 1, Layout::rows, {1});
        check(std::string("product rounds once to ") + TYPES[int(type)], [&] {
            const Guarded out(type, 1, 4, 1);
            must_work(product(left.batch, right.batch, nullptr, out.batch, 1, false, true, IEEE, nullptr));
            compare("product", out.values(), {1 + unit, -1 - unit, 1 + unit, 1}, [](double) { return 0.0; });
            return out.memory();
        });
    }
}

// Offsets past 2^31: only the last block of every kernel runs, on memory of which little is touched.
[[maybe_unused]] void check_far() {
    setenv("CUDA_CPU_BLOCKS", "last", 1);
    orders.resize(1);
    check("far energy", [&] {
        constexpr int64_t N = (1 << 19) + 5, D = 1 << 12, WRITTEN = 5;  // rows of the last block of the packing kernel
        const Guarded weight(F32, 1, N, D);
        for (int64_t i = N - WRITTEN; i < N; ++i)
            for (int64_t k = 0; k < D; ++k) weight.as<float>()[i * D + k] = float((i * 7 + k * 13) % 31 - 15);
        const Guarded memory(pair_energy_workspace(weight.batch, PLAIN)), energies(F64, 1, 1, N);
        must_work(pair_energy(weight.batch, PLAIN, TF32X3, memory.begin, energies.as<double>(), nullptr));
        Dense rows;
        for (int64_t i = (N - WRITTEN) * D; i < N * D; ++i) rows.push_back(weight.as<float>()[i]);
        Dense expected = exact_energies(rows, WRITTEN, D, PLAIN);
        for (double& e : expected) e += (N - WRITTEN) * std::sqrt(0.5);  // all other rows are zero to it
        Dense found(energies.as<double>() + N - WRITTEN, energies.as<double>() + N);
        compare("energy", found, expected, [](double) { return 1e-5; });
        return energies.memory().substr(size_t(8 * (N - WRITTEN)));
    });
    check("far update", [&] {
        constexpr int64_t N = 46400, B = 8, WRITTEN = 8, D = 3;
        static_assert(N * N > int64_t(1) << 31, "not far");
        const Guarded gram(F32, 1, N, N), first(F32, 1, N, B), second(F32, 1, N, B), weight(F32, 1, N, D);
        const Guarded diagonal(F32, 1, 1, N), energies(F64, 1, 1, N);
        for (int64_t i = 0; i < N * B; ++i) first.as<float>()[i] = second.as<float>()[i] = float(i % 17) - 8;
        for (int64_t i = 0; i < N; ++i) diagonal.as<float>()[i] = 600;
        const Guarded memory(gram_update_energy_workspace(gram.batch, first.batch));
        must_work(gram_update_energy(gram.batch, first.batch, second.batch, diagonal.begin, nullptr, PLAIN, IEEE,
                                     memory.begin, energies.as<double>(), nullptr));
        const auto at = [&](int64_t i, int64_t j) { return double(gram.as<float>()[i * N + j]); };
        for (int64_t i = N - WRITTEN; i < N; ++i)
            for (int64_t j = N - WRITTEN; j < N; ++j) {
                double expected = i == j ? 600 : 0;
                for (int64_t k = 0; k < B && i != j; ++k)
                    expected += double(first.as<float>()[i * B + k]) * first.as<float>()[j * B + k];
                compare("gram", {at(i, j)}, {expected}, [](double) { return 0.0; });
            }
        return energies.memory().substr(size_t(8 * (N - WRITTEN)));
    });
    check("far product", [&] {
        constexpr int64_t N = 46400, B = 8, WRITTEN = 8;
        const Guarded out(F32, 1, N, N), left(F32, 1, N, B), right(F32, 1, B, N, Layout::columns);
        for (int64_t i = 0; i < N * B; ++i) left.as<float>()[i] = right.as<float>()[i] = float(i % 17) - 8;
        must_work(product(left.batch, right.batch, nullptr, out.batch, 1, true, false, IEEE, nullptr));
        for (int64_t i = N - WRITTEN; i < N; ++i)
            for (int64_t j = N - WRITTEN; j < N; ++j) {
                double expected = 0;
                for (int64_t k = 0; k < B; ++k)
                    expected += double(left.as<float>()[i * B + k]) * left.as<float>()[j * B + k];
                compare("product", {double(out.as<float>()[i * N + j])}, {expected}, [](double) { return 0.0; });
            }
        return std::string(out.as<char>() + 4 * (N * N - WRITTEN), 4 * WRITTEN);
    });
    unsetenv("CUDA_CPU_BLOCKS");
}

void check_energies() {
    for (const Precision precision : {IEEE, TF32X3, TF32}) {
        check_energy(F32, precision, 1, 67, 37, Layout::rows, PLAIN);
        check_energy(F32, precision, 1, 131, 40, Layout::rows, SQUARED);  // large tiles
        check_energy(F32, precision, 1, 20, 33, Layout::rows, ANGLES_BOTH);
    }
    for (const Type type : {F64, BF16, F16}) {
        check_energy(type, IEEE, 2, 67, 37, Layout::spread, PLAIN);
        check_energy(type, IEEE, 1, 12, 129, Layout::rows, ANGLES_BOTH);
    }
    for (const Type type : {BF16, F16}) check_energy(type, IEEE, 1, 130, 70, Layout::columns, PLAIN);
    check_energy(F32, TF32X3, 1, 130, 9, Layout::columns, LOG_BOTH);
    check_energy(F32, TF32X3, 3, 65, 33, Layout::spread, ANGLES);
    check_energy(F32, TF32X3, 1, 193, 100, Layout::rows, PLAIN);
    for (const int64_t n : {1, 2, 64, 128}) check_energy(F32, TF32X3, 1, n, 7, Layout::rows, PLAIN);
    check_energy(F32, IEEE, 2, 5, 1, Layout::rows, PLAIN);
    check_energy(F32, IEEE, 1, 9, 0, Layout::rows, PLAIN);
}

void check_updates() {
    for (const Precision precision : {IEEE, TF32X3, TF32}) {
        check_update(F32, precision, 1, 67, 5, Layout::rows, PLAIN, true);
        check_update(F32, precision, 1, 20, 5, Layout::rows, ANGLES, true);
    }
    check_update(F64, IEEE, 2, 67, 9, Layout::spread, ANGLES_BOTH, true);
    check_update(F32, TF32X3, 1, 130, 17, Layout::columns, SQUARED, false);
    check_update(F32, TF32X3, 2, 33, 3, Layout::spread, LOG_BOTH, true);
    check_update(F64, IEEE, 1, 65, 0, Layout::rows, PLAIN, true);
    check_update(F32, TF32X3, 1, 1, 1, Layout::rows, PLAIN, true);
}

void check_products() {
    for (const Precision precision : {IEEE, TF32X3, TF32})
        check_product({F32, F32, F32, F32}, false, precision, {2, 67, 37, 71}, Layout::rows, true, true);
    check_product({F64, F32, BF16, F64}, true, IEEE, {1, 65, 33, 5}, Layout::columns, true, false);
    check_product({F64, F64, F64, BF16}, true, IEEE, {1, 9, 130, 66}, Layout::spread, false, true);
    check_product({F64, F64, F16, F16}, true, IEEE, {1, 64, 16, 64}, Layout::rows, true, false);
    check_product({BF16, BF16, BF16, BF16}, false, TF32X3, {2, 70, 65, 9}, Layout::columns, true, true);
    check_product({F16, F16, F16, F32}, false, IEEE, {1, 33, 64, 129}, Layout::spread, false, false);
    check_product({F32, BF16, F16, F16}, false, TF32X3, {1, 1, 1, 1}, Layout::rows, true, true);
    check_product({F32, F32, F32, F32}, false, IEEE, {2, 5, 0, 6}, Layout::rows, true, true);
    check_product({F32, F32, F32, F32}, false, IEEE, {1, 0, 3, 6}, Layout::rows, false, false);
    check_rounding();
}

}  // namespace

int main(int count, char** arguments) {
    const bool all = count < 2 || std::strcmp(arguments[1], "few") != 0;
    only = count > 2 ? arguments[2] : "";
    orders = {{"fwd", "late"}, {"fwd", "early"}};
    if (all)
        orders = {{"fwd", "late"}, {"rev", "early"}, {"7", "late"}, {"7", "early"}, {"rev", "late"}, {"fwd", "early"}};
#if !defined(CUDA_CPU_SANITIZED)
    std::signal(SIGSEGV, out_of_bounds);
    std::signal(SIGBUS, out_of_bounds);
#endif
    check_energies();
    check_updates();
    check_products();
#if !defined(CUDA_CPU_SANITIZED)
    check_far();
#endif
    std::puts("done");
}
