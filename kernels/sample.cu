// Logits to token, a block a row: what `engine/sampler.rs` does, in the same order.
//
//     raw logits ─ mask ─ bias ─ penalties ─┬─ temperature 0: the best, lowest id first
//         |                                 └─ temperature ─ top-k ─ top-p ─ min-p ─ draw
//         └─ log-probability of what is drawn, if asked for
//
// The vocabulary is never sorted. A bar that the k best reach, or the nucleus, is found by halving the range of floats (their bits are
// ordered as they are), each time counting or summing over those that can matter: the few thousand that one pass over the row has
// put aside. The random number is the hash of seed and position that the host's sampler uses, so a row's token depends on nothing but
// its logits and its wishes, and an answer is the same wherever its rows are drawn, rounding of sums aside.
//
//     logits [rows, stride] f32, the first vocab of each, changed in place
//     wishes [rows]: struct Wish below; given: nothing is drawn, this token of the prompt is looked up; -1: one is drawn; -2: nobody wants the row
//     masks [rows, (vocab + 31) / 32] u32: a bit a token, those set may be drawn; used where wish.masked
//     edits [*]: struct Edit, those of a row from wish.first_edit on: tokens that were seen, or are favoured by the caller
//     aside [rows, vocab] of 8 bytes: scratch
//     drawn [rows]: struct Drawn; token -1 where no logit is a number
//
// Grid: (rows); block: 1024 threads. Bound by memory: the row is read three times, of which the second and the third are served by
// the L2 cache.
#include "common.cuh"

constexpr int THREADS = 1024;

struct Wish {
    unsigned long long seed, position;
    float temperature, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty;
    int top_k, first_edit, edits, masked, logprob, given;
};
/// answered: how often the answer has it; seen: whether the penalties look at it at all.
struct Edit {
    int token;
    float bias;
    int answered, seen;
};
struct Drawn {
    int token;
    float logprob;
    int rank;
    int candidates;
};
struct Candidate {
    float weight;
    int id;
};

/// As the host's `uniform`: a number in [0, 1).
__device__ __forceinline__ unsigned long long mix(unsigned long long x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}
__device__ __forceinline__ double uniform(unsigned long long seed, unsigned long long position) {
    const unsigned long long stream = mix(seed + 0x9e3779b97f4a7c15ull);
    return (double)(mix(stream + position * 0x9e3779b97f4a7c15ull + 1) >> 11) / 9007199254740992.0;
}

struct Shared {
    float numbers[32];
    double sums[32];
    int counts[32];
    int total, token, best;
};

__device__ __forceinline__ double block_sum(double x, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    __syncthreads();
    if (lane == 0) shared.sums[warp] = x;
    __syncthreads();
    x = shared.sums[lane];
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}
__device__ __forceinline__ int block_count(int x, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    __syncthreads();
    if (lane == 0) shared.counts[warp] = x;
    __syncthreads();
    x = shared.counts[lane];
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}
/// The sum of what the threads before this one bring, in their order.
template <class T>
__device__ __forceinline__ T block_before(T x, T* scratch, T& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T upto = x;
    for (int step = 1; step < 32; step *= 2) {
        const T other = __shfl_up_sync(ALL, upto, step);
        if (lane >= step) upto += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = upto;
    __syncthreads();
    T before = 0;
    total = 0;
    for (int other = 0; other < THREADS / 32; other++) {
        if (other < warp) before += scratch[other];
        total += scratch[other];
    }
    return before + upto - x;
}

/// Puts aside, in order of ids, who weighs at least `bar`. Returns how many.
__device__ __forceinline__ int put_aside(const float* row, int vocab, float best, float heat, float bar, Candidate* aside, Shared& shared) {
    int found = 0;
    for (int start = 0; start < vocab; start += THREADS) {
        const int id = start + threadIdx.x;
        const float weight = id < vocab && row[id] > -INFINITY ? expf((row[id] - best) * heat) : 0.0f;
        const bool wanted = weight > 0.0f && weight >= bar;
        int total;
        const int at = found + block_before(wanted ? 1 : 0, shared.counts, total);
        if (wanted) aside[at] = {weight, id};
        found += total;
    }
    __syncthreads();
    return found;
}
/// Keeps those that weigh more than the bar and the first `ties` that weigh as much. In place: nobody is moved back.
__device__ __forceinline__ int keep(Candidate* aside, int count, float bar, int ties, Shared& shared) {
    int found = 0, tied = 0;
    for (int start = 0; start < count; start += THREADS) {
        const int i = start + threadIdx.x;
        const Candidate own = i < count ? aside[i] : Candidate{-1.0f, 0};
        int all_ties, total;
        const int tie = tied + block_before(own.weight == bar ? 1 : 0, shared.counts, all_ties);
        const bool stays = own.weight > bar || (own.weight == bar && tie < ties);
        const int at = found + block_before(stays ? 1 : 0, shared.counts, total);
        __syncthreads();
        if (stays) aside[at] = own;
        found += total;
        tied += all_ties;
        __syncthreads();
    }
    return found;
}

KERNEL __launch_bounds__(THREADS)
    sample(float* __restrict__ logits, const Wish* __restrict__ wishes, const uint32_t* __restrict__ masks,
           const Edit* __restrict__ edits, Candidate* __restrict__ scratch, Drawn* __restrict__ drawn, int vocab, int stride) {
    __shared__ Shared shared;
    const Wish wish = wishes[blockIdx.x];
    float* const row = logits + (size_t)blockIdx.x * stride;
    Candidate* const aside = scratch + (size_t)blockIdx.x * vocab;
    const uint32_t* const mask = wish.masked ? masks + (size_t)blockIdx.x * ((vocab + 31) / 32) : nullptr;

    if (wish.given == -2) {
        if (threadIdx.x == 0) drawn[blockIdx.x] = {-1, 0.0f, 0, 0};
        return;
    }
    // The sum of all that the model thinks possible, before anything is changed.
    float raw_total = 0.0f;
    if (wish.logprob) {
        float most = -INFINITY;
        for (int id = threadIdx.x; id < vocab; id += THREADS) most = fmaxf(most, row[id]);
        most = block_max(most, shared.numbers);
        double sum = 0.0;
        for (int id = threadIdx.x; id < vocab; id += THREADS) sum += row[id] > -INFINITY ? expf(row[id] - most) : 0.0f;
        raw_total = most + (float)log(block_sum(sum, shared));
    }
    if (wish.given >= 0) {
        const float logit = wish.given < vocab ? row[wish.given] : -INFINITY;
        int above = 0;
        for (int id = threadIdx.x; id < vocab; id += THREADS) above += row[id] > logit;
        above = block_count(above, shared);
        if (threadIdx.x == 0) drawn[blockIdx.x] = {wish.given, logit - raw_total, 1 + above, 0};
        return;
    }
    // Edits change the row, so what was raw is noted by whoever draws it: the edit of a token knows what it was.
    __syncthreads();
    float most = -INFINITY;
    for (int id = threadIdx.x; id < vocab; id += THREADS) {
        const bool allowed = !mask || (mask[id / 32] >> (id % 32) & 1);
        // What is no number is nothing.
        const float logit = allowed && row[id] == row[id] ? row[id] : -INFINITY;
        aside[id].weight = row[id];
        row[id] = logit;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < wish.edits; i += THREADS) {
        const Edit edit = edits[wish.first_edit + i];
        if (edit.token < 0 || edit.token >= vocab) continue;
        float logit = row[edit.token] + edit.bias;
        if (edit.seen) {
            logit = logit > 0.0f ? logit / wish.repetition_penalty : logit * wish.repetition_penalty;
            if (edit.answered > 0) logit -= wish.frequency_penalty * edit.answered + wish.presence_penalty;
        }
        row[edit.token] = logit;
    }
    __syncthreads();
    for (int id = threadIdx.x; id < vocab; id += THREADS) most = fmaxf(most, row[id]);
    const float best = block_max(most, shared.numbers);
    if (best == -INFINITY) {
        if (threadIdx.x == 0) drawn[blockIdx.x] = {-1, 0.0f, 0, 0};
        return;
    }
    // An infinite logit is certain.
    int token = vocab, candidates = 1;
    if (wish.temperature <= 0.0f || best == INFINITY) {
        for (int id = threadIdx.x; id < vocab; id += THREADS) {
            if (row[id] == best) token = min(token, id);
        }
        for (int step = 16; step > 0; step /= 2) token = min(token, __shfl_xor_sync(ALL, token, step));
        if (threadIdx.x % 32 == 0) shared.counts[threadIdx.x / 32] = token;
        __syncthreads();
        for (int warp = 0; warp < THREADS / 32; warp++) token = min(token, shared.counts[warp]);
        const float raw = aside[token].weight;
        if (threadIdx.x == 0) drawn[blockIdx.x] = {token, wish.logprob ? raw - raw_total : 0.0f, 0, 1};
        return;
    }
    const float heat = 1.0f / fmaxf(wish.temperature, 1e-4f);
    const bool limited = wish.top_k > 0 && wish.top_k < vocab;
    double total = 0.0;
    for (int id = threadIdx.x; id < vocab; id += THREADS) total += row[id] > -INFINITY ? expf((row[id] - best) * heat) : 0.0f;
    total = block_sum(total, shared);
    // Who weighs less than this is kept by no filter: below it all together weigh less than what the nucleus leaves out.
    float bar = 0.0f;
    if (!limited) bar = wish.top_p < 1.0f ? (float)((1.0 - wish.top_p) * total / vocab) : wish.min_p;
    // The raw logits lie where candidates will: keep the row's own instead, which the weights are computed from.
    int count;
    if (limited) {
        // The bar that exactly or at least k reach, by halving over the whole row: 32 passes, of which most read the cache.
        uint32_t low = 0, high = 0x3f800001u;
        while (high - low > 1) {
            const uint32_t middle = low + (high - low) / 2;
            int above = 0;
            for (int id = threadIdx.x; id < vocab; id += THREADS) {
                above += row[id] > -INFINITY && expf((row[id] - best) * heat) >= __uint_as_float(middle);
            }
            if (block_count(above, shared) >= wish.top_k) low = middle;
            else high = middle;
        }
        bar = __uint_as_float(low);
    }
    __syncthreads();
    count = put_aside(row, vocab, best, heat, bar, aside, shared);
    if (limited && count > wish.top_k) {
        int above = 0;
        for (int i = threadIdx.x; i < count; i += THREADS) above += aside[i].weight > bar;
        above = block_count(above, shared);
        count = keep(aside, count, bar, wish.top_k - above, shared);
    }
    if (limited) {
        total = 0.0;
        for (int i = threadIdx.x; i < count; i += THREADS) total += aside[i].weight;
        total = block_sum(total, shared);
    }
    if (wish.top_p < 1.0f) {
        const double goal = wish.top_p * total;
        uint32_t low = 1, high = 0x3f800001u;
        const auto sum_from = [&](float from) {
            double sum = 0.0;
            for (int i = threadIdx.x; i < count; i += THREADS) sum += aside[i].weight >= from ? aside[i].weight : 0.0f;
            return block_sum(sum, shared);
        };
        while (high - low > 1) {
            const uint32_t middle = low + (high - low) / 2;
            if (sum_from(__uint_as_float(middle)) >= goal) low = middle;
            else high = middle;
        }
        const float edge = __uint_as_float(low);
        const double above = sum_from(__uint_as_float(high));
        const double ties = ceil((goal - above) / edge);
        count = keep(aside, count, edge, (int)fmax(ties, above > 0.0 ? 0.0 : 1.0), shared);
    }
    if (wish.min_p > 0.0f) count = keep(aside, count, wish.min_p, count, shared);
    double left = 0.0;
    for (int i = threadIdx.x; i < count; i += THREADS) left += aside[i].weight;
    left = block_sum(left, shared);
    // The first at which the weights add up to more than the goal, or the last of all if rounding leads past it.
    const double goal = uniform(wish.seed, wish.position) * left;
    if (threadIdx.x == 0) shared.token = -1;
    __syncthreads();
    double passed = 0.0;
    for (int start = 0; start < count; start += THREADS) {
        const int i = start + threadIdx.x;
        const double weight = i < count ? aside[i].weight : 0.0;
        double all;
        const double before = passed + block_before(weight, shared.sums, all);
        if (i < count && before <= goal && (goal < before + weight || i == count - 1)) atomicMax(&shared.token, i);
        passed += all;
        if (passed > goal) break;
    }
    __syncthreads();
    token = aside[shared.token].id;
    candidates = count;
    if (threadIdx.x == 0) {
        float raw = row[token];
        // What the edit of this token had made of it, taken back.
        for (int i = 0; wish.logprob && i < wish.edits; i++) {
            const Edit edit = edits[wish.first_edit + i];
            if (edit.token != token) continue;
            if (edit.seen) {
                if (edit.answered > 0) raw += wish.frequency_penalty * edit.answered + wish.presence_penalty;
                raw = raw > 0.0f ? raw * wish.repetition_penalty : raw / wish.repetition_penalty;
            }
            raw -= edit.bias;
        }
        drawn[blockIdx.x] = {token, wish.logprob ? raw - raw_total : 0.0f, 0, candidates};
    }
}
EXPORT(sample)

// The tokens that the next step begins with, where each row's was drawn. ids [rows] i32: that of a row without one is 0.
//
// Grid: (rows / 128); block: 128 threads, a row each.
KERNEL follow(const Drawn* __restrict__ drawn, int* __restrict__ ids, int rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < rows) ids[row] = max(drawn[row].token, 0);
}
EXPORT(follow)

// Which drafts came true, and what is said after them: greedy and sampled alike, since each row was drawn with the random number of
// its own position, so a draft came true if it is what was drawn there.
//
//     drawn: as above, the rows of one sequence one after the other; drafts [rows] i32: the draft behind each row, -1 behind the last
//     spans [count, 2] i32: first row, rows      accepted [count] i32: rows whose token counts: those up to the first that is not the draft
//
// Grid: (count / 128); block: 128 threads, a sequence each.
KERNEL verify(const Drawn* __restrict__ drawn, const int* __restrict__ drafts, const int* __restrict__ spans,
              int* __restrict__ accepted, int count) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    const int first = spans[2 * at], rows = spans[2 * at + 1];
    int right = 0;
    while (right + 1 < rows && drawn[first + right].token == drafts[first + right]) right++;
    accepted[at] = right + 1;
}
EXPORT(verify)
