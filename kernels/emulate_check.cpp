// Kernels for the emulator's own tests: a sum of 128 numbers in one block, and a product of a warpgroup, and the same with the mistakes that
// a review overlooks.
//
//     sum_right             x [128] f32, out [1]
//     sum_no_barrier        threads read what others have not written yet
//     sum_wrong_index       a thread reads its neighbour's number
//     product_of_ones       x [64, 64] bf16, out [128]: of each thread, the first of the sums of 16 numbers of a row. fault: 0 none; what was
//                           copied is (1) not published; registers are (2) not ready; a factor is (3) overwritten; nobody (4) waits
//     sum_of_box            the table's first 64 numbers of rows 3 to 10, out [1]: their sum. fault: 0 none; it is (1) not waited for before it is
//                           read, (2) not at all, (3) more, (4) less, (5) in a place that does not fit, (6) before all have begun
#include "attention.cuh"

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

KERNEL product_of_ones(const bf16* x, float* out, int fault) {
    DYNAMIC_SHARED(shared);
    bf16* const tile = reinterpret_cast<bf16*>(shared + (-shared_address(shared) & 1023));
    for (int i = threadIdx.x; i < 64 * 8; i += 128) copy_async(tile + halved<64>(i / 8, i % 8), x + i * 8, true);
    copy_commit();
    copy_wait<0>();
    if (fault != 1) group_publish();
    __syncthreads();
    float sums[8][4];
    const uint32_t one = pack_bf16(1.0f, 1.0f), ones[4] = {one, one, one, one};
    if (fault != 2) group_begin();
    group_multiply_add<false>(sums, ones, group_matrix(shared_address(tile), 0, 1024), true);
    if (fault == 3 && threadIdx.x == 0) tile[0] = to_bf16(7.0f);
    if (fault != 4) group_end(sums);
    out[threadIdx.x] = sums[0][0];
}
EXPORT(product_of_ones)

KERNEL sum_of_box(TABLE table, float* out, int fault) {
    DYNAMIC_SHARED(shared);
    bf16* const box = reinterpret_cast<bf16*>(shared + (-shared_address(shared) & 1023));
    Arrivals* const arrivals = reinterpret_cast<Arrivals*>(box + 16 * 64);
    if (threadIdx.x == 0 && fault != 6) arrivals_begin(arrivals);
    __syncthreads();
    if (threadIdx.x == 0) {
        arrivals_expect(arrivals, 8 * 64 * 2 - (fault == 3 ? 16 : 0) + (fault == 4 ? 16 : 0));
        copy_box(box + (fault == 5 ? 64 : 0), &table, 3, 0, arrivals);
    }
    if (fault != 1 && fault != 2) arrivals_await(arrivals, 0);
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (int i = 0; i < 8 * 64; i++) sum += to_float(box[i]);
        out[0] = sum;
    }
    if (fault == 1) arrivals_await(arrivals, 0);
}
EXPORT(sum_of_box)
