#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/views.h"
#include "cpu/features.h"
#include "cpu/gram.h"
#include "cpu/pair_energy.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/projection.h"
#include "cpu/tiers.h"
#include "cpu/views.h"

namespace py = pybind11;
using namespace sphere;

namespace {

// Runs f with a float or a double, without the interpreter's lock.
template <class F>
void in_precision(bool wide, F f) {
    py::gil_scoped_release unlocked;
    if (wide)
        f(double{});
    else
        f(float{});
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Compiled CPU code of sphere_kernels. Tensors cross as addresses, sizes and strides, checked in Python.";

    m.def(
        "cpu_features",
        [] {
            py::dict features;
            for (const auto& feature : cpu_features()) features[feature.name] = feature.usable;
            return features;
        },
        "Instruction set extensions by their Linux name, and whether this machine can use them.");
    m.def("built_tiers", &built_tiers, "Instruction sets that this build has kernels for, the slowest first.");
    m.def("usable_tiers", &usable_tiers, "Those of built_tiers that this machine can run.");

    m.def(
        "pair_energy",
        [](const py::tuple& weight, double s, bool angular, bool half_space, int tier, int threads,
           uintptr_t energies) {
            const Batch batch = as_batch(weight);
            const int64_t n = batch.first.rows;
            in_precision(batch.first.type == Type::float64, [&](auto t) {
                for_each_matrix(batch.count, n, threads, [&](int64_t i, int each) {
                    pair_energy<decltype(t)>(batch[i], {s, angular, half_space}, tier, each,
                                             as_pointer<double>(energies) + i * n);
                });
            });
        },
        "Energy of every row, to fp64 energies[count, rows], contiguous.");
    m.def(
        "pair_energy_backward",
        [](uintptr_t upstream, const py::tuple& weight, double s, bool angular, bool half_space, int tier, int threads,
           uintptr_t gradient) {
            const Batch batch = as_batch(weight);
            const int64_t n = batch.first.rows, d = batch.first.cols;
            in_precision(batch.first.type == Type::float64, [&](auto t) {
                using T = decltype(t);
                for_each_matrix(batch.count, n, threads, [&](int64_t i, int each) {
                    pair_energy_backward<T>(as_pointer<double>(upstream) + i * n, batch[i], {s, angular, half_space},
                                            tier, each, as_pointer<T>(gradient) + i * n * d);
                });
            });
        },
        "Gradient of sum(upstream * energies), to fp64 or fp32 gradient[count, rows, cols], contiguous.");
    m.def(
        "gram",
        [](const py::tuple& weight, bool normalize, int tier, int threads, uintptr_t out) {
            const Batch batch = as_batch(weight);
            const int64_t n = batch.first.rows;
            in_precision(batch.first.type == Type::float64, [&](auto t) {
                using T = decltype(t);
                for_each_matrix(batch.count, n, threads, [&](int64_t i, int each) {
                    gram<T>(batch[i], normalize, tier, each, as_pointer<T>(out) + i * n * n);
                });
            });
        },
        "Inner products of all rows, to fp64 or fp32 out[count, rows, rows], contiguous.");
    m.def(
        "subtract_gram",
        [](const py::tuple& from, const py::tuple& factor, int tier, int threads) {
            const Batch totals = as_batch(from), factors = as_batch(factor);
            in_precision(totals.first.type == Type::float64, [&](auto t) {
                for_each_matrix(totals.count, totals.first.rows, threads, [&](int64_t i, int each) {
                    subtract_gram<decltype(t)>(totals[i], factors[i], tier, each);
                });
            });
        },
        "from -= factor factor^T, both of one type; columns of the symmetric `from` are neighbours.");
    m.def(
        "gram_energy",
        [](const py::tuple& gram, const py::object& weight, double s, bool angular, bool half_space, int tier,
           int threads, uintptr_t energies) {
            const Batch grams = as_batch(gram);
            const OptionalBatch weights(weight);
            const int64_t n = grams.first.rows;
            in_precision(grams.first.type == Type::float64, [&](auto t) {
                for_each_matrix(grams.count, n, threads, [&](int64_t i, int each) {
                    const Matrix rows = weights.batch[i];
                    gram_energy<decltype(t)>(grams[i], weights.there ? &rows : nullptr, {s, angular, half_space}, tier,
                                             each, as_pointer<double>(energies) + i * n);
                });
            });
        },
        "Energy of every neuron whose inner products gram holds, to fp64 energies[count, rows]. Columns of gram are "
        "neighbours.");
    m.def(
        "gram_update_energy",
        [](const py::tuple& gram, const py::tuple& left, const py::tuple& cross, const py::tuple& inner,
           const py::object& weight, double s, bool angular, bool half_space, int tier, int threads,
           uintptr_t energies) {
            const Batch grams = as_batch(gram), lefts = as_batch(left), crosses = as_batch(cross);
            const Batch inners = as_batch(inner);
            const OptionalBatch weights(weight);
            const int64_t n = grams.first.rows;
            in_precision(grams.first.type == Type::float64, [&](auto t) {
                for_each_matrix(grams.count, n, threads, [&](int64_t i, int each) {
                    const Matrix rows = weights.batch[i];
                    gram_update_energy<decltype(t)>(grams[i], lefts[i], crosses[i], inners[i],
                                                    weights.there ? &rows : nullptr, {s, angular, half_space}, tier,
                                                    each, as_pointer<double>(energies) + i * n);
                });
            });
        },
        "gram += cross left^T + left cross^T + left inner left^T, all of one type; the energy of every neuron to fp64 "
        "energies[count, rows]. Columns of gram are neighbours.");
    m.def(
        "project",
        [](const py::tuple& update, const py::tuple& basis, double alpha, const py::object& left, const py::tuple& out,
           bool accumulate, bool wide, int tier, int threads) {
            const Batch updates = as_batch(update), bases = as_batch(basis), outs = as_batch(out);
            const OptionalBatch lefts(left);
            in_precision(wide, [&](auto t) {
                for_each_matrix(outs.count, outs.first.rows, threads, [&](int64_t i, int each) {
                    const Matrix factor = lefts.batch[i];
                    project<decltype(t)>(updates[i], bases[i], alpha, lefts.there ? &factor : nullptr, outs[i],
                                         accumulate, tier, each);
                });
            });
        },
        "out = (accumulate ? out : 0) + left (update - alpha (update basis) basis^T), left None: the identity; in fp64 "
        "or fp32, rounded once to the type of out.");
    m.def(
        "product",
        [](const py::tuple& left, const py::tuple& right, const py::tuple& out, bool accumulate, bool wide, int tier,
           int threads) {
            const Batch a = as_batch(left), b = as_batch(right), to = as_batch(out);
            const int64_t work = to.first.rows * to.first.cols * a.first.cols;
            in_precision(wide, [&](auto t) {
                for_each_matrix(to.count, to.first.rows, threads, [&](int64_t i, int each) {
                    product<decltype(t)>(kernels<decltype(t)>(tier), {a[i]}, {transposed(b[i])}, 1, to[i], nullptr,
                                         accumulate, threads_for(work, each));
                });
            });
        },
        "out = (accumulate ? out : 0) + left right, in fp64 or fp32, rounded once to the type of out.");
}
