// The middle of a feed-forward layer: out = act(gate) * up.
//
// gate_up [rows, 2 * width] bf16, gate first; out [rows, width] in bf16, or in fp8 with a scale a row as in `add_rms_norm.cu`. act is
// x * sigmoid(x) for `gelu` 0, and gelu by its tanh formula for 1. width is a multiple of 8; with fp8 at most 8 * 8 * threads.
//
// Grid: (rows); block: a multiple of 32 threads. Bound by memory: 6 bytes a number in bf16, 5 in fp8.
#include "common.cuh"

constexpr int PIECES = 8;

__device__ __forceinline__ float activate(float x, int gelu) {
    if (gelu) {
        const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        // tanh(z) = 1 - 2 / (exp(2z) + 1), which is right at both ends.
        return 0.5f * x * (2.0f - 2.0f / (__expf(2.0f * inner) + 1.0f));
    }
    return x / (1.0f + __expf(-x));
}

__device__ __forceinline__ void gated(const bf16* gate_up, size_t row, int width, int i, int gelu, float (&out)[8]) {
    const Eight gate = load_eight(gate_up + row * 2 * width + i), up = load_eight(gate_up + row * 2 * width + width + i);
#pragma unroll
    for (int k = 0; k < 8; k++) out[k] = activate(gate.at(k), gelu) * up.at(k);
}

KERNEL silu_mul_bf16(const bf16* __restrict__ gate_up, bf16* __restrict__ out, int width, int gelu) {
    const size_t row = blockIdx.x;
    for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
        float values[8];
        gated(gate_up, row, width, i, gelu, values);
        store_eight(out + row * width + i, values);
    }
}
EXPORT(silu_mul_bf16)

KERNEL silu_mul_fp8(const bf16* __restrict__ gate_up, fp8* __restrict__ out, float* __restrict__ scales, int width, int gelu) {
    __shared__ float scratch[32];
    const size_t row = blockIdx.x;
    float values[PIECES][8];
    float most = 0.0f;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int i = (piece * blockDim.x + threadIdx.x) * 8;
        if (i >= width) break;
        gated(gate_up, row, width, i, gelu, values[piece]);
#pragma unroll
        for (int k = 0; k < 8; k++) most = fmaxf(most, fabsf(values[piece][k]));
    }
    most = block_max(most, scratch);
    const float scale = fmaxf(most, 1e-12f) / FP8_MAX;
    if (threadIdx.x == 0) scales[row] = scale;
    const float inverse = 1.0f / scale;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int i = (piece * blockDim.x + threadIdx.x) * 8;
        if (i >= width) break;
#pragma unroll
        for (int k = 0; k < 8; k++) values[piece][k] *= inverse;
        store_eight(out + row * width + i, values[piece]);
    }
}
EXPORT(silu_mul_fp8)
