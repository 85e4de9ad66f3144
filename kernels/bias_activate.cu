// What follows the first product of a feed-forward layer or a head: x = act(x + bias), in place.
//
// x [rows, width] bf16; bias [width] f32. act is gelu for 0, gelu by its tanh formula for 1, max(x, 0) for 2, tanh for 3. width is a
// multiple of 8.
//
// Grid: (rows); block: a multiple of 32 threads. Bound by memory: 4 bytes a number.
#include "common.cuh"

__device__ __forceinline__ float activated(float x, int act) {
    switch (act) {
        case 0: return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
        case 1: return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
        case 2: return fmaxf(x, 0.0f);
        default: return tanhf(x);
    }
}

KERNEL bias_activate(bf16* __restrict__ x, const float* __restrict__ bias, int width, int act) {
    bf16* const row = x + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
        const Eight old = load_eight(row + i);
        float values[8];
#pragma unroll
        for (int k = 0; k < 8; k++) values[k] = activated(old.at(k) + bias[i + k], act);
        store_eight(row + i, values);
    }
}
EXPORT(bias_activate)
