// A part of the logits that another rank computed, put where it belongs: out[row, first + i] = x[row, i].
//
// x [rows, width] f32, out [rows, stride] f32. width, first and stride are multiples of 4. Grid: (rows, width / 4096 rounded up); block:
// 256 threads, 4 numbers each at a time. Bound by memory: 8 bytes a number.
#include "common.cuh"

constexpr int COLUMNS = 4096;

KERNEL put_columns_f32(const float* __restrict__ x, float* __restrict__ out, int width, int first, int stride) {
    const float* from = x + (size_t)blockIdx.x * width;
    float* to = out + (size_t)blockIdx.x * stride + first;
    const int begin = blockIdx.y * COLUMNS, end = min(begin + COLUMNS, width);
    for (int i = begin + threadIdx.x * 4; i < end; i += blockDim.x * 4) {
        *reinterpret_cast<float4*>(to + i) = *reinterpret_cast<const float4*>(from + i);
    }
}
EXPORT(put_columns_f32)
