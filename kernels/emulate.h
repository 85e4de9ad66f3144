// CUDA as far as our kernels use it, for a host compiler: the same sources run in tests on machines without a GPU.
//
//     thread   a fiber with a stack of its own        block   all its fibers on one OS thread, in an order that a seed decides
//     barrier  counts arrivals, then yields           grid    block after block
//
// What a GPU leaves to chance is made to show: shared memory holds NaN when a block begins, what an asynchronous copy will bring is
// NaN until it is waited for, sums of a warpgroup's products as well, and the order of threads is any. A barrier that not all threads reach,
// lanes of a warp that meet in different lines, a shuffle from a lane that is not there, a misaligned 16-byte access, a product of a
// warpgroup whose factors are not published, not ready or overwritten meanwhile, and boxes that nobody waits for or of which others bytes
// arrive than are expected end the process with file and line.
//
// It says nothing of speed, of bank conflicts, of registers, or of memory order between blocks.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
// One section for all, which is filled with NaN before each block. Launches take turns, so a block has it alone.
#define __shared__ static __attribute__((section("emulated_shared")))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct bf16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
struct fp8 {
    uint8_t bits;
};

/// A table of rows as `Card::table` of the emulated card writes it.
struct Table {
    uint64_t address, rows, columns, box_rows, magic, unused[11];
};
using Arrivals = uint64_t;

static inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline float to_float(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
static inline bf16 to_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {(uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
static inline uint32_t pack_bf16(float low, float high) {
    return (uint32_t)to_bf16(low).bits | (uint32_t)to_bf16(high).bits << 16;
}
static inline float to_float(__half x) {
    const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    const float sign = x.bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexpf(1024 + mantissa, exponent - 25) : ldexpf(mantissa, -24));
}
static inline float to_float(fp8 x) {
    const int exponent = x.bits >> 3 & 15, mantissa = x.bits & 7;
    const float sign = x.bits >> 7 ? -1.0f : 1.0f;
    if (exponent == 15 && mantissa == 7) return NAN;
    return sign * (exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9));
}
/// To the nearest, ties to even; beyond 448 it is 448.
static inline fp8 to_fp8(float x) {
    const uint8_t sign = std::signbit(x) ? 0x80 : 0;
    x = fabsf(x);
    if (std::isnan(x)) return {0x7f};
    if (x >= 448.0f) return {(uint8_t)(sign | 0x7e)};
    int exponent = x > 0 ? ilogbf(x) : -6;
    if (exponent < -6) exponent = -6;
    int steps = (int)nearbyintf(ldexpf(x, 3 - exponent));
    if (steps == 16) steps = 8, exponent++;
    return {(uint8_t)(sign | (steps < 8 ? steps : (exponent + 7) << 3 | (steps - 8)))};
}

template <class T>
static inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
static inline T max(T a, T b) {
    return a < b ? b : a;
}
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// The C library owns these names, so they are macros.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __fdividef(x, y) ((x) / (y))
template <class T>
static inline T __ldg(const T* from) {
    return *from;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; i++) sum += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
    return sum;
}

namespace emulate {

struct PendingCopy {
    void* to;
    const void* from;
    bool valid;
};

struct Warp {
    uint64_t slots[32];
    uint32_t fragments[32][6];
    const void* rows[32];
    const char* lines[32];
    uint32_t arrived = 0, lanes = 0;
    uint64_t generation = 0;
};

struct Fiber {
    void* stack_pointer;
    dim3 thread;
    unsigned index, lane;
    Warp* warp;
    bool done;
    const char* line;
    PendingCopy copies[512];
    int copy_count, group_ends[64], group_count;
    // Of products by a warpgroup: whether what was copied is published, and registers are ready.
    bool is_unpublished, is_ready;
};

struct Block {
    dim3 index, block_size, grid_size;
    unsigned threads, arrived, alive;
    uint64_t generation;
    Fiber* running;
    void* scheduler;
    char* dynamic_shared;
    bool progress;
};

extern thread_local Block block;

[[noreturn]] void fail(const char* what);
void meet_block(const char* line);
void meet_warp(uint32_t mask, const char* line);
void begin_copy(void* to, const void* from, bool valid);
void end_copies();
void await_copies(int left);
void read_matrices(uint32_t (&out)[4], const void* row, bool transposed, const char* line);
void multiply_matrices(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool eight_bits, const char* line);
uint32_t shared_address(const void* at);
void publish();
void make_ready(const char* line);
void begin_arrivals(Arrivals* arrivals);
void expect_arrivals(Arrivals* arrivals, int bytes);
void await_arrivals(Arrivals* arrivals, int parity, const char* line);
void begin_box(void* to, const Table* table, int row, int column, Arrivals* arrivals);
void begin_product(float (*d)[4], int count, const uint32_t (&a)[4], uint64_t matrix, bool across, bool fresh, const char* line);
void await_products(const char* line);

inline unsigned lane() { return block.running->lane; }

/// What lane `from` holds; `from` below 0: what this one holds.
template <class T>
T exchange(uint32_t mask, T value, int from, const char* line) {
    static_assert(sizeof(T) <= 8, "a register or two");
    Warp* warp = block.running->warp;
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    warp->slots[lane()] = bits;
    meet_warp(mask, line);
    T result = value;
    if (from >= 0) {
        if (!(mask >> from & 1) || !(warp->lanes >> from & 1)) fail("a shuffle reads a lane that is not in it");
        memcpy(&result, &warp->slots[from], sizeof(T));
    }
    meet_warp(mask, line);
    return result;
}
unsigned ballot(uint32_t mask, bool value, const char* line);

using Call = void (*)(void* function, void** arguments);
/// A kernel under its name. Arguments come as cuLaunchKernel takes them: an array of addresses.
struct Kernel {
    const char* name;
    void* function;
    Call call;
    int arguments;
    Kernel* next;

    static Kernel*& first();
    template <class... A>
    Kernel(const char* name, void (*function)(A...))
        : name(name), function(reinterpret_cast<void*>(function)), call(&invoke<A...>), arguments(sizeof...(A)), next(first()) {
        first() = this;
    }

  private:
    template <class... A>
    static void invoke(void* function, void** arguments) {
        apply(reinterpret_cast<void (*)(A...)>(function), arguments, std::index_sequence_for<A...>{});
    }
    template <class... A, size_t... I>
    static void apply(void (*function)(A...), void** arguments, std::index_sequence<I...>) {
        function(*reinterpret_cast<std::remove_reference_t<A>*>(arguments[I])...);
    }
};

}  // namespace emulate

// The emulator itself defines functions of some of these names.
#ifndef EMULATOR
#define EMULATE_TEXT2(x) #x
#define EMULATE_TEXT(x) EMULATE_TEXT2(x)
#define EMULATE_LINE __FILE__ ":" EMULATE_TEXT(__LINE__)

#define threadIdx (emulate::block.running->thread)
#define blockIdx (emulate::block.index)
#define blockDim (emulate::block.block_size)
#define gridDim (emulate::block.grid_size)
#define __syncthreads() emulate::meet_block(EMULATE_LINE)
#define __syncwarp(...) emulate::meet_warp(0xffffffffu, EMULATE_LINE)
#define __shfl_xor_sync(mask, value, step) \
    emulate::exchange((mask), (value), (int)(emulate::lane() ^ (unsigned)(step)), EMULATE_LINE)
#define __shfl_sync(mask, value, from) emulate::exchange((mask), (value), (int)((from) & 31), EMULATE_LINE)
#define __shfl_down_sync(mask, value, step) \
    emulate::exchange((mask), (value), emulate::lane() + (step) < 32 ? (int)(emulate::lane() + (step)) : -1, EMULATE_LINE)
#define __shfl_up_sync(mask, value, step) \
    emulate::exchange((mask), (value), (int)emulate::lane() - (int)(step), EMULATE_LINE)
#define __ballot_sync(mask, value) emulate::ballot((mask), (value), EMULATE_LINE)
static inline void copy_async(void* to, const void* from, bool valid) { emulate::begin_copy(to, from, valid); }
static inline void copy_commit() { emulate::end_copies(); }
template <int LEFT>
static inline void copy_wait() {
    emulate::await_copies(LEFT);
}
#define load_matrices(out, ...) emulate::read_matrices((out), (__VA_ARGS__), false, EMULATE_LINE)
#define load_matrices_transposed(out, ...) emulate::read_matrices((out), (__VA_ARGS__), true, EMULATE_LINE)
#define multiply_add(d, a, b0, b1) emulate::multiply_matrices((d), (a), (b0), (b1), false, EMULATE_LINE)
#define multiply_add_fp8(d, a, b0, b1) emulate::multiply_matrices((d), (a), (b0), (b1), true, EMULATE_LINE)
#define WARPGROUPS
static inline uint32_t shared_address(const void* at) { return emulate::shared_address(at); }
static inline void group_publish() { emulate::publish(); }
#define group_begin() emulate::make_ready(EMULATE_LINE)
template <bool ACROSS, int COUNT>
static inline void group_multiply_add(float (&d)[COUNT][4], const uint32_t (&a)[4], uint64_t matrix, bool fresh) {
    emulate::begin_product(d, COUNT, a, matrix, ACROSS, fresh, EMULATE_LINE);
}
#define group_end(sums) emulate::await_products(EMULATE_LINE)
static inline void arrivals_begin(Arrivals* arrivals) { emulate::begin_arrivals(arrivals); }
static inline void arrivals_expect(Arrivals* arrivals, int bytes) { emulate::expect_arrivals(arrivals, bytes); }
#define arrivals_await(arrivals, parity) emulate::await_arrivals((arrivals), (parity), EMULATE_LINE)
static inline void copy_box(void* to, const Table* table, int row, int column, Arrivals* arrivals) {
    emulate::begin_box(to, table, row, column, arrivals);
}
// One OS thread at a time: nothing can come between.
template <class T>
static inline T atomicAdd(T* at, T value) {
    T before = *at;
    *at = before + value;
    return before;
}
template <class T>
static inline T atomicMax(T* at, T value) {
    T before = *at;
    *at = before > value ? before : value;
    return before;
}
#define __threadfence() ((void)0)

#define KERNEL extern "C" void
#define TABLE const Table
#define EXPORT(name) static emulate::Kernel emulate_kernel_##name(#name, &name);
#define DYNAMIC_SHARED(name) unsigned char* const name = reinterpret_cast<unsigned char*>(emulate::block.dynamic_shared)
#endif
