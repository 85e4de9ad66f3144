// Few rows times a matrix: out[m][n] = sum over k of x[m][k] * w[n][k], for the up to 64 rows of a decoding step.
//
//     block   8 channels; its 4 warps share k        warp   16 rows a tile (tensor cores), channels read once for all tiles
//
// Bound by memory: each weight is read once, 16 bytes a lane, straight into the registers that the tensor cores take it from. That
// works since a sum does not mind the order of k: what the instruction calls k = 2q, 2q + 1, 2q + 8, 2q + 9 of a lane with q = lane % 4
// are here four neighbours, in x as in w, so that both are read in whole pieces without going through shared memory.
// A row's sum runs over the same pieces in the same order however many rows there are, so its bits do not depend on its company.
//
//     gemm_small_bf16     w [n, k] bf16
//     gemm_small_fp8      w [n, k] fp8 with a scale a channel, x [m, k] fp8 with a scale a row (W8A8); sums of up to 64 products at a time
//     gemm_small_q4       w in blocks of 32 k, 4 bits each, code - 8 times an f16 scale (GGUF's Q4_0, repacked by `pack_q4`)
//
// k is a multiple of 32 (bf16), 64 (fp8), 128 (q4); n of 8. out [m, out_stride]: what becomes of the product is `sink`: 0 bf16, 1 added
// to bf16, 2 f32.
// Grid: (n / 8); block: 128 threads.
#include "common.cuh"

constexpr int WARPS = 4;

/// The warps' sums for 8 channels become one, and go out. sums [TILES][4] of each lane as `multiply_add` leaves them.
template <int TILES>
__device__ __forceinline__ void finish(const float (&sums)[TILES][4], float* shared, void* out, int m, int out_stride, int sink,
                                       const float* row_scales, const float* channel_scales) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // [warp, tile, 4, lane]
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++) shared[((warp * TILES + tile) * 4 + i) * 32 + lane] = sums[tile][i];
    }
    __syncthreads();
    for (int at = threadIdx.x; at < TILES * 128; at += WARPS * 32) {
        const int tile = at / 128, i = at / 32 % 4, from = at % 32;
        const int row = tile * 16 + from / 4 + i / 2 * 8, channel = blockIdx.x * 8 + from % 4 * 2 + i % 2;
        if (row >= m) continue;
        float sum = 0.0f;
#pragma unroll
        for (int other = 0; other < WARPS; other++) sum += shared[(other * TILES * 128) + at];
        if (row_scales) sum *= row_scales[row] * channel_scales[channel];
        const size_t to = (size_t)row * out_stride + channel;
        if (sink == 2) {
            static_cast<float*>(out)[to] = sum;
        } else {
            bf16* const narrow = static_cast<bf16*>(out) + to;
            *narrow = to_bf16(sink == 1 ? to_float(*narrow) + sum : sum);
        }
    }
}

/// 16 bytes of a row, or zeros beyond the last.
template <class T>
__device__ __forceinline__ uint4 piece_of(const T* x, int row, int m, size_t k, int at) {
    return row < m ? *reinterpret_cast<const uint4*>(x + row * k + at) : uint4{0, 0, 0, 0};
}

template <int TILES>
__device__ __forceinline__ void small_bf16(const bf16* x, const bf16* w, void* out, int m, int k, int out_stride, int sink,
                                           float* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const bf16* const channel = w + (size_t)(blockIdx.x * 8 + g) * k;
    float sums[TILES][4] = {};
#pragma unroll 2
    for (int at = warp * 32 + q * 8; at < k; at += WARPS * 32) {
        const uint4 b = *reinterpret_cast<const uint4*>(channel + at);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const uint4 low = piece_of(x, tile * 16 + g, m, k, at), high = piece_of(x, tile * 16 + g + 8, m, k, at);
            const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
            multiply_add(sums[tile], first, b.x, b.y);
            multiply_add(sums[tile], second, b.z, b.w);
        }
    }
    finish<TILES>(sums, shared, out, m, out_stride, sink, nullptr, nullptr);
}

template <int TILES>
__device__ __forceinline__ void small_fp8(const fp8* x, const float* row_scales, const fp8* w, const float* channel_scales,
                                          void* out, int m, int k, int out_stride, int sink, float* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const fp8* const channel = w + (size_t)(blockIdx.x * 8 + g) * k;
    float sums[TILES][4] = {};
#pragma unroll 4
    for (int at = warp * 64 + q * 16; at < k; at += WARPS * 64) {
        const uint4 b = *reinterpret_cast<const uint4*>(channel + at);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const uint4 low = piece_of(x, tile * 16 + g, m, k, at), high = piece_of(x, tile * 16 + g + 8, m, k, at);
            const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
            multiply_add_fp8(sums[tile], first, b.x, b.y);
            multiply_add_fp8(sums[tile], second, b.z, b.w);
        }
    }
    finish<TILES>(sums, shared, out, m, out_stride, sink, row_scales, channel_scales);
}

/// Two codes of 4 bits as bf16: the one in bits 0..4 and the one in bits 16..20. 0x4300 is 128, so that a code in its last bits adds
/// itself; 136 less is the code - 8.
__device__ __forceinline__ uint32_t two_codes(uint32_t bits) {
    const uint32_t wide = (bits & 0x000f000fu) | 0x43004300u;
    return pack_bf16(__uint_as_float(wide << 16) - 136.0f, __uint_as_float(wide & 0xffff0000u) - 136.0f);
}

// Codes lie as [n][k / 128][q: 4][block: 4] words of 8 codes, scales as [n][k / 32] f16. The word of block b and q has k = 128 * i +
// 32 * b + 8 * q + j for j = 0..8: pair p of neighbours (j = 2p, 2p + 1) in its bits 4p.. and 16 + 4p...
template <int TILES>
__device__ __forceinline__ void small_q4(const bf16* x, const uint32_t* codes, const __half* scales, void* out, int m, int k,
                                         int out_stride, int sink, float* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const size_t n = blockIdx.x * 8 + g;
    // Results of a lane are channels 2q and 2q + 1 of the 8.
    const __half* const left = scales + (size_t)(blockIdx.x * 8 + 2 * q) * (k / 32);
    const __half* const right = left + k / 32;
    float sums[TILES][4] = {};
#pragma unroll 1
    for (int at = warp * 128; at < k; at += WARPS * 128) {
        const uint4 four = *reinterpret_cast<const uint4*>(codes + n * (k / 8) + at / 8 + q * 4);
        const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int block = 0; block < 4; block++) {
            const uint32_t word = words[block];
            const uint32_t b[4] = {two_codes(word), two_codes(word >> 4), two_codes(word >> 8), two_codes(word >> 12)};
            const float a_scale = to_float(left[at / 32 + block]), b_scale = to_float(right[at / 32 + block]);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const int from = at + block * 32 + q * 8;
                const uint4 low = piece_of(x, tile * 16 + g, m, k, from), high = piece_of(x, tile * 16 + g + 8, m, k, from);
                const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
                float part[4] = {};
                multiply_add(part, first, b[0], b[1]);
                multiply_add(part, second, b[2], b[3]);
#pragma unroll
                for (int i = 0; i < 4; i++) sums[tile][i] += part[i] * (i % 2 ? b_scale : a_scale);
            }
        }
    }
    finish<TILES>(sums, shared, out, m, out_stride, sink, nullptr, nullptr);
}

#define SMALL(TILES)                                                                                                          \
    KERNEL __launch_bounds__(WARPS * 32) gemm_small_bf16_##TILES(const bf16* __restrict__ x, const bf16* __restrict__ w,      \
                                                                 void* __restrict__ out, int m, int k, int out_stride,        \
                                                                 int sink) {                                                   \
        __shared__ float shared[WARPS * TILES * 128];                                                                         \
        small_bf16<TILES>(x, w, out, m, k, out_stride, sink, shared);                                                          \
    }                                                                                                                         \
    EXPORT(gemm_small_bf16_##TILES)                                                                                           \
    KERNEL __launch_bounds__(WARPS * 32)                                                                                      \
        gemm_small_fp8_##TILES(const fp8* __restrict__ x, const float* __restrict__ row_scales, const fp8* __restrict__ w,    \
                               const float* __restrict__ channel_scales, void* __restrict__ out, int m, int k,                \
                               int out_stride, int sink) {                                                                     \
        __shared__ float shared[WARPS * TILES * 128];                                                                         \
        small_fp8<TILES>(x, row_scales, w, channel_scales, out, m, k, out_stride, sink, shared);                               \
    }                                                                                                                         \
    EXPORT(gemm_small_fp8_##TILES)                                                                                            \
    KERNEL __launch_bounds__(WARPS * 32)                                                                                      \
        gemm_small_q4_##TILES(const bf16* __restrict__ x, const uint32_t* __restrict__ codes,                                 \
                              const __half* __restrict__ scales, void* __restrict__ out, int m, int k, int out_stride,        \
                              int sink) {                                                                                      \
        __shared__ float shared[WARPS * TILES * 128];                                                                         \
        small_q4<TILES>(x, codes, scales, out, m, k, out_stride, sink, shared);                                                \
    }                                                                                                                         \
    EXPORT(gemm_small_q4_##TILES)
SMALL(1)
SMALL(2)
SMALL(4)
