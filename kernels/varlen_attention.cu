// Attention of packed texts in which each row sees all of its text: what encoders do.
//
//     item    up to 64 rows of a text, one head                                        a block each
//     tile    keys and values of 64 rows in shared memory, the next one on its way while this one is computed
//
// Each warp has 16 queries and all keys. Scores and sums in f32, as in `attention.cuh`.
//
//     qkv [rows, 3 * heads * dim] bf16: queries, keys and values of all heads, as the product left them, without their bias
//     bias [3 * heads * dim] f32: added to queries where they are read and to what comes out for values, since weights add up to 1.
//         That of keys adds the same to all scores of a query, which softmax does not see: it is not read
//     items [count, 4] i32: first row, rows, first row of the text, rows of the text
//     out [rows, heads * dim] bf16
//
// dim is 32, 64 or 128.
//
// Grid: (items, heads); block: 128 threads; shared memory: 4 * 64 * dim * 2 bytes. Bound by the tensor cores from some hundred rows a
// text on, below that by memory: 8 * dim bytes a row and head.
#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int TOKENS = 64;
constexpr int ITEM = 4;

/// Begins to bring keys or values of the tile whose first is row `first` of the text; zeros beyond its end.
template <int DIM>
__device__ __forceinline__ void fetch(bf16* tile, const bf16* text, size_t stride, int first, int length) {
#pragma unroll
    for (int i = threadIdx.x; i < TOKENS * DIM / 8; i += WARPS * 32) {
        const int token = i / (DIM / 8), piece = i % (DIM / 8);
        const bool valid = first + token < length;
        const bf16* const from = text + (valid ? first + token : 0) * stride + piece * 8;
        copy_async(tile + swizzled<DIM>(token, piece), from, valid);
    }
}

/// Two neighbouring numbers and what is added to them.
__device__ __forceinline__ uint32_t biased(const bf16* at, const float* bias) {
    const uint32_t bits = *reinterpret_cast<const uint32_t*>(at);
    const float2 add = *reinterpret_cast<const float2*>(bias);
    return pack_bf16(__uint_as_float(bits << 16) + add.x, __uint_as_float(bits & 0xffff0000u) + add.y);
}

template <int DIM>
__device__ __forceinline__ void attend_text(const bf16* qkv, const float* bias, const int* items, bf16* out, int heads, float scale,
                                            unsigned char* shared) {
    const int* const item = items + blockIdx.x * ITEM;
    const int row = item[0], rows = item[1], text = item[2], length = item[3];
    const int head = blockIdx.y, width = heads * DIM;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const size_t stride = 3 * width;
    const bf16* const keys = qkv + text * stride + width + head * DIM;
    const bf16* const values = keys + width;

    uint32_t queries[DIM / 16][4];
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = warp * 16 + lane / 4 + i % 2 * 8, column = head * DIM + k * 16 + lane % 4 * 2 + i / 2 * 8;
            queries[k][i] = t < rows ? biased(qkv + (row + t) * stride + column, bias + column) : 0;
        }
    }
    Sums<DIM> sums;
#pragma unroll
    for (int eight = 0; eight < DIM / 8; eight++) {
#pragma unroll
        for (int i = 0; i < 4; i++) sums.out[eight][i] = 0.0f;
    }
    sums.most[0] = sums.most[1] = -INFINITY;
    sums.total[0] = sums.total[1] = 0.0f;

    bf16* const tiles = reinterpret_cast<bf16*>(shared);
    const auto key_tile = [&](int at) { return tiles + (2 * (at & 1)) * TOKENS * DIM; };
    const auto value_tile = [&](int at) { return tiles + (2 * (at & 1) + 1) * TOKENS * DIM; };
    const auto bring = [&](int at) {
        fetch<DIM>(key_tile(at), keys, stride, at * TOKENS, length);
        fetch<DIM>(value_tile(at), values, stride, at * TOKENS, length);
        copy_commit();
    };
    const int last[2] = {length - 1, length - 1}, from[2] = {0, 0};
    // Short texts leave warps without queries, which bring tiles all the same.
    const bool busy = warp * 16 < rows;
    const int tile_count = (length + TOKENS - 1) / TOKENS;
    bring(0);
    for (int at = 0; at < tile_count; at++) {
        if (at + 1 < tile_count) {
            bring(at + 1);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncthreads();
        if (busy) {
            accumulate<DIM, TOKENS / 16>(sums, queries, key_tile(at), value_tile(at), 0, at * TOKENS, last, from, scale * LOG2E);
        }
        __syncthreads();
    }
    if (!busy) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sums.total[i] += __shfl_xor_sync(ALL, sums.total[i], 1);
        sums.total[i] += __shfl_xor_sync(ALL, sums.total[i], 2);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int t = warp * 16 + lane / 4 + 8 * i;
        if (t >= rows) continue;
        const float inverse = 1.0f / sums.total[i];
#pragma unroll
        for (int eight = 0; eight < DIM / 8; eight++) {
            const int column = head * DIM + eight * 8 + lane % 4 * 2;
            const float2 add = *reinterpret_cast<const float2*>(bias + 2 * width + column);
            bf16* const to = out + (size_t)(row + t) * width + column;
            *reinterpret_cast<uint32_t*>(to) =
                pack_bf16(sums.out[eight][2 * i] * inverse + add.x, sums.out[eight][2 * i + 1] * inverse + add.y);
        }
    }
}

#define ATTEND_TEXT(DIM)                                                                                                        \
    KERNEL __launch_bounds__(WARPS * 32)                                                                                        \
        attend_text_##DIM(const bf16* __restrict__ qkv, const float* __restrict__ bias, const int* __restrict__ items,          \
                          bf16* __restrict__ out, int heads, float scale) {                                                     \
        DYNAMIC_SHARED(shared);                                                                                                 \
        attend_text<DIM>(qkv, bias, items, out, heads, scale, shared);                                                          \
    }                                                                                                                           \
    EXPORT(attend_text_##DIM)
ATTEND_TEXT(32)
ATTEND_TEXT(64)
ATTEND_TEXT(128)
