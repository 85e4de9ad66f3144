// What a layer adds to the residual stream, and the norm of the next one's inputs, in one pass.
//
//     x += delta                            delta may be null: then x stays as it is
//     y  = x / sqrt(mean(x^2) + eps) * (weight + offset)
//
// x, delta [rows, width] bf16, x in place; weight [width] bf16; y [rows, width] in bf16, or in fp8 with a scale a row: y = fp8 * scale,
// scale = max |y| / 448. offset is 1 for models that store weight - 1, else 0. The sum is taken of x as it is stored, so a row has
// the same bits whether delta is added here or was before. width is a multiple of 8, at most 8 * 4 * threads.
//
// Grid: (rows); block: a multiple of 32 threads, each with up to 4 times 8 numbers in registers, so that x is read once. Bound by
// memory: 6 bytes a number with delta in bf16, 5 in fp8.
#include "common.cuh"

constexpr int PIECES = 4;

template <class Out>
__device__ __forceinline__ void add_rms_norm(bf16* x, const bf16* delta, const bf16* weight, Out* y, float* scales, int width,
                                             float eps, float offset, float* scratch) {
    const size_t start = (size_t)blockIdx.x * width;
    float values[PIECES][8];
    float squares = 0.0f;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int i = (piece * blockDim.x + threadIdx.x) * 8;
        if (i >= width) break;
        const Eight old = load_eight(x + start + i);
        if (delta) {
            const Eight add = load_eight(delta + start + i);
            Eight sum;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                sum.pairs[k] = pack_bf16(old.at(2 * k) + add.at(2 * k), old.at(2 * k + 1) + add.at(2 * k + 1));
            }
            *reinterpret_cast<Eight*>(x + start + i) = sum;
#pragma unroll
            for (int k = 0; k < 8; k++) values[piece][k] = sum.at(k);
        } else {
#pragma unroll
            for (int k = 0; k < 8; k++) values[piece][k] = old.at(k);
        }
#pragma unroll
        for (int k = 0; k < 8; k++) squares += values[piece][k] * values[piece][k];
    }
    const float factor = rsqrtf(block_sum(squares, scratch) / width + eps);
    float most = 0.0f;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int i = (piece * blockDim.x + threadIdx.x) * 8;
        if (i >= width) break;
        const Eight by = load_eight(weight + i);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            values[piece][k] *= factor * (by.at(k) + offset);
            most = fmaxf(most, fabsf(values[piece][k]));
        }
    }
    float inverse = 1.0f;
    if (scales) {
        most = block_max(most, scratch);
        const float scale = fmaxf(most, 1e-12f) / FP8_MAX;
        if (threadIdx.x == 0) scales[blockIdx.x] = scale;
        inverse = 1.0f / scale;
    }
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int i = (piece * blockDim.x + threadIdx.x) * 8;
        if (i >= width) break;
#pragma unroll
        for (int k = 0; k < 8; k++) values[piece][k] *= inverse;
        store_eight(y + start + i, values[piece]);
    }
}

KERNEL add_rms_norm_bf16(bf16* __restrict__ x, const bf16* __restrict__ delta, const bf16* __restrict__ weight,
                         bf16* __restrict__ y, int width, float eps, float offset) {
    __shared__ float scratch[32];
    add_rms_norm<bf16>(x, delta, weight, y, nullptr, width, eps, offset, scratch);
}
EXPORT(add_rms_norm_bf16)

KERNEL add_rms_norm_fp8(bf16* __restrict__ x, const bf16* __restrict__ delta, const bf16* __restrict__ weight,
                        fp8* __restrict__ y, float* __restrict__ scales, int width, float eps, float offset) {
    __shared__ float scratch[32];
    add_rms_norm<fp8>(x, delta, weight, y, scales, width, eps, offset, scratch);
}
EXPORT(add_rms_norm_fp8)

// What a layer gives, normed before it is added to the residual stream, in models that norm on both sides:
//
//     x += delta / sqrt(mean(delta^2) + eps) * (weight + offset)
//
// x, delta [rows, width] bf16, x in place; weight [width] bf16. Grid and block as above; bound by memory: 6 bytes a number.
KERNEL norm_add_bf16(bf16* __restrict__ x, const bf16* __restrict__ delta, const bf16* __restrict__ weight, int width, float eps,
                     float offset) {
    __shared__ float scratch[32];
    const size_t start = (size_t)blockIdx.x * width;
    Eight deltas[PIECES];
    float squares = 0.0f;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int i = (piece * blockDim.x + threadIdx.x) * 8;
        if (i >= width) break;
        deltas[piece] = load_eight(delta + start + i);
#pragma unroll
        for (int k = 0; k < 8; k++) squares += deltas[piece].at(k) * deltas[piece].at(k);
    }
    const float factor = rsqrtf(block_sum(squares, scratch) / width + eps);
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int i = (piece * blockDim.x + threadIdx.x) * 8;
        if (i >= width) break;
        const Eight old = load_eight(x + start + i), by = load_eight(weight + i);
        float sum[8];
#pragma unroll
        for (int k = 0; k < 8; k++) sum[k] = old.at(k) + deltas[piece].at(k) * factor * (by.at(k) + offset);
        store_eight(x + start + i, sum);
    }
}
EXPORT(norm_add_bf16)
