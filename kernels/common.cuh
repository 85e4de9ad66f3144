// What every kernel file includes, the only header but for `attention.cuh`: CUDA under nvcc, `emulate.h` under a host compiler.
//
// The wrappers here have the same meaning in both: 16-byte copies into shared memory that complete later, matrix fragments of
// a warp, and the few conversions between number formats. Kernels are `extern "C"`, so that they are found by name, and take
// plain pointers and numbers. Shapes are row-major. No kernel launches another, and none needs the CUDA runtime.
#pragma once
#ifdef EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;
/// 8 bits: sign, 4 of exponent, 3 of mantissa; up to 448, no infinity.
struct fp8 {
    uint8_t bits;
};

/// Rows of bf16 in device memory out of which boxes of 64 columns are copied, as the driver writes it: `cuTensorMapEncodeTiled`, with the
/// pieces of a row swapped as `group_matrix` has them.
struct alignas(128) Table {
    uint64_t words[16];
};

#define KERNEL extern "C" __global__ void
#define EXPORT(name)
/// A table that a kernel is given by value.
#define TABLE const __grid_constant__ Table
/// The dynamic shared memory of a block, 128-byte aligned.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(fp8 x) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3)));
}
__device__ __forceinline__ bf16 to_bf16(float x) { return __float2bfloat16(x); }
__device__ __forceinline__ fp8 to_fp8(float x) { return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)}; }
/// Two neighbours in one register, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

/// Begins to copy 16 bytes; zeros arrive instead where `valid` is false. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(valid ? 16 : 0));
}
/// The copies begun since the last call are a group.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;\n"); }
/// Waits until at most `LEFT` groups of this thread are under way.
template <int LEFT>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(LEFT));
}

/// Four 8x8 matrices of 16-bit numbers out of shared memory. Lane `8 * m + r` names row `r` of matrix `m`, 16 bytes; register `m`
/// gets columns `2 * (lane % 4)` and the next of row `lane / 4`.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address));
}
/// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address));
}
/// `d[16, 8] += a[16, 16] * b[16, 8]` of a warp, in bf16 with f32 sums. With g = lane / 4 and q = lane % 4: a holds rows
/// g, g + 8, g, g + 8 at columns 2q, 2q, 2q + 8, 2q + 8; b holds column g at rows 2q and 2q + 8; d holds rows g, g, g + 8, g + 8 at
/// columns 2q, 2q + 1, 2q, 2q + 1.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// `d[16, 8] += a[16, 32] * b[32, 8]` of a warp, in fp8 with f32 sums: as `multiply_add`, with four numbers in each register where that
/// has two, at k = 4q.. and 4q + 16... Chips before 8.9 do it in bf16, which holds any fp8.
__device__ __forceinline__ void multiply_add_fp8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 890
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    // The low and the high two numbers of each register, in two steps: the sum does not mind which k they are, as long as a and b agree.
    const auto two = [](uint32_t four, int which) {
        return pack_bf16(to_float(fp8{(uint8_t)(four >> (16 * which))}), to_float(fp8{(uint8_t)(four >> (16 * which + 8))}));
    };
    for (int which = 0; which < 2; which++) {
        const uint32_t wide[4] = {two(a[0], which), two(a[1], which), two(a[2], which), two(a[3], which)};
        multiply_add(d, wide, two(b0, which), two(b1, which));
    }
#endif
}

// Hopper multiplies for four warps at once, out of shared memory, while they do something else. Only code for that very chip may use
// what begins with `group_`.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WARPGROUPS
#endif
/// An address of shared memory as descriptors have it.
__device__ __forceinline__ uint32_t shared_address(const void* at) { return (uint32_t)__cvta_generic_to_shared(at); }
/// What this thread has written into shared memory is there for products of a warpgroup, behind the next barrier.
__device__ __forceinline__ void group_publish() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
/// Sums and factors in registers are ready: before the first product behind whatever wrote them.
__device__ __forceinline__ void group_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
/// Waits until all products are done whose sums these are. None may be touched before.
template <int COUNT>
__device__ __forceinline__ void group_end(float (&sums)[COUNT][4]) {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n" ::: "memory");
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])::"memory");
}
#define SUMS_OF_FOUR(at) "+f"(d[at][0]), "+f"(d[at][1]), "+f"(d[at][2]), "+f"(d[at][3])
#define SUMS_OF_32(at) \
    SUMS_OF_FOUR(at), SUMS_OF_FOUR(at + 1), SUMS_OF_FOUR(at + 2), SUMS_OF_FOUR(at + 3), SUMS_OF_FOUR(at + 4), SUMS_OF_FOUR(at + 5), \
        SUMS_OF_FOUR(at + 6), SUMS_OF_FOUR(at + 7)
/// `d[64, 8 * COUNT] += a[64, 16] * b[16, 8 * COUNT]` of a warpgroup, in bf16 with f32 sums; `fresh`: as if d was 0. Warp w has rows 16w to
/// 16w + 15 of a and d, each as in `multiply_add`. b lies in shared memory where `descriptor` says: [columns, k] with `ACROSS` false,
/// [k, columns] with it true.
template <bool ACROSS>
__device__ __forceinline__ void group_multiply_add(float (&d)[8][4], const uint32_t (&a)[4], uint64_t descriptor, bool fresh) {
    asm volatile(
        "{.reg .pred keep; setp.ne.b32 keep, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "{%32,%33,%34,%35}, %36, keep, 1, 1, %38;}\n"
        : SUMS_OF_32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"((int)!fresh), "n"((int)ACROSS));
}
template <bool ACROSS>
__device__ __forceinline__ void group_multiply_add(float (&d)[16][4], const uint32_t (&a)[4], uint64_t descriptor, bool fresh) {
    asm volatile(
        "{.reg .pred keep; setp.ne.b32 keep, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "{%64,%65,%66,%67}, %68, keep, 1, 1, %70;}\n"
        : SUMS_OF_32(0), SUMS_OF_32(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"((int)!fresh), "n"((int)ACROSS));
}
// Hopper also copies boxes out of a table by itself: one thread asks for a whole one, and whoever needs it waits for its bytes.
/// Bytes that are to arrive, in shared memory.
using Arrivals = uint64_t;
/// Nothing has arrived and nothing is expected. For all threads, and for copies, behind the next barrier.
__device__ __forceinline__ void arrivals_begin(Arrivals* arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.proxy.async.shared::cta;\n" ::"r"(shared_address(arrivals)) : "memory");
}
/// Says how many bytes come next: once a turn, by one thread.
__device__ __forceinline__ void arrivals_expect(Arrivals* arrivals, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(arrivals)), "r"(bytes) : "memory");
}
/// Waits until all bytes of a turn have arrived. `parity` is 0 in the first turn, 1 in the second, and so on.
__device__ __forceinline__ void arrivals_await(Arrivals* arrivals, int parity) {
    asm volatile(
        "{.reg .pred arrived;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 arrived, [%0], %1;\n"
        "@!arrived bra again;}\n" ::"r"(shared_address(arrivals)), "r"(parity) : "memory");
}
/// Begins to copy the box of `table` whose first number is in this row and column to a multiple of 1,024 bytes.
__device__ __forceinline__ void copy_box(void* to, const Table* table, int row, int column, Arrivals* arrivals) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(
                     shared_address(to)), "l"(table), "r"(column), "r"(row), "r"(shared_address(arrivals))
                 : "memory");
}
#endif

/// A matrix in shared memory whose rows of 64 bf16 have their eight 16-byte pieces swapped by the row's number, modulo 8: from a multiple
/// of 1,024 bytes on. Eight rows are followed by the next eight after `eight` bytes; columns 64 to 127 of a matrix [k, columns] begin
/// `half` bytes behind the first. (PTX ISA, "Matrix-descriptor", 128-byte swizzle.)
__device__ __forceinline__ uint64_t group_matrix(uint32_t address, uint32_t half, uint32_t eight) {
    return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)(half >> 4) << 16 | (uint64_t)(eight >> 4) << 32 | (uint64_t)1 << 62;
}

constexpr unsigned ALL = 0xffffffffu;
/// Largest number of `fp8`.
constexpr float FP8_MAX = 448.0f;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

/// Sum and maximum over a block of up to 1,024 threads, which every thread gets. `scratch` has 32 numbers and may be used again
/// at once.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? scratch[lane] : -INFINITY);
}

/// Eight bf16 at an address that is a multiple of 16.
struct alignas(16) Eight {
    uint32_t pairs[4];

    __device__ __forceinline__ float at(int i) const {
        const uint32_t bits = i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16;
        return __uint_as_float(bits);
    }
};
__device__ __forceinline__ Eight load_eight(const bf16* from) { return *reinterpret_cast<const Eight*>(from); }
__device__ __forceinline__ void store_eight(bf16* to, const float (&values)[8]) {
    Eight eight;
#pragma unroll
    for (int pair = 0; pair < 4; pair++) eight.pairs[pair] = pack_bf16(values[2 * pair], values[2 * pair + 1]);
    *reinterpret_cast<Eight*>(to) = eight;
}
/// Eight fp8 at an address that is a multiple of 8.
__device__ __forceinline__ void store_eight(fp8* to, const float (&values)[8]) {
    uint2 out = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out.x |= (uint32_t)to_fp8(values[i]).bits << (8 * i);
        out.y |= (uint32_t)to_fp8(values[4 + i]).bits << (8 * i);
    }
    *reinterpret_cast<uint2*>(to) = out;
}
