// A text's rows as one vector of length 1: its first row, or the mean of all.
//
//     x [rows, width] f32; texts [count, 3] i32: first row, rows, 1 for the mean; out [count, width] f32
//
// The mean and the sum point the same way, and only the direction stays. width is a multiple of 4.
//
// Grid: (count); block: 256 threads; shared memory: 8 * width * 4 bytes. Each warp adds up every eighth row, then all of them the
// warps' sums: in the same order whatever else is in the step. Bound by memory: 4 bytes a number.
#include "common.cuh"

constexpr int WARPS = 8;

KERNEL __launch_bounds__(WARPS * 32)
    pool_rows(const float* __restrict__ x, const int* __restrict__ texts, float* __restrict__ out, int width) {
    DYNAMIC_SHARED(shared);
    __shared__ float scratch[32];
    float* const sums = reinterpret_cast<float*>(shared);  // [warp, width]
    const int* const text = texts + blockIdx.x * 3;
    const int rows = text[2] ? text[1] : 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* const first = x + (size_t)text[0] * width;
    for (int i = lane * 4; i < width; i += 128) {
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
        for (int row = warp; row < rows; row += WARPS) {
            const float4 four = *reinterpret_cast<const float4*>(first + (size_t)row * width + i);
            sum = {sum.x + four.x, sum.y + four.y, sum.z + four.z, sum.w + four.w};
        }
        *reinterpret_cast<float4*>(sums + warp * width + i) = sum;
    }
    __syncthreads();
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += WARPS * 32) {
        float sum = 0.0f;
#pragma unroll
        for (int other = 0; other < WARPS; other++) sum += sums[other * width + i];
        // Nobody else has anything to do with this number any more.
        sums[i] = sum;
        squares += sum * sum;
    }
    const float length = fmaxf(sqrtf(block_sum(squares, scratch)), 1e-12f);
    for (int i = threadIdx.x; i < width; i += WARPS * 32) out[(size_t)blockIdx.x * width + i] = sums[i] / length;
}
EXPORT(pool_rows)
