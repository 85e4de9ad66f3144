// Queries and keys turned by their positions, and keys and values put where attention will read them.
//
//     qkv [rows, (heads + 2 * kv_heads) * dim] bf16, queries first: queries are turned in place
//     position p turns the pair (i, i + dim / 2) by the angle p * frequencies[i] (halves, as in GPT-NeoX); * magnitude (yarn), else 1
//     keys, values [blocks, kv_heads, block_tokens, dim], bf16 or fp8: a row goes to place `slots[row]`, which is
//         block * block_tokens + place in the block; below 0: nowhere, a row that fills a batch up
//
// bias [(heads + 2 * kv_heads) * dim] bf16: added to qkv first, or null
// q_norm, k_norm [dim] bf16: the RMS norm of each head that some models have before, or null; with eps and offset as in
// `add_rms_norm.cu`. fp8 holds value / scale. dim is even and at most 256.
//
// Grid: (rows * (heads + 2 * kv_heads) / 4); block: 4 warps, one head each. Bound by memory.
#include "common.cuh"

constexpr int MOST = 4;  // pairs of a lane: dim / 2 / 32

__device__ __forceinline__ void put(bf16* at, float value, float) { *at = to_bf16(value); }
__device__ __forceinline__ void put(fp8* at, float value, float inverse) { *at = to_fp8(value * inverse); }

template <class Kv>
__device__ __forceinline__ void rope_kv_write(bf16* qkv, const int* positions, const int* slots, const float* frequencies,
                                              const bf16* bias, const bf16* q_norm, const bf16* k_norm, Kv* keys, Kv* values, int rows, int heads,
                                              int kv_heads, int dim, int block_tokens, float eps, float offset,
                                              float magnitude, float k_scale, float v_scale) {
    const int all = heads + 2 * kv_heads, lane = threadIdx.x % 32, half = dim / 2;
    const long task = (long)blockIdx.x * 4 + threadIdx.x / 32;
    if (task >= (long)rows * all) return;
    const int row = task / all, head = task % all;
    bf16* const at = qkv + ((size_t)row * all + head) * dim;
    float low[MOST], high[MOST];
#pragma unroll
    for (int k = 0; k < MOST; k++) {
        const int i = k * 32 + lane;
        low[k] = i < half ? to_float(at[i]) : 0.0f;
        high[k] = i < half ? to_float(at[half + i]) : 0.0f;
        if (bias && i < half) {
            low[k] += to_float(bias[head * dim + i]);
            high[k] += to_float(bias[head * dim + half + i]);
        }
    }
    const bool is_value = head >= heads + kv_heads, is_query = head < heads;
    const bf16* const norm = is_query ? q_norm : is_value ? nullptr : k_norm;
    if (norm) {
        float squares = 0.0f;
#pragma unroll
        for (int k = 0; k < MOST; k++) squares += low[k] * low[k] + high[k] * high[k];
        const float factor = rsqrtf(warp_sum(squares) / dim + eps);
#pragma unroll
        for (int k = 0; k < MOST; k++) {
            const int i = k * 32 + lane;
            if (i >= half) break;
            low[k] *= factor * (to_float(norm[i]) + offset);
            high[k] *= factor * (to_float(norm[half + i]) + offset);
        }
    }
    if (!is_value) {
        const float position = positions[row];
#pragma unroll
        for (int k = 0; k < MOST; k++) {
            const int i = k * 32 + lane;
            if (i >= half) break;
            float sine, cosine;
            // Precise: angles go to thousands of turns.
            sincosf(position * frequencies[i], &sine, &cosine);
            sine *= magnitude;
            cosine *= magnitude;
            const float turned = low[k] * cosine - high[k] * sine;
            high[k] = high[k] * cosine + low[k] * sine;
            low[k] = turned;
        }
    }
    if (is_query) {
#pragma unroll
        for (int k = 0; k < MOST; k++) {
            const int i = k * 32 + lane;
            if (i >= half) break;
            at[i] = to_bf16(low[k]);
            at[half + i] = to_bf16(high[k]);
        }
        return;
    }
    const int slot = slots[row];
    if (slot < 0) return;
    const int kv_head = is_value ? head - heads - kv_heads : head - heads;
    const size_t place = ((size_t)(slot / block_tokens) * kv_heads + kv_head) * block_tokens + slot % block_tokens;
    Kv* const to = (is_value ? values : keys) + place * dim;
    const float inverse = 1.0f / (is_value ? v_scale : k_scale);
#pragma unroll
    for (int k = 0; k < MOST; k++) {
        const int i = k * 32 + lane;
        if (i >= half) break;
        put(to + i, low[k], inverse);
        put(to + half + i, high[k], inverse);
    }
}

#define ROPE_KV_WRITE(name, Kv)                                                                                            \
    KERNEL name(bf16* __restrict__ qkv, const int* __restrict__ positions, const int* __restrict__ slots,                  \
                const float* __restrict__ frequencies, const bf16* __restrict__ bias, const bf16* __restrict__ q_norm,     \
                const bf16* __restrict__ k_norm,                                                                           \
                Kv* __restrict__ keys, Kv* __restrict__ values, int rows, int heads, int kv_heads, int dim,                \
                int block_tokens, float eps, float offset, float magnitude, float k_scale, float v_scale) {                \
        rope_kv_write<Kv>(qkv, positions, slots, frequencies, bias, q_norm, k_norm, keys, values, rows, heads, kv_heads,   \
                          dim, block_tokens, eps, offset, magnitude, k_scale, v_scale);                                         \
    }                                                                                                                      \
    EXPORT(name)
ROPE_KV_WRITE(rope_kv_write_bf16, bf16)
ROPE_KV_WRITE(rope_kv_write_fp8, fp8)

// Blocks of the KV pool that become copies of others: pairs [count, 2] i32 of from and to, none of which is in two pairs. A block is
// `bytes` long in each of `layers` layers, `stride` bytes apart; both are multiples of 16.
//
// Grid: (count, layers); block: 256 threads, 16 bytes each at a time. Bound by memory.
KERNEL copy_blocks(unsigned char* __restrict__ pool, const int* __restrict__ pairs, long bytes, long stride) {
    const unsigned char* from = pool + blockIdx.y * stride + pairs[2 * blockIdx.x] * bytes;
    unsigned char* to = pool + blockIdx.y * stride + pairs[2 * blockIdx.x + 1] * bytes;
    for (long i = threadIdx.x * 16l; i < bytes; i += blockDim.x * 16l) {
        *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
    }
}
EXPORT(copy_blocks)
