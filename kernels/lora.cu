// What adapters add to a product: out += scale * B (A x), for rows that have one, several adapters in a step.
//
//     lora_shrink   t[row] = scale * A x[row]     [rows, 32] bf16     lora_expand   out[row] += B t[row]
//
// Rows are grouped by whoever plans the step: an item is up to 16 rows that follow each other and have one adapter, so A and B are read
// once for them. Ranks are filled up to 32 with zeros, where the tensor cores want that anyway.
//
//     items [count, 4] i32: first row, rows, adapter, 0
//     a [adapters] addresses of [32, k] bf16, b [adapters] addresses of [n, 32] bf16, scales [adapters] f32
//     x [rows, x_stride] bf16, t [rows, 32] bf16, out [rows, out_stride] bf16; k a multiple of 32, n of 8
//
// Both are bound by memory: A and B, read once an item. As in `gemm_small.cu` neighbours in k take the places that an instruction
// numbers otherwise.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int RANK = 32;

__device__ __forceinline__ uint4 piece_of(const bf16* x, int row, int rows, size_t stride, int at) {
    return row < rows ? *reinterpret_cast<const uint4*>(x + row * stride + at) : uint4{0, 0, 0, 0};
}

// Grid: (items); block: 4 warps, which share k.
KERNEL __launch_bounds__(WARPS * 32)
    lora_shrink(const bf16* __restrict__ x, const bf16* const* __restrict__ a, const float* __restrict__ scales,
                const int* __restrict__ items, bf16* __restrict__ t, int k, int x_stride) {
    __shared__ float shared[WARPS * 16 * RANK];
    const int* const item = items + blockIdx.x * 4;
    const int row = item[0], rows = item[1], adapter = item[2];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const bf16* const matrix = a[adapter];
    const bf16* const first = x + (size_t)row * x_stride;
    float sums[RANK / 8][4] = {};
#pragma unroll 2
    for (int at = warp * 32 + q * 8; at < k; at += WARPS * 32) {
        const uint4 low = piece_of(first, g, rows, x_stride, at), high = piece_of(first, g + 8, rows, x_stride, at);
        const uint32_t left[4] = {low.x, high.x, low.y, high.y}, right[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (int eight = 0; eight < RANK / 8; eight++) {
            const uint4 b = *reinterpret_cast<const uint4*>(matrix + (size_t)(eight * 8 + g) * k + at);
            multiply_add(sums[eight], left, b.x, b.y);
            multiply_add(sums[eight], right, b.z, b.w);
        }
    }
#pragma unroll
    for (int eight = 0; eight < RANK / 8; eight++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            shared[(warp * 16 + g + i / 2 * 8) * RANK + eight * 8 + q * 2 + i % 2] = sums[eight][i];
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < rows * RANK; at += WARPS * 32) {
        float sum = 0.0f;
#pragma unroll
        for (int other = 0; other < WARPS; other++) sum += shared[other * 16 * RANK + at];
        t[(size_t)row * RANK + at] = to_bf16(sum * scales[adapter]);
    }
}
EXPORT(lora_shrink)

// Grid: (items, n / 32 rounded up); block: 4 warps of 8 channels each.
KERNEL __launch_bounds__(WARPS * 32)
    lora_expand(const bf16* __restrict__ t, const bf16* const* __restrict__ b, const int* __restrict__ items,
                bf16* __restrict__ out, int n, int out_stride) {
    const int* const item = items + blockIdx.x * 4;
    const int row = item[0], rows = item[1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const int channel = (blockIdx.y * WARPS + warp) * 8;
    if (channel >= n) return;
    const uint4 weight = *reinterpret_cast<const uint4*>(b[item[2]] + (size_t)(channel + g) * RANK + q * 8);
    const bf16* const first = t + (size_t)row * RANK;
    const uint4 low = piece_of(first, g, rows, RANK, q * 8), high = piece_of(first, g + 8, rows, RANK, q * 8);
    const uint32_t left[4] = {low.x, high.x, low.y, high.y}, right[4] = {low.z, high.z, low.w, high.w};
    float sums[4] = {};
    multiply_add(sums, left, weight.x, weight.y);
    multiply_add(sums, right, weight.z, weight.w);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (g + 8 * i >= rows) continue;
        uint32_t* const to = reinterpret_cast<uint32_t*>(out + (size_t)(row + g + 8 * i) * out_stride + channel + q * 2);
        const uint32_t old = *to;
        *to = pack_bf16(__uint_as_float(old << 16) + sums[2 * i], __uint_as_float(old & 0xffff0000u) + sums[2 * i + 1]);
    }
}
EXPORT(lora_expand)
