#pragma once

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/unit_rows.h"
#include "cpu/views.h"

namespace sphere {

// The near pairs of one tile, in the order in which they were met.
struct NearPairList : NearPairs {
    std::vector<NearPair> pairs;

    NearPairList()
        : NearPairs{
              [](NearPairs* self, const NearPair& pair) { static_cast<NearPairList*>(self)->pairs.push_back(pair); }} {}
};

// For every pair of the first `count` lists, in order: pull_i += slope (sign unit_j - unit_i), and the same with i and
// j exchanged. Differences and sums are formed in fp64. Threads share the columns, so the order is fixed.
template <class T>
void pull_near_pairs(const std::vector<NearPairList>& lists, int64_t count, const Matrix& weight,
                     const RowData<T>& data, const Kernels<T>& kernels, int threads, T* pull) {
    constexpr int64_t CHUNK = 64;
    const int64_t n = weight.rows, d = weight.cols;
    std::vector<int64_t> slot(static_cast<size_t>(n), -1), met;  // of the rows in near pairs
    for (int64_t t = 0; t < count; ++t)
        for (const NearPair& pair : lists[size_t(t)].pairs)
            for (const int64_t row : {pair.row, pair.col})
                if (slot[size_t(row)] < 0) {
                    slot[size_t(row)] = int64_t(met.size());
                    met.push_back(row);
                }
    if (met.empty()) return;
    const int64_t size = int64_t(met.size()) * CHUNK;
    Buffer<double> units(threads * size), sums(threads * size);
    parallel_for(ceil_div(d, CHUNK), threads, [&](int64_t c, int worker) {
        const int64_t first = c * CHUNK, width = std::min(CHUNK, d - first);
        const Matrix columns = part(weight, 0, n, first, width);
        double *unit = units.get() + worker * size, *sum = sums.get() + worker * size;
        std::fill(sum, sum + size, 0.0);
        for (size_t m = 0; m < met.size(); ++m)
            kernels.row(columns, met[m], data.scale[size_t(met[m])], unit + int64_t(m) * CHUNK);
        for (int64_t t = 0; t < count; ++t)
            for (const NearPair& pair : lists[size_t(t)].pairs) {
                const int64_t i = slot[size_t(pair.row)] * CHUNK, j = slot[size_t(pair.col)] * CHUNK;
                for (int64_t k = 0; k < width; ++k) {
                    const double pulled = pair.slope * (pair.sign * unit[j + k] - unit[i + k]);
                    sum[i + k] += pulled;
                    sum[j + k] -= pair.sign * pulled;
                }
            }
        for (size_t m = 0; m < met.size(); ++m)
            for (int64_t k = 0; k < width; ++k) pull[met[m] * d + first + k] += T(sum[int64_t(m) * CHUNK + k]);
    });
}

}  // namespace sphere
