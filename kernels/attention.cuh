// What a warp does with a tile of keys and values, for every kind of attention: scores, softmax as it goes along (flash attention:
// Dao et al. 2022, 2023) in powers of two, and the weighted sum of values. On tensor cores, with sums in f32.
#pragma once
#include "common.cuh"

constexpr float LOG2E = 1.4426950408889634f;

/// Where row `row` of a tile has its 16-byte piece `piece`: pieces change places so that eight rows' pieces lie in eight different
/// groups of banks.
template <int DIM>
__device__ __forceinline__ int swizzled(int row, int piece) {
    // Two rows of 32 numbers lie in one line of all banks.
    const int turn = DIM == 32 ? row / 2 : row;
    return row * DIM + ((piece ^ (turn & 7)) & (DIM / 8 - 1)) * 8;
}

/// Sums of one warp for its 16 queries: lane holds rows lane / 4 and that + 8.
template <int DIM>
struct Sums {
    float out[DIM / 8][4];
    float most[2], total[2];
};

/// Turns scores of `COUNT` groups of 16 tokens from key `first` on into weights, adds them up, and shrinks what was summed before to
/// the new maximum. limits: the last key that each of the lane's two rows sees, and the first.
template <int DIM, int COUNT>
__device__ __forceinline__ void soften(Sums<DIM>& sums, float (&scores)[COUNT * 2][4], int first, const int (&last)[2], const int (&from)[2],
                                       float scale) {
    const int lane = threadIdx.x % 32;
    float most[2] = {sums.most[0], sums.most[1]};
#pragma unroll
    for (int eight = 0; eight < COUNT * 2; eight++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = first + eight * 8 + lane % 4 * 2 + i % 2;
            const bool seen = key <= last[i / 2] && key >= from[i / 2];
            scores[eight][i] = seen ? scores[eight][i] * scale : -INFINITY;
            most[i / 2] = fmaxf(most[i / 2], scores[eight][i]);
        }
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
        most[row] = fmaxf(most[row], __shfl_xor_sync(ALL, most[row], 1));
        most[row] = fmaxf(most[row], __shfl_xor_sync(ALL, most[row], 2));
    }
    // Nothing seen so far: any finite number keeps exp2 of -infinity at 0.
    const float base[2] = {most[0] == -INFINITY ? 0.0f : most[0], most[1] == -INFINITY ? 0.0f : most[1]};
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const float shrink = exp2f(sums.most[row] - base[row]);
        sums.most[row] = most[row];
        sums.total[row] *= shrink;
#pragma unroll
        for (int eight = 0; eight < DIM / 8; eight++) {
            sums.out[eight][2 * row] *= shrink;
            sums.out[eight][2 * row + 1] *= shrink;
        }
    }
#pragma unroll
    for (int eight = 0; eight < COUNT * 2; eight++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scores[eight][i] = exp2f(scores[eight][i] - base[i / 2]);
            sums.total[i / 2] += scores[eight][i];
        }
    }
}

/// What lies in a pair of them, as the factor of a product.
__device__ __forceinline__ void weights_of(uint32_t (&weights)[4], const float (&left)[4], const float (&right)[4]) {
    weights[0] = pack_bf16(left[0], left[1]);
    weights[1] = pack_bf16(left[2], left[3]);
    weights[2] = pack_bf16(right[0], right[1]);
    weights[3] = pack_bf16(right[2], right[3]);
}

/// What `COUNT` groups of 16 tokens from `token` of a tile on add to the sums. limits: the last key that each of the lane's two rows
/// sees, and the first.
template <int DIM, int COUNT>
__device__ __forceinline__ void accumulate(Sums<DIM>& sums, const uint32_t (&q)[DIM / 16][4], const bf16* keys, const bf16* values,
                                           int token, int first_key, const int (&last)[2], const int (&from)[2], float scale) {
    const int lane = threadIdx.x % 32;
    float scores[COUNT * 2][4];
#pragma unroll
    for (int pair = 0; pair < COUNT; pair++) {
        float(&left)[4] = scores[2 * pair];
        float(&right)[4] = scores[2 * pair + 1];
#pragma unroll
        for (int i = 0; i < 4; i++) left[i] = right[i] = 0.0f;
        // Matrices 0 and 1: tokens 0..8, numbers 0..8 and 8..16; 2 and 3: tokens 8..16.
        const int row = token + pair * 16 + lane / 16 * 8 + lane % 8;
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
            uint32_t key[4];
            load_matrices(key, keys + swizzled<DIM>(row, k * 2 + lane / 8 % 2));
            multiply_add(left, q[k], key[0], key[1]);
            multiply_add(right, q[k], key[2], key[3]);
        }
    }
    soften<DIM, COUNT>(sums, scores, first_key + token, last, from, scale);
#pragma unroll
    for (int pair = 0; pair < COUNT; pair++) {
        uint32_t weights[4];
        weights_of(weights, scores[2 * pair], scores[2 * pair + 1]);
        // Matrices 0 and 1: tokens 0..8 and 8..16 of eight numbers; 2 and 3: of the next eight.
        const int row = token + pair * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
        for (int sixteen = 0; sixteen < DIM / 16; sixteen++) {
            uint32_t value[4];
            load_matrices_transposed(value, values + swizzled<DIM>(row, sixteen * 2 + lane / 16));
            multiply_add(sums.out[2 * sixteen], weights, value[0], value[1]);
            multiply_add(sums.out[2 * sixteen + 1], weights, value[2], value[3]);
        }
    }
}

/// Where row `row` of a tile for a warpgroup has its 16-byte piece `piece`: halves of 64 numbers one behind the other.
template <int TOKENS>
__device__ __forceinline__ int halved(int row, int piece) {
    return (piece / 8 * TOKENS + row) * 64 + ((piece ^ (row & 7)) & 7) * 8;
}

/// `accumulate` of 64 tokens for four warps together, each with queries of its own: tiles as `halved` has them, published.
template <int DIM>
__device__ __forceinline__ void accumulate_together(Sums<DIM>& sums, const uint32_t (&q)[DIM / 16][4], const bf16* keys, const bf16* values,
                                                    int first_key, const int (&last)[2], const int (&from)[2], float scale) {
    constexpr int TOKENS = 64, EIGHT = 8 * 64 * 2, HALF = TOKENS * 64 * 2;
    const uint32_t key = shared_address(keys), value = shared_address(values);
    float scores[TOKENS / 8][4];
    group_begin();
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
        group_multiply_add<false>(scores, q[k], group_matrix(key + k / 4 * HALF + k % 4 * 32, HALF, EIGHT), k == 0);
    }
    group_end(scores);
    soften<DIM, TOKENS / 16>(sums, scores, first_key, last, from, scale);
    uint32_t weights[TOKENS / 16][4];
#pragma unroll
    for (int pair = 0; pair < TOKENS / 16; pair++) weights_of(weights[pair], scores[2 * pair], scores[2 * pair + 1]);
    group_begin();
#pragma unroll
    for (int pair = 0; pair < TOKENS / 16; pair++) {
        group_multiply_add<true>(sums.out, weights[pair], group_matrix(value + pair * 2 * EIGHT, HALF, EIGHT), false);
    }
    group_end(sums.out);
}
