// Runs CUDA kernels on the CPU, for tests: the kernels' own source, compiled by g++ with -DCUDA_CPU_SHIM.
//
// - Every CUDA thread is a fiber, so barriers and warp calls really wait. A deadlock, barriers at two lines at a time,
//   and lanes of a mask that have exited end the launch with cudaErrorLaunchFailure and a message.
// - CUDA_CPU_ORDER=fwd|rev|<seed> is the order in which threads run, by warps that go as far as they can or, with a
//   seed, all in turn: a missing barrier changes results.
// - cp.async lands at its wait, and its destination is NaN until then; or at its issue, with CUDA_CPU_ASYNC=early.
//   Unaligned addresses, destinations outside shared memory and copies still in flight at the end are errors.
// - Shared memory begins as NaN in every block, and a page that must not be touched follows the dynamic part.
// - CUDA_CPU_THREADS is how many blocks run at a time, at most 4; as many as there are cores by default.
// - CUDA_CPU_BLOCKS=last runs only the last block of a launch: how far its offsets reach shows in little time.
// - Launches that exceed what every GPU since sm_80 offers are refused.
// - Under -fsanitize=thread every CUDA thread is one to the sanitizer. What orders accesses is __syncthreads and
//   __syncwarp alone; of the blocks of a launch, every fourth is ordered.
//
// What it does not model: the rounding of tensor cores (sums here are fp32, one product after the other) and of
// rsqrtf (correctly rounded here), and the weak order of memory among threads that no barrier separates.
#pragma once

#include "cuda_cpu_blocks.h"

#define CUDA_CPU_VECTOR(T, name, size)                                        \
    struct __attribute__((aligned(2 * size), may_alias)) name##2 { T x, y; }; \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }
#define CUDA_CPU_VECTORS(T, name)                                             \
    CUDA_CPU_VECTOR(T, name, sizeof(T))                                       \
    struct __attribute__((aligned(16), may_alias)) name##4 { T x, y, z, w; }; \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_CPU_VECTORS(float, float)
CUDA_CPU_VECTORS(int, int)
CUDA_CPU_VECTORS(unsigned, uint)
CUDA_CPU_VECTOR(double, double, 8)

namespace cuda_cpu {

template <class T>
struct Exchanged {
    T value, result;
    int from;  // a lane, or -1 for none
};

template <class T>
inline T exchanged(uint32_t mask, T value, int from, Call call) {
    Exchanged<T> mine{value, value, from};
    warp_call(mask, call, &mine, [mask](Fiber* lanes) {
        for (int l = 0; l < 32; ++l) {
            if (!(mask >> l & 1)) continue;
            auto& to = *static_cast<Exchanged<T>*>(lanes[l].operands);
            if (to.from < 0) continue;
            if (mask >> to.from & 1)
                to.result = static_cast<Exchanged<T>*>(lanes[to.from].operands)->value;
            else
                poison(&to.result, sizeof(T));  // undefined on a GPU
        }
    });
    return mine.result;
}

inline int within(int width, int from) { return from >= 0 && from / width == int(lane()) / width ? from : -1; }

inline void land(const Copy& copy) {
    std::memcpy(copy.to, copy.from, copy.read);
    std::memset(static_cast<char*>(copy.to) + copy.read, 0, copy.bytes - copy.read);
}

inline void copy_async(void* to, const void* from, size_t bytes, int read) {
    const auto unaligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
    if (unaligned(to) || unaligned(from)) end_launch("cp.async: an address is not a multiple of its size");
    if (read < 0 || size_t(read) > bytes) end_launch("cp.async: reads more bytes than it copies");
    const Range dynamic{block->dynamic, block->dynamic + block->dynamic_bytes};
    if (!dynamic.holds(to, bytes) && !block->static_shared.holds(to, bytes))
        end_launch("cp.async: the destination is not in shared memory");
    const Copy copy{to, from, bytes, size_t(read)};
    poison(to, bytes);
    if (block->early) land(copy);
    self().open.push_back(copy);
}

template <class T>
inline T bits_as(const void* from) {
    T to;
    std::memcpy(&to, from, sizeof(T));
    return to;
}

// The bits of the nearest number, ties to even, with so many bits of fraction and this bias of the exponent.
inline uint16_t narrowed(double x, int fraction, int bias) {
    const int sign = std::signbit(x) ? 0x8000 : 0, infinity = (2 * bias + 1) << fraction;
    if (x != x) return 0x7fff;
    if (x == 0 || std::isinf(x)) return uint16_t(sign | (x == 0 ? 0 : infinity));
    const int exponent = std::max(std::ilogb(x), 1 - bias);
    const double units = std::nearbyint(std::ldexp(std::fabs(x), fraction - exponent));
    if (exponent > bias) return uint16_t(sign | infinity);
    return uint16_t(sign | std::min(infinity, ((exponent + bias - 1) << fraction) + int(units)));
}

inline float from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    return bits_as<float>(&wide);
}

inline float from_fp16(uint16_t bits) {
    const bool finite = (bits & 0x7c00) != 0x7c00;
    const uint32_t wide = uint32_t(bits & 0x8000) << 16 | uint32_t(bits & 0x7fff) << 13 | (finite ? 0u : 0x7f800000u);
    return bits_as<float>(&wide) * (finite ? 0x1p112f : 1.0f);
}

struct Fragments {
    float* c;
    const uint32_t *a, *b;
};

// mma.sync.m16n8k(8 PER).row.col with PER operands in a register; `decode(bits, place)` is one of them.
template <int PER, class Decode>
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Call call, Decode decode) {
    Fragments mine{c, a, b};
    warp_call(0xffffffffu, call, &mine, [decode](Fiber* lanes) {
        float left[16][8 * PER], right[8 * PER][8], sum[16][8] = {};
        for (int l = 0; l < 32; ++l) {
            const auto& of = *static_cast<Fragments*>(lanes[l].operands);
            for (int p = 0; p < PER; ++p) {
                const int k = l % 4 * PER + p;
                for (int r = 0; r < 4; ++r) left[l / 4 + r % 2 * 8][k + r / 2 * 4 * PER] = decode(of.a[r], p);
                for (int r = 0; r < 2; ++r) right[k + r * 4 * PER][l / 4] = decode(of.b[r], p);
            }
        }
        for (int k = 0; k < 8 * PER; ++k)
            for (int i = 0; i < 16; ++i)
                for (int j = 0; j < 8; ++j) sum[i][j] += left[i][k] * right[k][j];
        for (int l = 0; l < 32; ++l)
            for (int e = 0; e < 4; ++e)
                static_cast<Fragments*>(lanes[l].operands)->c[e] += sum[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2];
    });
}

}  // namespace cuda_cpu

inline cudaError_t cudaPeekAtLastError() { return cudaError_t(cuda_cpu::last_error().load()); }
inline cudaError_t cudaGetLastError() { return cudaError_t(cuda_cpu::last_error().exchange(0)); }
inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorLaunchFailure || error == cudaErrorInvalidConfiguration)
        return cuda_cpu::last_message().c_str();
    return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "unknown error";
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }

template <class... P>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
    if (bytes < 0 || size_t(bytes) > cuda_cpu::MOST_SHARED) return cudaErrorInvalidValue;
    cuda_cpu::most_dynamic()[reinterpret_cast<const void*>(kernel)] = size_t(bytes);
    return cudaSuccess;
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    const int base = int(cuda_cpu::lane()) / width * width;
    return cuda_cpu::exchanged(mask, value, base + (from & (width - 1)), cuda_cpu::SHFL);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    return cuda_cpu::exchanged(mask, value, cuda_cpu::within(width, int(cuda_cpu::lane()) ^ bits), cuda_cpu::SHFL_XOR);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return cuda_cpu::exchanged(mask, value, cuda_cpu::within(width, int(cuda_cpu::lane() + by)), cuda_cpu::SHFL_DOWN);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const int from = int(cuda_cpu::lane()) - int(by);
    return cuda_cpu::exchanged(mask, value, cuda_cpu::within(width, from), cuda_cpu::SHFL_UP);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    cuda_cpu::warp_call(mask, cuda_cpu::SYNCWARP, nullptr, [](cuda_cpu::Fiber*) {});
}
inline unsigned __ballot_sync(unsigned mask, int condition) {
    cuda_cpu::Exchanged<unsigned> mine{condition != 0, 0, -1};
    cuda_cpu::warp_call(mask, cuda_cpu::BALLOT, &mine, [mask](cuda_cpu::Fiber* lanes) {
        const auto of = [&](int l) { return static_cast<cuda_cpu::Exchanged<unsigned>*>(lanes[l].operands); };
        unsigned votes = 0;
        for (int l = 0; l < 32; ++l)
            if (mask >> l & 1) votes |= of(l)->value << l;
        for (int l = 0; l < 32; ++l)
            if (mask >> l & 1) of(l)->result = votes;
    });
    return mine.result;
}
inline int __any_sync(unsigned mask, int condition) { return __ballot_sync(mask, condition) != 0; }
inline int __all_sync(unsigned mask, int condition) { return __ballot_sync(mask, condition) == mask; }

using std::max;
using std::min;
template <class T>
inline T __ldg(const T* from) {
    return *from;
}
inline float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline uint32_t __float_as_uint(float x) { return cuda_cpu::bits_as<uint32_t>(&x); }
inline float __uint_as_float(uint32_t bits) { return cuda_cpu::bits_as<float>(&bits); }

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return cuda_cpu::from_bf16(x.bits); }
inline float __half2float(__half x) { return cuda_cpu::from_fp16(x.bits); }
inline __nv_bfloat16 __double2bfloat16(double x) { return {cuda_cpu::narrowed(x, 7, 127)}; }
inline __nv_bfloat16 __float2bfloat16(float x) { return {cuda_cpu::narrowed(x, 7, 127)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __float2bfloat16(x); }
inline __half __double2half(double x) { return {cuda_cpu::narrowed(x, 10, 15)}; }
inline __half __float2half(float x) { return {cuda_cpu::narrowed(x, 10, 15)}; }
inline __half __float2half_rn(float x) { return __float2half(x); }

// Twins of the kernels' inline PTX.

inline void cp_async16(void* to, const void* from, int read) { cuda_cpu::copy_async(to, from, 16, read); }
inline void cp_async8(void* to, const void* from, int read) { cuda_cpu::copy_async(to, from, 8, read); }
inline void cp_async4(void* to, const void* from, int read) { cuda_cpu::copy_async(to, from, 4, read); }
inline void cp_async_commit() {
    auto& me = cuda_cpu::self();
    me.groups.push_back(me.open);
    me.open.clear();
}
template <int N>
inline void cp_async_wait() {
    auto& groups = cuda_cpu::self().groups;
    const size_t landed = groups.size() > size_t(N) ? groups.size() - N : 0;
    for (size_t i = 0; i < landed && !cuda_cpu::block->early; ++i)
        for (const auto& copy : groups[i]) cuda_cpu::land(copy);
    groups.erase(groups.begin(), groups.begin() + std::ptrdiff_t(landed));
}

inline uint32_t to_tf32(float x) {  // cvt.rna.tf32.f32
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fffffffu : std::isinf(x) ? bits : (bits + 0x1000u) & ~0x1fffu;
}
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto decode = [](uint32_t bits, int) {
        return __uint_as_float(bits & ~0x1fffu);
    };  // the rest is not looked at
    cuda_cpu::mma<1>(c, a, b, cuda_cpu::MMA_TF32, decode);
}
inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto decode = [](uint32_t bits, int p) { return cuda_cpu::from_bf16(uint16_t(bits >> 16 * p)); };
    cuda_cpu::mma<2>(c, a, b, cuda_cpu::MMA_BF16, decode);
}
inline void mma_m16n8k16_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto decode = [](uint32_t bits, int p) { return cuda_cpu::from_fp16(uint16_t(bits >> 16 * p)); };
    cuda_cpu::mma<2>(c, a, b, cuda_cpu::MMA_FP16, decode);
}
