// Threads, blocks, barriers, warp calls and launches of cuda_cpu.h.
#pragma once

#include <link.h>
#include <sys/mman.h>
#if !defined(__x86_64__) || defined(CUDA_CPU_UCONTEXT)
#include <ucontext.h>
#define CUDA_CPU_SWAPCONTEXT 1
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define CUDA_CPU_UNSEEN __attribute__((noinline, no_sanitize_thread))
#else
#define CUDA_CPU_UNSEEN
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_unpoison_memory_region(const volatile void*, size_t);
void __asan_handle_no_return();
}
#endif
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define CUDA_CPU_SANITIZED 1
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local
#define CUDA_DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(::cuda_cpu::block->dynamic)
#define CUDA_LAUNCH(kernel, grid, threads, shared, stream, ...) \
    ::cuda_cpu::launch(#kernel, kernel, grid, threads, shared, stream, __VA_ARGS__)
#define __syncthreads() ::cuda_cpu::syncthreads(__LINE__)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorLaunchFailure = 719
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_cpu {

constexpr size_t STACK = 64 << 10, PAGE = 4096;
// Bytes of dynamic shared memory: without cudaFuncSetAttribute, and with it on sm_86, sm_89 and sm_120.
constexpr size_t WITHOUT_ASKING = 48 << 10, MOST_SHARED = 99 << 10;
constexpr unsigned MOST_THREADS = 1024;
constexpr uint16_t POISON = 0x7fff;  // NaN in every format

enum State : uint8_t { READY, AT_BARRIER, IN_WARP_CALL, DONE };
enum Call { SHFL = 1, SHFL_XOR, SHFL_DOWN, SHFL_UP, SYNCWARP, BALLOT, MMA_TF32, MMA_BF16, MMA_FP16 };

struct Copy {
    void* to;
    const void* from;
    size_t bytes, read;
};

struct Fiber {
#if defined(CUDA_CPU_SWAPCONTEXT)
    ucontext_t context;
#else
    void* top = nullptr;
#endif
    const char* stack = nullptr;
    size_t stack_bytes = 0;
    State state = DONE;
    uint3 thread{};
    Call call{};
    uint32_t mask = 0;
    void* operands = nullptr;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
    void* seen = nullptr;  // what the sanitizer knows it by
};

struct Range {
    char *begin = nullptr, *end = nullptr;
    bool holds(const void* p, size_t bytes) const { return p >= begin && static_cast<const char*>(p) + bytes <= end; }
};

// A block of threads as it runs; `scheduler` is the OS thread's own stack.
struct Block {
    std::vector<Fiber> fibers;
    Fiber scheduler;
    unsigned current = 0, alive = 0, waiting = 0, barriers = 0, warp_calls[MOST_THREADS / 32] = {};
    int line = 0;  // of the barrier at which threads wait
    char* dynamic = nullptr;
    size_t dynamic_bytes = 0;
    Range static_shared;
    bool early = false;
    const std::function<void()>* body = nullptr;
    std::string error;
    char barrier_order[2], warp_order[MOST_THREADS / 32][2];  // addresses that stand for orders, to the sanitizer
};

inline thread_local Block* block = nullptr;

inline std::atomic<int>& last_error() {
    static std::atomic<int> error{0};
    return error;
}
inline std::string& last_message() {
    static std::string message;
    return message;
}
inline void fail(cudaError_t error, const std::string& message) { last_error() = error, last_message() = message; }

// Accesses in its scope are not the kernel's.
struct Unseen {
#if defined(__SANITIZE_THREAD__)
    Unseen() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
    ~Unseen() { end(); }
    static void end() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
#else
    Unseen() {}
    ~Unseen() {}
    static void end() {}
#endif
};

inline void release(void* order) {
    (void)order;
#if defined(__SANITIZE_THREAD__)
    __tsan_release(order);
#endif
}
inline void acquire(void* order) {
    (void)order;
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(order);
#endif
}

#if !defined(CUDA_CPU_SWAPCONTEXT)
__attribute__((naked, noinline, no_sanitize_thread)) inline void exchange_stacks(void**, void*) {
    asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
        "movq %rsp, (%rdi); movq %rsi, %rsp\n"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif

CUDA_CPU_UNSEEN inline void jump(Fiber& from, Fiber& to, bool for_good = false) {
    (void)for_good;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.seen, 1);  // 1: orders nothing
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    if (for_good) __asan_handle_no_return();
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, to.stack, to.stack_bytes);
#endif
#if defined(CUDA_CPU_SWAPCONTEXT)
    swapcontext(&from.context, &to.context);
#else
    exchange_stacks(&from.top, to.top);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline Fiber& self() { return block->fibers[block->current]; }
inline unsigned lane() { return block->current % 32; }

inline void wait_until_ready() {
    for (Fiber& me = self(); me.state != READY;) jump(me, block->scheduler);
}

[[noreturn]] inline void end_launch(const std::string& why) {
    if (block->error.empty()) block->error = why;
    Fiber &me = self(), &scheduler = block->scheduler;
    me.state = DONE;
    Unseen::end();
    for (;;) jump(me, scheduler, true);
}

inline void open_barrier() {
    for (Fiber& fiber : block->fibers)
        if (fiber.state == AT_BARRIER) fiber.state = READY;
    block->waiting = 0;
    ++block->barriers;
}

inline void syncthreads(int line) {
    Unseen unseen;
    char* const order = &block->barrier_order[block->barriers % 2];
    release(order);
    if (block->waiting && block->line != line)
        end_launch("threads wait in __syncthreads at line " + std::to_string(block->line) + " and at line " +
                   std::to_string(line));
    self().state = AT_BARRIER;
    block->line = line;
    if (++block->waiting == block->alive) open_barrier();
    wait_until_ready();
    acquire(order);
}

// Every lane of the mask waits with its operands; the last to come runs `work(lanes)` for all of them. Of these calls
// only __syncwarp orders accesses to memory.
template <class Work>
inline void warp_call(uint32_t mask, Call call, void* operands, Work work) {
    Unseen unseen;
    Fiber& me = self();
    const unsigned first = block->current - lane(), warp = first / 32;
    if (!(mask >> lane() & 1)) end_launch("lane " + std::to_string(lane()) + " is not in the mask of its warp call");
    me.mask = mask, me.call = call, me.operands = operands, me.state = IN_WARP_CALL;
    char* const order = &block->warp_order[warp][block->warp_calls[warp] % 2];
    if (call == SYNCWARP) release(order);
    bool all = true;
    for (unsigned l = 0; l < 32; ++l) {
        if (!(mask >> l & 1)) continue;
        if (first + l >= block->fibers.size() || block->fibers[first + l].state == DONE)
            end_launch("lane " + std::to_string(l) + " of the mask of a warp call has exited");
        const Fiber& other = block->fibers[first + l];
        all = all && other.state == IN_WARP_CALL && other.mask == mask && other.call == call;
    }
    if (all) {
        work(&block->fibers[first]);
        if (call == SYNCWARP) ++block->warp_calls[warp];
        for (unsigned l = 0; l < 32; ++l)
            if (mask >> l & 1) block->fibers[first + l].state = READY;
    }
    wait_until_ready();
    if (call == SYNCWARP) acquire(order);
}

inline void finish() {
    Unseen unseen;
    Fiber& me = self();
    for (const auto& group : me.groups)
        if (!group.empty()) end_launch("a thread exits while its copies are in flight");
    if (!me.open.empty()) end_launch("a thread exits with copies that it did not commit");
    release(block);
    me.state = DONE;
    --block->alive;
    if (block->waiting && block->waiting == block->alive) open_barrier();  // who has exited is not waited for
}

CUDA_CPU_UNSEEN inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    Fiber& back = block->scheduler;
    __sanitizer_finish_switch_fiber(nullptr, reinterpret_cast<const void**>(&back.stack), &back.stack_bytes);
#endif
    acquire(block);
    (*block->body)();
    finish();
    Fiber &me = self(), &scheduler = block->scheduler;
    for (;;) jump(me, scheduler, true);
}

inline void poison(void* from, size_t bytes) {
    for (size_t at = 0; at + 2 <= bytes; at += 2) std::memcpy(static_cast<char*>(from) + at, &POISON, 2);
}

// The memory of this thread's thread-local variables in this module; `__shared__` ones are among them.
inline Range thread_locals() {
    Range found;
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* out) {
            for (int i = 0; i < module->dlpi_phnum; ++i) {
                if (module->dlpi_phdr[i].p_type != PT_TLS || !module->dlpi_tls_data) continue;
                char* const begin = static_cast<char*>(module->dlpi_tls_data);
                const Range range{begin, begin + module->dlpi_phdr[i].p_memsz};
                if (range.holds(&threadIdx, sizeof threadIdx)) return *static_cast<Range*>(out) = range, 1;
            }
            return 0;
        },
        &found);
    return found;
}

inline void poison_shared() {
    poison(block->dynamic, block->dynamic_bytes);
#if !defined(CUDA_CPU_SANITIZED)
    const auto kept = std::make_tuple(blockIdx, blockDim, gridDim, block);
    poison(block->static_shared.begin, size_t(block->static_shared.end - block->static_shared.begin));
    std::tie(blockIdx, blockDim, gridDim, block) = kept;
#endif
}

inline char* mapped(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    return static_cast<char*>(p);
}

// Dynamic shared memory, which ends at memory that must not be touched.
class Dynamic {
  public:
    explicit Dynamic(size_t size) : bytes((size + 15) / 16 * 16) {
        if (!bytes) return;
#if defined(CUDA_CPU_SANITIZED)
        if (posix_memalign(reinterpret_cast<void**>(&begin), 16, size)) std::abort();
#else
        whole_ = (bytes + PAGE - 1) / PAGE * PAGE;
        begin = mapped(whole_ + PAGE) + whole_ - bytes;
        mprotect(begin + bytes, PAGE, PROT_NONE);
#endif
    }
    ~Dynamic() {
#if defined(CUDA_CPU_SANITIZED)
        std::free(begin);
#else
        if (begin) munmap(begin + bytes - whole_, whole_ + PAGE);
#endif
    }
    Dynamic(const Dynamic&) = delete;
    Dynamic& operator=(const Dynamic&) = delete;

    char* begin = nullptr;
    size_t bytes;

  private:
    size_t whole_ = 0;
};

// Stacks, and what the sanitizer knows threads by: made once, used by one block at a time.
struct Slot {
    std::atomic<bool> taken{false};
    char* stacks = nullptr;
    void* seen[MOST_THREADS] = {};
};
constexpr unsigned SLOTS = 4;

inline Slot& taken_slot(uint64_t index) {
    static Slot slots[SLOTS];
    Unseen unseen;
    Slot& slot = slots[index % SLOTS];
    while (slot.taken.exchange(true, std::memory_order_relaxed)) std::this_thread::yield();
    if (!slot.stacks) slot.stacks = mapped(MOST_THREADS * STACK);
    acquire(&slot);
    return slot;
}

inline void give_back(Slot& slot) {
    release(&slot);
    slot.taken.store(false, std::memory_order_relaxed);
}

// `order`: 0 forward, -1 reverse, a warp as far as it comes before the next one; or a seed, all threads in turn.
inline std::vector<unsigned> order_of(unsigned threads, int order, uint64_t index) {
    std::vector<unsigned> places(threads);
    for (unsigned i = 0; i < threads; ++i) places[i] = order < 0 ? threads - 1 - i : i;
    uint64_t state = uint64_t(order) * 0x9E3779B97F4A7C15u + index;
    for (unsigned i = threads; order > 0 && i > 1; --i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        std::swap(places[i - 1], places[(state >> 33) % i]);
    }
    return places;
}

inline void begin_fiber(Fiber& fiber, unsigned index, Slot& slot) {
    char* const stack = slot.stacks + index * STACK;
    fiber = Fiber();
    fiber.stack = stack, fiber.stack_bytes = STACK, fiber.state = READY;
    fiber.thread = {index % blockDim.x, index / blockDim.x % blockDim.y, index / (blockDim.x * blockDim.y)};
#if defined(__SANITIZE_THREAD__)
    if (!slot.seen[index]) slot.seen[index] = __tsan_create_fiber(0);
    fiber.seen = slot.seen[index];
#endif
#if defined(CUDA_CPU_SWAPCONTEXT)
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack, fiber.context.uc_stack.ss_size = STACK, fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
#else
    void** const top = reinterpret_cast<void**>(stack + STACK) - 2;  // rsp + 8 is a multiple of 16 on entry
    *top = reinterpret_cast<void*>(&fiber_main);
    fiber.top = std::memset(top - 6, 0, 6 * sizeof(void*));
#endif
}

// Runs threads at some places, each until it waits or ends, unless the block has failed; whether there were any.
inline bool run_some(const std::vector<unsigned>& places, size_t first, size_t last) {
    bool any = false;
    for (size_t i = first; i < last && block->error.empty(); ++i) {
        Fiber& fiber = block->fibers[places[i]];
        if (fiber.state != READY) continue;
        any = true;
        block->current = places[i];
        threadIdx = fiber.thread;
        jump(block->scheduler, fiber);
    }
    return any;
}

inline void run_block(unsigned threads, int order, uint64_t index, Slot& slot) {
    Unseen unseen;
    Block& b = *block;
    poison_shared();
    b.fibers.resize(threads);
    b.alive = threads, b.waiting = 0;
    b.error.clear();
#if defined(__SANITIZE_THREAD__)
    b.scheduler.seen = __tsan_get_current_fiber();
#endif
    release(block);
    for (unsigned i = 0; i < threads; ++i) begin_fiber(b.fibers[i], i, slot);
    const auto places = order_of(threads, order, index);
    const size_t at_a_time = order > 0 ? threads : 32;
    for (bool progress = true; progress;) {
        progress = false;
        for (size_t first = 0; first < threads; first += at_a_time)
            while (run_some(places, first, std::min<size_t>(threads, first + at_a_time))) progress = true;
    }
    acquire(block);
    const auto count = [&](State state) {
        return std::to_string(
            std::count_if(b.fibers.begin(), b.fibers.end(), [&](const Fiber& f) { return f.state == state; }));
    };
    if (b.error.empty() && b.alive)
        b.error = "deadlock: " + count(AT_BARRIER) + " threads in __syncthreads, " + count(IN_WARP_CALL) +
                  " in a warp call, " + count(DONE) + " exited";
#if defined(__SANITIZE_ADDRESS__)
    if (!b.error.empty()) __asan_unpoison_memory_region(slot.stacks, threads * STACK);  // of threads that did not end
#endif
}

inline const char* setting(const char* name, const char* otherwise) {
    const char* const value = std::getenv(name);
    return value && *value ? value : otherwise;
}

inline std::map<const void*, size_t>& most_dynamic() {
    static std::map<const void*, size_t> bytes;
    return bytes;
}

inline std::string refusal(const void* kernel, dim3 grid, dim3 threads, size_t shared) {
    if (uint64_t(threads.x) * threads.y * threads.z - 1 >= MOST_THREADS || threads.z > 64)
        return "too many threads or none";
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "grid";
    const auto asked = most_dynamic().find(kernel);
    if (shared > (asked == most_dynamic().end() ? WITHOUT_ASKING : asked->second))
        return std::to_string(shared) + " bytes of shared memory were not asked for by cudaFuncSetAttribute";
    return "";
}

template <class... P, class... A>
inline void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared, cudaStream_t,
                   A... a) {
    const std::string why = refusal(reinterpret_cast<const void*>(kernel), grid, threads, shared);
    if (!why.empty()) return fail(cudaErrorInvalidConfiguration, std::string(name) + ": " + why);
    const std::string asked = setting("CUDA_CPU_ORDER", "fwd");
    const int order = asked == "fwd" ? 0 : asked == "rev" ? -1 : std::atoi(asked.c_str());
    const bool early = !std::strcmp(setting("CUDA_CPU_ASYNC", "late"), "early");
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    const unsigned in_block = threads.x * threads.y * threads.z;
    const int cores = std::atoi(setting("CUDA_CPU_THREADS", "0"));
    const uint64_t at_a_time = cores > 0 ? std::min(SLOTS, unsigned(cores))
                                         : std::min(SLOTS, std::max(1u, std::thread::hardware_concurrency()));
    const std::function<void()> body = [&] { kernel(a...); };
    std::atomic<uint64_t> running{0};  // relaxed: to a sanitizer, it must not order blocks
    std::atomic<bool> failed{false};
    std::string message;

    // Blocks `index`, index + step, ... Threads are new ones, so that shared memory that is not dynamic is, too: to the
    // thread sanitizer, what two blocks use in turn without an order between them is a race, and that would be one.
    const auto work = [&](uint64_t index, uint64_t step) {
        Block own;
        block = &own;
        blockDim = threads, gridDim = grid;
        const Dynamic dynamic(shared);
        own.dynamic = dynamic.begin, own.dynamic_bytes = shared;
        own.static_shared = thread_locals();
        own.body = &body, own.early = early;
        Slot& slot = taken_slot(index);
        for (; !failed.load(std::memory_order_relaxed) && index < blocks; index += step) {
            blockIdx = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / grid.x / grid.y)};
            run_block(in_block, order, index, slot);
            if (!own.error.empty() && !failed.exchange(true))
                message = std::string(name) + ", block " + std::to_string(index) + ": " + own.error;
        }
        give_back(slot);
        running.fetch_sub(1, std::memory_order_relaxed);
    };
    const uint64_t first = std::strcmp(setting("CUDA_CPU_BLOCKS", "all"), "last") ? 0 : blocks - 1;
#if defined(__SANITIZE_THREAD__)
    const uint64_t step = blocks;
#else
    const uint64_t step = std::min(blocks, at_a_time);
#endif
    std::vector<std::thread> workers;
    for (uint64_t i = first; i < std::min(blocks, first + step); ++i) {
        while (running.load(std::memory_order_relaxed) >= at_a_time) std::this_thread::yield();
        running.fetch_add(1, std::memory_order_relaxed);
        workers.emplace_back(work, i, step);
    }
    for (auto& worker : workers) worker.join();
    if (failed) fail(cudaErrorLaunchFailure, message);
}

}  // namespace cuda_cpu
