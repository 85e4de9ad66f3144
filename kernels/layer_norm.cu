// Rows of an encoder and their layer norm: where a step begins, and what follows each half of a layer.
//
//     embed_layer_norm    sum = words[word] + positions[position] + segments[segment]
//     add_layer_norm      sum = x + delta + added                     what a product left, and its bias
//     x = y = (sum - mean) / sqrt(variance + eps) * weight + bias     mean and variance of a row
//
// x [rows, width] f32 is what the next sum begins with, y [rows, width] bf16 the inputs of the next product. delta [rows, width] bf16;
// added, weight, bias [width] f32. tokens [rows, 3] i32 names rows of the three tables, [*, width] bf16 each; segments may be null.
// width is a multiple of 8, at most 8 * 4 * threads.
//
// Grid: (rows); block: a multiple of 32 threads, each with up to 4 times 8 numbers in registers, so that the variance is that of
// differences from the mean and nothing is read twice. Bound by memory: 12 bytes a number.
#include "common.cuh"

constexpr int PIECES = 4;

__device__ __forceinline__ void load_floats(const float* from, float (&out)[8]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float4 four = *reinterpret_cast<const float4*>(from + 4 * half);
        out[4 * half] = four.x;
        out[4 * half + 1] = four.y;
        out[4 * half + 2] = four.z;
        out[4 * half + 3] = four.w;
    }
}
__device__ __forceinline__ void store_floats(float* to, const float (&values)[8]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        *reinterpret_cast<float4*>(to + 4 * half) = {values[4 * half], values[4 * half + 1], values[4 * half + 2], values[4 * half + 3]};
    }
}

/// Norms the sums that the block's threads hold, piece by piece, and writes the row.
__device__ __forceinline__ void write_normed(float (&sums)[PIECES][8], float* x, bf16* y, const float* weight, const float* bias,
                                             int width, float eps, float* scratch) {
    float total = 0.0f;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int i = (piece * blockDim.x + threadIdx.x) * 8;
        if (i >= width) break;
#pragma unroll
        for (int k = 0; k < 8; k++) total += sums[piece][k];
    }
    const float mean = block_sum(total, scratch) / width;
    float squares = 0.0f;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int i = (piece * blockDim.x + threadIdx.x) * 8;
        if (i >= width) break;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            sums[piece][k] -= mean;
            squares += sums[piece][k] * sums[piece][k];
        }
    }
    const float factor = rsqrtf(block_sum(squares, scratch) / width + eps);
    const size_t row = (size_t)blockIdx.x * width;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int i = (piece * blockDim.x + threadIdx.x) * 8;
        if (i >= width) break;
        float by[8], add[8];
        load_floats(weight + i, by);
        load_floats(bias + i, add);
#pragma unroll
        for (int k = 0; k < 8; k++) sums[piece][k] = sums[piece][k] * factor * by[k] + add[k];
        store_floats(x + row + i, sums[piece]);
        store_eight(y + row + i, sums[piece]);
    }
}

KERNEL embed_layer_norm(const int* __restrict__ tokens, const bf16* __restrict__ words, const bf16* __restrict__ positions,
                        const bf16* __restrict__ segments, const float* __restrict__ weight, const float* __restrict__ bias,
                        float* __restrict__ x, bf16* __restrict__ y, int width, float eps) {
    __shared__ float scratch[32];
    const int* const token = tokens + blockIdx.x * 3;
    const bf16* const word = words + (size_t)token[0] * width;
    const bf16* const position = positions + (size_t)token[1] * width;
    const bf16* const segment = segments ? segments + (size_t)token[2] * width : nullptr;
    float sums[PIECES][8];
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int i = (piece * blockDim.x + threadIdx.x) * 8;
        if (i >= width) break;
        const Eight a = load_eight(word + i), b = load_eight(position + i), c = segment ? load_eight(segment + i) : Eight{};
#pragma unroll
        for (int k = 0; k < 8; k++) sums[piece][k] = a.at(k) + b.at(k) + c.at(k);
    }
    write_normed(sums, x, y, weight, bias, width, eps, scratch);
}
EXPORT(embed_layer_norm)

KERNEL add_layer_norm(float* __restrict__ x, const bf16* __restrict__ delta, const float* __restrict__ added,
                      const float* __restrict__ weight, const float* __restrict__ bias, bf16* __restrict__ y, int width, float eps) {
    __shared__ float scratch[32];
    const size_t row = (size_t)blockIdx.x * width;
    float sums[PIECES][8];
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int i = (piece * blockDim.x + threadIdx.x) * 8;
        if (i >= width) break;
        const Eight change = load_eight(delta + row + i);
        float add[8];
        load_floats(added + i, add);
        load_floats(x + row + i, sums[piece]);
#pragma unroll
        for (int k = 0; k < 8; k++) sums[piece][k] += change.at(k) + add[k];
    }
    write_normed(sums, x, y, weight, bias, width, eps, scratch);
}
EXPORT(add_layer_norm)
