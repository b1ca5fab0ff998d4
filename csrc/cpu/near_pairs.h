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
// j exchanged. Differences are formed in fp64 from the weight itself. Threads share the columns, so the order of the
// sums is fixed.
template <class T>
void pull_near_pairs(const std::vector<NearPairList>& lists, int64_t count, const Matrix& weight,
                     const RowData<T>& data, const Kernels<T>& kernels, int threads, T* pull) {
    constexpr int64_t CHUNK = 256;
    const int64_t n = weight.rows, d = weight.cols;
    if (std::all_of(lists.begin(), lists.begin() + count, [](const auto& list) { return list.pairs.empty(); })) return;
    parallel_for(ceil_div(d, CHUNK), threads, [&](int64_t c, int) {
        const int64_t first = c * CHUNK, width = std::min(CHUNK, d - first);
        const Matrix columns = part(weight, 0, n, first, width);
        double left[CHUNK], right[CHUNK];
        for (int64_t t = 0; t < count; ++t)
            for (const NearPair& pair : lists[size_t(t)].pairs) {
                kernels.row(columns, pair.row, data.scale[size_t(pair.row)], left);
                kernels.row(columns, pair.col, pair.sign * data.scale[size_t(pair.col)], right);
                T *to_row = pull + pair.row * d + first, *to_col = pull + pair.col * d + first;
                for (int64_t k = 0; k < width; ++k) {
                    const double pulled = pair.slope * (right[k] - left[k]);
                    to_row[k] += T(pulled);
                    to_col[k] += T(-pair.sign * pulled);
                }
            }
    });
}

}  // namespace sphere
