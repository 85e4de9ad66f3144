// Attention over the paged KV pool, for decodes, drafts to be verified and chunks of prompts alike.
//
//     item     some rows of one sequence, one kv head, a range of its keys        a block each
//     queries  the rows' query heads of that kv head side by side: row t, head g -> t * group + g, padded to a tile
//     tile     64 tokens of keys and values in shared memory, the next one on its way while this one is computed
//
// A row at position p sees keys 0..=p, or the last `window` of them. K and V are read once for all query heads of a group. Scores
// and sums in f32; softmax as it goes along (flash attention: Dao et al. 2022, 2023), in powers of two.
//
//     attend_narrow   up to 16 queries: decodes. The 4 warps share the tokens of each tile and merge their sums at the end
//     attend_wide     up to 64 queries: prompts. Each warp has 16 of them and all tokens
//     attend_group    the same by products of a warpgroup, which Hopper has: keys and values stay in shared memory, where four warps
//                     read them once. By their registers three blocks fit a multiprocessor, so that one can multiply while another
//                     one softens
//     attend_bulk     the same, and bf16 keys and values are brought by boxes, which one warp asks for: nobody computes where each piece goes
//
// Where there are fewer items than multiprocessors the keys of a row are cut into ranges: each item then leaves sum, maximum and
// denominator in `partial`, and `merge_attention` puts them together. What is cut where is the caller's choice and is read from
// device memory, so a captured graph can be replayed for other lengths.
//
//     q [rows, q_stride] bf16, head h at h * dim; keys, values [blocks, kv_heads, block_tokens, dim] bf16 or fp8
//     items [count, 8] i32: first row, rows, position of the first row, first entry in tables, first key, end key, part, 0
//         part < 0: the item is all there is of its rows, and goes to out [rows, heads * dim] bf16. rows 0: nothing to do
//     partial [parts, kv_heads, 16 or 64 queries, dim + 2] f32: sum of exp2(score - maximum) * value; maximum; sum of exp2(…)
//
// block_tokens is a power of two: 1 << block_shift. scale is that of the scores, times that of fp8 keys; v_scale that of fp8 values.
//
// Tables of attend_bulk: [blocks * kv_heads * block_tokens, dim], boxes of a block's tokens, at most 64 and at least 8.
//
// Grid: (items, kv_heads); block: 128 threads; shared memory: 4 * TOKENS * dim * 2 bytes, 1,024 more for attend_group and 1,040 for
// attend_bulk.
// attend_narrow is bound by memory: 2 * dim numbers a token and kv head. The others are bound by the tensor cores from some 64
// queries on.
#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int ITEM = 8;

/// Which of the kernels.
enum How { NARROW, WIDE, GROUP, BULK };

/// Where a tile has a token's 16-byte piece.
template <int DIM, int TOKENS, How HOW>
__device__ __forceinline__ int place_of(int token, int piece) {
    if constexpr (HOW == GROUP) return halved<TOKENS>(token, piece);
    else return swizzled<DIM>(token, piece);
}

/// Begins to bring keys or values of `TOKENS` tokens from `first` on; zeros beyond `end`.
template <int DIM, int TOKENS, How HOW>
__device__ __forceinline__ void fetch(bf16* tile, const bf16* cache, const int* table, int first, int end, int kv_heads, int head,
                                      int block_shift) {
#pragma unroll
    for (int i = threadIdx.x; i < TOKENS * DIM / 8; i += WARPS * 32) {
        const int token = i / (DIM / 8), piece = i % (DIM / 8), key = first + token;
        const bool valid = key < end;
        const int block = valid ? table[key >> block_shift] : 0;
        const size_t place = (((size_t)block * kv_heads + head) << block_shift) + (valid ? key & ((1 << block_shift) - 1) : 0);
        copy_async(tile + place_of<DIM, TOKENS, HOW>(token, piece), cache + place * DIM + piece * 8, valid);
    }
}
/// The same from fp8, at once: they are widened on the way.
template <int DIM, int TOKENS, How HOW>
__device__ __forceinline__ void fetch(bf16* tile, const fp8* cache, const int* table, int first, int end, int kv_heads, int head,
                                      int block_shift) {
#pragma unroll
    for (int i = threadIdx.x; i < TOKENS * DIM / 8; i += WARPS * 32) {
        const int token = i / (DIM / 8), piece = i % (DIM / 8), key = first + token;
        uint2 bits = {0, 0};
        if (key < end) {
            const size_t place = (((size_t)table[key >> block_shift] * kv_heads + head) << block_shift) + (key & ((1 << block_shift) - 1));
            bits = *reinterpret_cast<const uint2*>(cache + place * DIM + piece * 8);
        }
        float wide[8];
#pragma unroll
        for (int k = 0; k < 8; k++) wide[k] = to_float(fp8{(uint8_t)((k < 4 ? bits.x : bits.y) >> (k % 4 * 8))});
        store_eight(tile + place_of<DIM, TOKENS, HOW>(token, piece), wide);
    }
}

/// Begins to bring keys and values of `TOKENS` tokens from `first` on as boxes. Blocks beyond `end` are left out; what lies behind `end`
/// in the last one comes with it.
template <int DIM, int TOKENS>
__device__ __forceinline__ void fetch_boxes(bf16* key_tile, bf16* value_tile, const Table* keys, const Table* values, Arrivals* arrivals,
                                            const int* table, int first, int end, int kv_heads, int head, int block_shift) {
    constexpr int HALVES = DIM / 64;
    if (threadIdx.x >= 32) return;
    const int each = min(1 << block_shift, TOKENS), boxes = (min(end - first, TOKENS) + each - 1) / each;
    if (threadIdx.x == 0) arrivals_expect(arrivals, boxes * each * 2 * DIM * (int)sizeof(bf16));
    __syncwarp();
#pragma unroll 1
    for (int i = threadIdx.x; i < boxes * 2 * HALVES; i += 32) {
        const int box = i / (2 * HALVES), half = i % HALVES, key = first + box * each;
        const bool is_key = i / HALVES % 2 == 0;
        const int row = ((table[key >> block_shift] * kv_heads + head) << block_shift) + (key & ((1 << block_shift) - 1));
        copy_box((is_key ? key_tile : value_tile) + (half * TOKENS + box * each) * 64, is_key ? keys : values, row, half * 64, arrivals);
    }
}

/// Zeros for values of tokens from `count` on: whatever they hold is multiplied with weights of 0.
template <int DIM, int TOKENS>
__device__ __forceinline__ void blank(bf16* tile, int count) {
#pragma unroll 1
    for (int i = threadIdx.x; i < (TOKENS - count) * DIM / 8; i += WARPS * 32) {
        const float zeros[8] = {};
        store_eight(tile + halved<TOKENS>(count + i / (DIM / 8), i % (DIM / 8)), zeros);
    }
}

/// The 128 threads' work on one item. Each warp has queries of its own; if `NARROW` they share the tokens.
template <int DIM, int TOKENS, How HOW, class Kv>
__device__ __forceinline__ void attend(const bf16* q, const Kv* keys, const Kv* values, const int* tables, const int* items,
                                       bf16* out, float* partial, int heads, int kv_heads, int q_stride, int block_shift,
                                       float scale, float v_scale, int window, unsigned char* shared) {
    const int* const item = items + blockIdx.x * ITEM;
    const int row = item[0], rows = item[1], start = item[2], first = item[4], end = item[5], part = item[6];
    if (rows == 0) return;
    const int* const table = tables + item[3];
    const int head = blockIdx.y, group = heads / kv_heads;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile_queries = HOW == NARROW ? 16 : 64, base = HOW == NARROW ? 0 : warp * 16;

    // The lane's two queries: whose they are, and what they see.
    const bf16* rows_of_q[2];
    int last[2], from[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int query = base + lane / 4 + 8 * i, t = query / group, g = query % group;
        const bool valid = t < rows;
        rows_of_q[i] = valid ? q + (size_t)(row + t) * q_stride + (head * group + g) * DIM : nullptr;
        last[i] = valid ? min(start + t, end - 1) : -1;
        from[i] = window > 0 ? max(first, start + t - window + 1) : first;
    }
    uint32_t queries[DIM / 16][4];
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bf16* const at = rows_of_q[i % 2];
            queries[k][i] = at ? *reinterpret_cast<const uint32_t*>(at + k * 16 + lane % 4 * 2 + i / 2 * 8) : 0;
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

    // Pieces change places by bits of the address itself.
    if constexpr (HOW == GROUP || HOW == BULK) shared += -shared_address(shared) & 1023;
    bf16* const tiles = reinterpret_cast<bf16*>(shared);
    const auto key_tile = [&](int at) { return tiles + (2 * (at & 1)) * TOKENS * DIM; };
    const auto value_tile = [&](int at) { return tiles + (2 * (at & 1) + 1) * TOKENS * DIM; };
    [[maybe_unused]] Arrivals* const arrivals = reinterpret_cast<Arrivals*>(tiles + 4 * TOKENS * DIM);
    if constexpr (HOW == BULK) {
        if (threadIdx.x < 2) arrivals_begin(arrivals + threadIdx.x);
        __syncthreads();
    }
    const auto bring = [&](int at, int key) {
        if constexpr (HOW == BULK) {
            fetch_boxes<DIM, TOKENS>(key_tile(at), value_tile(at), keys, values, arrivals + (at & 1), table, key, end, kv_heads, head,
                                     block_shift);
        } else {
            fetch<DIM, TOKENS, HOW>(key_tile(at), keys, table, key, end, kv_heads, head, block_shift);
            fetch<DIM, TOKENS, HOW>(value_tile(at), values, table, key, end, kv_heads, head, block_shift);
            copy_commit();
        }
    };
    // What nobody sees is not read: the first row sees farthest back.
    const int seen = window > 0 ? max(first, start - window + 1) : first;
    const int begin = seen / TOKENS * TOKENS, tile_count = (end - begin + TOKENS - 1) / TOKENS;
    if (tile_count > 0) bring(0, begin);
    for (int at = 0; at < tile_count; at++) {
        const int key = begin + at * TOKENS;
        if (at + 1 < tile_count) bring(at + 1, key + TOKENS);
        if constexpr (HOW == BULK) {
            arrivals_await(arrivals + (at & 1), at / 2 & 1);
            if (key + TOKENS > end) {
                blank<DIM, TOKENS>(value_tile(at), end - key);
                group_publish();
                __syncthreads();
            }
        } else {
            if (at + 1 < tile_count) copy_wait<1>();
            else copy_wait<0>();
            if constexpr (HOW == GROUP) group_publish();
            __syncthreads();
        }
        if constexpr (HOW == GROUP || HOW == BULK) {
            accumulate_together<DIM>(sums, queries, key_tile(at), value_tile(at), key, last, from, scale * LOG2E);
        } else if constexpr (HOW == WIDE) {
            accumulate<DIM, TOKENS / 16>(sums, queries, key_tile(at), value_tile(at), 0, key, last, from, scale * LOG2E);
        } else {
            constexpr int OWN = TOKENS / WARPS;
            accumulate<DIM, OWN / 16>(sums, queries, key_tile(at), value_tile(at), warp * OWN, key, last, from, scale * LOG2E);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sums.total[i] += __shfl_xor_sync(ALL, sums.total[i], 1);
        sums.total[i] += __shfl_xor_sync(ALL, sums.total[i], 2);
    }

    float* const parts = partial + ((size_t)part * kv_heads + head) * tile_queries * (DIM + 2);
    if (HOW != NARROW) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int query = base + lane / 4 + 8 * i, t = query / group, g = query % group;
            if (t >= rows) continue;
            const float inverse = sums.total[i] > 0.0f ? v_scale / sums.total[i] : 0.0f;
#pragma unroll
            for (int eight = 0; eight < DIM / 8; eight++) {
                const int column = eight * 8 + lane % 4 * 2;
                const float a = sums.out[eight][2 * i], b = sums.out[eight][2 * i + 1];
                if (part < 0) {
                    bf16* const to = out + ((size_t)(row + t) * heads + head * group + g) * DIM + column;
                    *reinterpret_cast<uint32_t*>(to) = pack_bf16(a * inverse, b * inverse);
                } else {
                    *reinterpret_cast<float2*>(parts + query * (DIM + 2) + column) = {a, b};
                }
            }
            if (part >= 0 && lane % 4 == 0) {
                *reinterpret_cast<float2*>(parts + query * (DIM + 2) + DIM) = {sums.most[i], sums.total[i]};
            }
        }
        return;
    }
    // The warps' sums lie where the tiles were: [warp, query, dim + 2].
    float* const each = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float* const to = each + (warp * 16 + lane / 4 + 8 * i) * (DIM + 2);
#pragma unroll
        for (int eight = 0; eight < DIM / 8; eight++) {
            const int column = eight * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(to + column) = {sums.out[eight][2 * i], sums.out[eight][2 * i + 1]};
        }
        if (lane % 4 == 0) *reinterpret_cast<float2*>(to + DIM) = {sums.most[i], sums.total[i]};
    }
    __syncthreads();
    for (int query = warp; query < rows * group; query += WARPS) {
        const int t = query / group, g = query % group;
        float most = -INFINITY, total = 0.0f;
#pragma unroll
        for (int other = 0; other < WARPS; other++) most = fmaxf(most, each[(other * 16 + query) * (DIM + 2) + DIM]);
        float shrink[WARPS];
#pragma unroll
        for (int other = 0; other < WARPS; other++) {
            const float* const sum = each + (other * 16 + query) * (DIM + 2);
            shrink[other] = most == -INFINITY ? 0.0f : exp2f(sum[DIM] - most);
            total += sum[DIM + 1] * shrink[other];
        }
        const float inverse = total > 0.0f ? v_scale / total : 0.0f;
        for (int column = lane; column < DIM; column += 32) {
            float sum = 0.0f;
#pragma unroll
            for (int other = 0; other < WARPS; other++) sum += each[(other * 16 + query) * (DIM + 2) + column] * shrink[other];
            if (part < 0) out[((size_t)(row + t) * heads + head * group + g) * DIM + column] = to_bf16(sum * inverse);
            else parts[query * (DIM + 2) + column] = sum;
        }
        if (part >= 0 && lane == 0) {
            parts[query * (DIM + 2) + DIM] = most;
            parts[query * (DIM + 2) + DIM + 1] = total;
        }
    }
}

#define ATTEND(name, DIM, TOKENS, HOW, Kv)                                                                                  \
    KERNEL __launch_bounds__(WARPS * 32)                                                                                    \
        name(const bf16* __restrict__ q, const Kv* __restrict__ keys, const Kv* __restrict__ values,                        \
             const int* __restrict__ tables, const int* __restrict__ items, bf16* __restrict__ out,                         \
             float* __restrict__ partial, int heads, int kv_heads, int q_stride, int block_shift, float scale,              \
             float v_scale, int window) {                                                                                   \
        DYNAMIC_SHARED(shared);                                                                                             \
        attend<DIM, TOKENS, HOW, Kv>(q, keys, values, tables, items, out, partial, heads, kv_heads, q_stride, block_shift,  \
                                     scale, v_scale, window, shared);                                                       \
    }                                                                                                                       \
    EXPORT(name)
ATTEND(attend_narrow_64_bf16, 64, 64, NARROW, bf16)
ATTEND(attend_narrow_128_bf16, 128, 64, NARROW, bf16)
ATTEND(attend_narrow_256_bf16, 256, 64, NARROW, bf16)
ATTEND(attend_narrow_64_fp8, 64, 64, NARROW, fp8)
ATTEND(attend_narrow_128_fp8, 128, 64, NARROW, fp8)
ATTEND(attend_narrow_256_fp8, 256, 64, NARROW, fp8)
ATTEND(attend_wide_64_bf16, 64, 64, WIDE, bf16)
ATTEND(attend_wide_128_bf16, 128, 64, WIDE, bf16)
ATTEND(attend_wide_256_bf16, 256, 32, WIDE, bf16)
ATTEND(attend_wide_64_fp8, 64, 64, WIDE, fp8)
ATTEND(attend_wide_128_fp8, 128, 64, WIDE, fp8)
ATTEND(attend_wide_256_fp8, 256, 32, WIDE, fp8)
#ifdef WARPGROUPS
ATTEND(attend_group_64_bf16, 64, 64, GROUP, bf16)
ATTEND(attend_group_128_bf16, 128, 64, GROUP, bf16)
ATTEND(attend_group_64_fp8, 64, 64, GROUP, fp8)
ATTEND(attend_group_128_fp8, 128, 64, GROUP, fp8)

#define ATTEND_BULK(name, DIM)                                                                                               \
    KERNEL __launch_bounds__(WARPS * 32, 3)                                                                                 \
        name(TABLE keys, TABLE values, const bf16* __restrict__ q, const int* __restrict__ tables,                          \
             const int* __restrict__ items, bf16* __restrict__ out, float* __restrict__ partial, int heads, int kv_heads,   \
             int q_stride, int block_shift, float scale, float v_scale, int window) {                                       \
        DYNAMIC_SHARED(shared);                                                                                             \
        attend<DIM, 64, BULK, Table>(q, &keys, &values, tables, items, out, partial, heads, kv_heads, q_stride,             \
                                     block_shift, scale, v_scale, window, shared);                                          \
    }                                                                                                                       \
    EXPORT(name)
ATTEND_BULK(attend_bulk_64_bf16, 64)
ATTEND_BULK(attend_bulk_128_bf16, 128)
#endif

// Ranges of keys that belong to the same rows, put together.
//
//     merges [count, 4] i32: first row, rows, first part, parts, which follow each other      partial, out: as above
//
// Grid: (count, heads, most rows of a merge); block: a multiple of 32 threads. Bound by memory, of which there is little.
KERNEL merge_attention(const float* __restrict__ partial, const int* __restrict__ merges, bf16* __restrict__ out, int heads,
                       int kv_heads, int tile_queries, int dim, float v_scale) {
    const int* const merge = merges + blockIdx.x * 4;
    const int row = merge[0], rows = merge[1], first = merge[2], parts = merge[3];
    const int t = blockIdx.z, head = blockIdx.y, group = heads / kv_heads, query = t * group + head % group;
    if (t >= rows) return;
    const auto part = [&](int at) {
        return partial + (((size_t)(first + at) * kv_heads + head / group) * tile_queries + query) * (dim + 2);
    };
    float most = -INFINITY, total = 0.0f;
    for (int at = 0; at < parts; at++) most = fmaxf(most, part(at)[dim]);
    for (int at = 0; at < parts; at++) total += most == -INFINITY ? 0.0f : part(at)[dim + 1] * exp2f(part(at)[dim] - most);
    const float inverse = total > 0.0f ? v_scale / total : 0.0f;
    for (int column = threadIdx.x; column < dim; column += blockDim.x) {
        float sum = 0.0f;
        for (int at = 0; at < parts; at++) {
            sum += most == -INFINITY ? 0.0f : part(at)[column] * exp2f(part(at)[dim] - most);
        }
        out[((size_t)(row + t) * heads + head) * dim + column] = to_bf16(sum * inverse);
    }
}
EXPORT(merge_attention)
