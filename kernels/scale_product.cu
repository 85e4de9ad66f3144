// What a product in fp8 lacks that was computed without scales: out[row, column] = x[row, column] * w_scales[column] * x_scales[row], or
// added to what is there.
//
// x [rows, n] f32; w_scales [n], x_scales [rows] f32; out [rows, stride] bf16 or f32, its first n columns. n and stride are multiples of 4.
// Grid: (rows, n / 4096 rounded up); block: 256 threads, 4 numbers each at a time. Bound by memory: 6 to 8 bytes a number.
#include "common.cuh"

constexpr int COLUMNS = 4096;

__device__ __forceinline__ void put(bf16* to, const float (&values)[4], bool add) {
    uint2 pairs = {0, 0};
    if (add) pairs = *reinterpret_cast<const uint2*>(to);
    const auto low = [](uint32_t pair) { return __uint_as_float(pair << 16); };
    const auto high = [](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); };
    pairs = {pack_bf16(low(pairs.x) + values[0], high(pairs.x) + values[1]), pack_bf16(low(pairs.y) + values[2], high(pairs.y) + values[3])};
    *reinterpret_cast<uint2*>(to) = pairs;
}
__device__ __forceinline__ void put(float* to, const float (&values)[4], bool add) {
    float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
    if (add) four = *reinterpret_cast<const float4*>(to);
    four = {four.x + values[0], four.y + values[1], four.z + values[2], four.w + values[3]};
    *reinterpret_cast<float4*>(to) = four;
}

template <class Out>
__device__ __forceinline__ void scale_product(const float* x, const float* w_scales, const float* x_scales, Out* out, int n, int stride,
                                              bool add) {
    const float* const from = x + (size_t)blockIdx.x * n;
    Out* const to = out + (size_t)blockIdx.x * stride;
    const float of_row = x_scales[blockIdx.x];
    const int begin = blockIdx.y * COLUMNS, end = min(begin + COLUMNS, n);
    for (int i = begin + threadIdx.x * 4; i < end; i += blockDim.x * 4) {
        const float4 numbers = *reinterpret_cast<const float4*>(from + i), each = *reinterpret_cast<const float4*>(w_scales + i);
        const float values[4] = {numbers.x * each.x * of_row, numbers.y * each.y * of_row, numbers.z * each.z * of_row,
                                 numbers.w * each.w * of_row};
        put(to + i, values, add);
    }
}

#define SCALE_PRODUCT(name, Out)                                                                                                       \
    KERNEL name(const float* __restrict__ x, const float* __restrict__ w_scales, const float* __restrict__ x_scales,                  \
                Out* __restrict__ out, int n, int stride, int add) {                                                                  \
        scale_product(x, w_scales, x_scales, out, n, stride, add != 0);                                                               \
    }                                                                                                                                 \
    EXPORT(name)
SCALE_PRODUCT(scale_product_bf16, bf16)
SCALE_PRODUCT(scale_product_f32, float)
