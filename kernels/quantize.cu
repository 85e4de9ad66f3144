// Weights as they are loaded become what the kernels read, and made-up weights where none can be had.
//
//     quantize_fp8      w [n, k] bf16 -> fp8 [n, k] and a scale a channel: w = fp8 * scale, scale = max |w| / 448
//     random_bf16       w[i] = size * a number in -1..1 that depends on i and seed: for measuring speed on a model's shapes
//
// Bound by memory. Grid of quantize_fp8: (n), block: a multiple of 32 threads; of random_bf16: any, block: any.
#include "common.cuh"

KERNEL quantize_fp8(const bf16* __restrict__ w, fp8* __restrict__ out, float* __restrict__ scales, int k) {
    __shared__ float scratch[32];
    const size_t start = (size_t)blockIdx.x * k;
    float most = 0.0f;
    for (int i = threadIdx.x * 8; i < k; i += blockDim.x * 8) {
        const Eight eight = load_eight(w + start + i);
#pragma unroll
        for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(eight.at(j)));
    }
    most = block_max(most, scratch);
    const float scale = fmaxf(most, 1e-12f) / FP8_MAX, inverse = 1.0f / scale;
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    for (int i = threadIdx.x * 8; i < k; i += blockDim.x * 8) {
        const Eight eight = load_eight(w + start + i);
        float values[8];
#pragma unroll
        for (int j = 0; j < 8; j++) values[j] = eight.at(j) * inverse;
        store_eight(out + start + i, values);
    }
}
EXPORT(quantize_fp8)

KERNEL random_bf16(bf16* __restrict__ w, long count, unsigned long long seed, float size) {
    for (long i = (long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (long)gridDim.x * blockDim.x) {
        unsigned long long x = (unsigned long long)i * 0x9e3779b97f4a7c15ull + seed;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
        x ^= x >> 31;
        w[i] = to_bf16(((float)(x >> 40) / 8388608.0f - 1.0f) * size);
    }
}
EXPORT(random_bf16)
