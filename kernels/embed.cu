// Rows of the embedding table: where a step begins.
//
//     out[row] = table[ids[row] - first] * scale        zeros for words that another rank has
//
// ids [rows] i32, table [words, hidden] bf16 (a rank's part of the vocabulary, from word `first` on), out [rows, hidden] bf16. hidden is
// a multiple of 8. Grid: (rows); block: up to 256 threads, 8 numbers each. Bound by memory: 2 * hidden bytes in and out a row.
#include "common.cuh"

KERNEL embed_bf16(const int* __restrict__ ids, const bf16* __restrict__ table, bf16* __restrict__ out, int hidden, int first,
                  int words, float scale) {
    const size_t row = blockIdx.x;
    const int word = ids[row] - first;
    const bool here = word >= 0 && word < words;
    for (int i = threadIdx.x * 8; i < hidden; i += blockDim.x * 8) {
        float values[8];
        const Eight eight = here ? load_eight(table + (size_t)word * hidden + i) : Eight{};
#pragma unroll
        for (int k = 0; k < 8; k++) values[k] = eight.at(k) * scale;
        store_eight(out + row * hidden + i, values);
    }
}
EXPORT(embed_bf16)

// The rows of a step whose logits are wanted: out[i] = x[rows[i]].
//
// x [*, hidden] bf16, rows [count] i32, out [count, hidden] bf16. Grid: (count). Bound by memory.
KERNEL gather_rows_bf16(const bf16* __restrict__ x, const int* __restrict__ rows, bf16* __restrict__ out, int hidden) {
    const size_t from = rows[blockIdx.x], to = blockIdx.x;
    for (int i = threadIdx.x * 8; i < hidden; i += blockDim.x * 8) {
        *reinterpret_cast<Eight*>(out + to * hidden + i) = load_eight(x + from * hidden + i);
    }
}
EXPORT(gather_rows_bf16)
