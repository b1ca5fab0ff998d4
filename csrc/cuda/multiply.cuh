#pragma once

#include "cuda/device.cuh"
#include "cuda/elements.cuh"
#include "cuda/launch.h"

// Square tiles of products a b^T, where both factors come in slabs of their depth: rows of 128 bytes in shared memory.
namespace sphere::cuda {

enum class Math { ieee, tf32x3, tf32, bf16, fp16, fp64 };

template <Math MATH>
struct Operand {  // of fp32 in any of its three ways
    using Element = float;
    using Sum = float;
    static constexpr bool TENSOR = MATH != Math::ieee;
};
template <>
struct Operand<Math::bf16> {
    using Element = __nv_bfloat16;
    using Sum = float;
    static constexpr bool TENSOR = true;
};
template <>
struct Operand<Math::fp16> {
    using Element = __half;
    using Sum = float;
    static constexpr bool TENSOR = true;
};
template <>
struct Operand<Math::fp64> {
    using Element = double;
    using Sum = double;
    static constexpr bool TENSOR = false;
};

constexpr int SLAB_BYTES = 128;  // of a row
constexpr int CHUNK_BYTES = 16;  // what is copied at a time
constexpr int CHUNKS = SLAB_BYTES / CHUNK_BYTES;

// Where a chunk of a row lies in a slab: rows that are read together have theirs in different banks.
__device__ inline int chunk_offset(int row, int chunk) {
    return row * SLAB_BYTES + ((chunk ^ (row % CHUNKS)) * CHUNK_BYTES);
}

// The sums of one tile, spread over the threads of a block.
template <Math MATH, int SIDE, bool TENSOR = Operand<MATH>::TENSOR>
class Sums;

// On tensor cores: 2 warps down and SIDE / 32 across, each with SIDE / 2 rows and 32 columns. A warp's operands are
// words of 32 bits for all types: one of fp32, two of 16 bits.
template <Math MATH, int SIDE>
class Sums<MATH, SIDE, true> {
  public:
    static constexpr int THREADS = 2 * SIDE;

    __device__ void add(const unsigned char* left, const unsigned char* right) {
        const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
            uint32_t a[DOWN][4], b[ACROSS][2];
#pragma unroll
            for (int i = 0; i < DOWN; ++i) {
                const int row = first_row() + 16 * i + g;
                a[i][0] = word(left, row, chunk, q);
                a[i][1] = word(left, row + 8, chunk, q);
                a[i][2] = word(left, row, chunk + 1, q);
                a[i][3] = word(left, row + 8, chunk + 1, q);
            }
#pragma unroll
            for (int j = 0; j < ACROSS; ++j) {
                const int row = first_col() + 8 * j + g;
                b[j][0] = word(right, row, chunk, q);
                b[j][1] = word(right, row, chunk + 1, q);
            }
            multiply(a, b);
        }
    }

    // The tile to shared memory, rows of PITCH.
    template <int PITCH>
    __device__ void store(float* tile) const {
        const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < DOWN; ++i)
#pragma unroll
            for (int j = 0; j < ACROSS; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int row = first_row() + 16 * i + g + e / 2 * 8, col = first_col() + 8 * j + 2 * q + e % 2;
                    tile[row * PITCH + col] = sums_[i][j][e];
                }
    }

  private:
    static constexpr int DOWN = SIDE / 32, ACROSS = 4;  // blocks of 16 x 8 of a warp
    float sums_[DOWN][ACROSS][4] = {};

    __device__ static int first_row() { return threadIdx.x / 32 % 2 * (SIDE / 2); }
    __device__ static int first_col() { return threadIdx.x / 64 * 32; }

    __device__ static uint32_t word(const unsigned char* slab, int row, int chunk, int place) {
        return reinterpret_cast<const uint32_t*>(slab + chunk_offset(row, chunk))[place];
    }

    __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        if constexpr (MATH == Math::bf16)
            mma_m16n8k16_bf16(c, a, b);
        else if constexpr (MATH == Math::fp16)
            mma_m16n8k16_fp16(c, a, b);
        else
            mma_m16n8k8_tf32(c, a, b);
    }

    // Cuts fp32 into its upper 11 bits and the rest, of which a tensor core drops what it does not see.
    template <int N>
    __device__ static void split(const uint32_t (&x)[N], uint32_t (&big)[N], uint32_t (&small)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            big[i] = (x[i] + 0x1000u) & ~0x1fffu;  // a NaN that this loses is found in the rest
            small[i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(big[i]));
        }
    }

    __device__ void multiply(const uint32_t (&a)[DOWN][4], const uint32_t (&b)[ACROSS][2]) {
        if constexpr (MATH == Math::tf32x3) {
            uint32_t b_big[ACROSS][2], b_small[ACROSS][2];
#pragma unroll
            for (int j = 0; j < ACROSS; ++j) split(b[j], b_big[j], b_small[j]);
#pragma unroll
            for (int i = 0; i < DOWN; ++i) {
                uint32_t a_big[4], a_small[4];
                split(a[i], a_big, a_small);
#pragma unroll
                for (int j = 0; j < ACROSS; ++j) {
                    mma(sums_[i][j], a_small, b_big[j]);
                    mma(sums_[i][j], a_big, b_small[j]);
                    mma(sums_[i][j], a_big, b_big[j]);
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < DOWN; ++i)
#pragma unroll
                for (int j = 0; j < ACROSS; ++j) mma(sums_[i][j], a[i], b[j]);
        }
    }
};

// On the plain units: 16 x 16 threads, each with every 16th row and column.
template <Math MATH, int SIDE>
class Sums<MATH, SIDE, false> {
    using Sum = typename Operand<MATH>::Sum;

    static constexpr int EACH = SIDE / 16, LENGTH = CHUNK_BYTES / sizeof(Sum);
    struct __align__(16) Chunk {
        Sum x[LENGTH];
    };

  public:
    static constexpr int THREADS = 256;

    __device__ void add(const unsigned char* left, const unsigned char* right) {
        const int row = threadIdx.x / 16, col = threadIdx.x % 16;
#pragma unroll 2
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            Chunk b[EACH];
#pragma unroll
            for (int j = 0; j < EACH; ++j) b[j] = at(right, col + 16 * j, chunk);
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const Chunk a = at(left, row + 16 * i, chunk);
#pragma unroll
                for (int j = 0; j < EACH; ++j)
#pragma unroll
                    for (int k = 0; k < LENGTH; ++k) sums_[i][j] += a.x[k] * b[j].x[k];
            }
        }
    }

    template <int PITCH>
    __device__ void store(Sum* tile) const {
        const int row = threadIdx.x / 16, col = threadIdx.x % 16;
#pragma unroll
        for (int i = 0; i < EACH; ++i)
#pragma unroll
            for (int j = 0; j < EACH; ++j) tile[(row + 16 * i) * PITCH + col + 16 * j] = sums_[i][j];
    }

  private:
    Sum sums_[EACH][EACH] = {};

    __device__ static Chunk at(const unsigned char* slab, int row, int chunk) {
        return *reinterpret_cast<const Chunk*>(slab + chunk_offset(row, chunk));
    }
};

// How many of 0, step, 2 step, ... are less than `size`, at most `most`.
__device__ inline int steps_within(int64_t size, int step, int most) {
    return size >= int64_t(step) * most ? most : size > 0 ? (int(size) + step - 1) / step : 0;
}

// The share of a thread in the copies of some rows of a matrix `[n, width]`, contiguous, to slabs.
template <class Element, int SIDE, int THREADS>
class RowCopies {
  public:
    __device__ RowCopies(const Element* matrix, int64_t first, int64_t n, int64_t width)
        : matrix_(matrix),
          from_(matrix + (first + own_row()) * width + own_chunk() * LENGTH),
          step_(width * APART),
          there_(steps_within(n - first - own_row(), APART, EACH)),
          left_(width - own_chunk() * LENGTH),
          offset_(chunk_offset(own_row(), own_chunk())) {}

    // Those of the columns from `depth`; zeros past the ends of the matrix.
    __device__ void begin(int64_t depth, unsigned char* slab) const {
        const Element* from = from_ + depth;
        const int there = depth < left_ ? there_ : 0;
#pragma unroll
        for (int p = 0; p < EACH; ++p, from += step_)
            cp_async16(slab + offset_ + p * APART * SLAB_BYTES, p < there ? from : matrix_,
                       p < there ? CHUNK_BYTES : 0);
    }

  private:
    static constexpr int LENGTH = CHUNK_BYTES / int(sizeof(Element));
    static constexpr int APART = THREADS / CHUNKS, EACH = SIDE / APART;  // rows
    static_assert(APART % CHUNKS == 0, "the chunks of a thread are at one place of their rows");
    const Element *matrix_, *from_;
    int64_t step_;
    int there_;
    int64_t left_;
    int offset_;

    __device__ static int own_row() { return threadIdx.x / CHUNKS; }
    __device__ static int own_chunk() { return threadIdx.x % CHUNKS; }
};

// A tile of the products of rows with rows of matrices `[n, width]`, contiguous, width a multiple of a chunk; copied in
// the background, STAGES slabs ahead.
template <Math MATH, int SIDE>
class RowProducts {
  public:
    using Element = typename Operand<MATH>::Element;
    using Sum = typename Operand<MATH>::Sum;
    static constexpr int THREADS = Sums<MATH, SIDE>::THREADS;
    static constexpr int BLOCKS = SIDE > 64 ? 1 : 2;  // on a multiprocessor; for more, the compiler would spill
    static constexpr int STAGES = 3;
    static constexpr int PITCH = SIDE + 1;  // of the result, which is read along both of its sides
    static constexpr int STAGE_BYTES = 2 * SIDE * SLAB_BYTES;
    static constexpr int RESULT_BYTES = (SIDE * PITCH * int(sizeof(Sum)) + 15) / 16 * 16;

    // Of the rows from first_left of `left` with those from first_right of `right`, to the front of `shared`; the block
    // has to meet before it is read. Rows past n are zero.
    __device__ static void of(const Element* left, const Element* right, int64_t first_left, int64_t first_right,
                              int64_t n, int64_t width, unsigned char* shared) {
        const RowCopies<Element, SIDE, THREADS> lefts(left, first_left, n, width), rights(right, first_right, n, width);
        const auto fetch = [&](int64_t depth, int stage) {
            unsigned char* slabs = shared + stage * STAGE_BYTES;
            if (depth < width) {
                lefts.begin(depth, slabs);
                rights.begin(depth, slabs + SIDE * SLAB_BYTES);
            }
            cp_async_commit();  // an empty group too, so that their number tells which slabs are there
        };
        Sums<MATH, SIDE> sums;
        for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage * DEPTH, stage);
        int stage = 0, free = STAGES - 1;
        for (int64_t depth = 0; depth < width; depth += DEPTH) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // the slabs are there for all, and all are through with those before
            fetch(depth + (STAGES - 1) * DEPTH, free);
            const unsigned char* slabs = shared + stage * STAGE_BYTES;
            sums.add(slabs, slabs + SIDE * SLAB_BYTES);
            free = stage;
            stage = stage == STAGES - 1 ? 0 : stage + 1;
        }
        cp_async_wait<0>();
        __syncthreads();
        sums.template store<PITCH>(reinterpret_cast<Sum*>(shared));
    }

  private:
    static constexpr int DEPTH = SLAB_BYTES / int(sizeof(Element));
};

// Calls f with the way to multiply operands of one type, as a type.
template <Math MATH>
struct MathOf {
    static constexpr Math value = MATH;
};
template <class F>
auto with_fp32_math(Precision precision, F f) {
    if (precision == Precision::ieee) return f(MathOf<Math::ieee>{});
    if (precision == Precision::tf32x3) return f(MathOf<Math::tf32x3>{});
    return f(MathOf<Math::tf32>{});
}
template <class F>
auto with_math(Type type, Precision precision, F f) {
    if (type == Type::float64) return f(MathOf<Math::fp64>{});
    if (type == Type::bfloat16) return f(MathOf<Math::bf16>{});
    if (type == Type::float16) return f(MathOf<Math::fp16>{});
    return with_fp32_math(precision, f);
}

}  // namespace sphere::cuda
