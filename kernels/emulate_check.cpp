// Kernels for the emulator's own test: a sum of 128 numbers in one block, and the same with the mistakes that a review overlooks.
//
//     sum_right             x [128] f32, out [1]
//     sum_no_barrier        threads read what others have not written yet
//     sum_wrong_index       a thread reads its neighbour's number
#include "emulate.h"

template <bool MEETS, int OFF>
static inline void sum_of(const float* x, float* out, float* part) {
    const int at = threadIdx.x;
    part[at] = x[at];
    if (MEETS) __syncthreads();
    for (int half = 64; half > 0; half /= 2) {
        if (at < half) part[at] += part[at + half - OFF];
        if (MEETS) __syncthreads();
    }
    if (at == 0) out[0] = part[0];
}

KERNEL sum_right(const float* x, float* out) {
    __shared__ float part[128];
    sum_of<true, 0>(x, out, part);
}
EXPORT(sum_right)
KERNEL sum_no_barrier(const float* x, float* out) {
    __shared__ float part[128];
    sum_of<false, 0>(x, out, part);
}
EXPORT(sum_no_barrier)
KERNEL sum_wrong_index(const float* x, float* out) {
    __shared__ float part[128];
    sum_of<true, 1>(x, out, part);
}
EXPORT(sum_wrong_index)
