// Looking up embedding rows, and the gradient of that.

// y[t] = weight[ids[t]], weight f32 or bf16, y bf16; D a multiple of 8.
extern "C" __global__ void embedding_forward(u16 *y, const void *ids, int wide, const void *weight, int w_f32, int tokens, int d) {
    const u64 vectors = (u64)tokens * (d / 8), stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += stride) {
        const u64 t = i / (d / 8);
        const int c = 8 * (int)(i % (d / 8));
        const i64 id = wide ? ((const i64 *)ids)[t] : (i64)((const int *)ids)[t];
        store8(y + t * d + c, load8_as(weight, id * d + c, w_f32));
    }
}

// The gradient: dw[v] = Σ over tokens with ids[t] = v of dy[t]. Text has few words that are frequent and many that
// are rare, so tokens are first put in order, by id and then as they come: everybody knows where a row's tokens
// lie, and the rows with many are shared.

#define PIECE 1024 // tokens that a block puts in order
#define ROWS 8     // rows of the vocabulary of a block that adds
#define FEW 64     // tokens that one warp adds

__device__ __forceinline__ int id_at(const void *ids, int wide, int t) {
    return wide ? (int)((const i64 *)ids)[t] : ((const int *)ids)[t];
}

// counts[p, v] = tokens of piece p with id v; [P, V]. A block of PIECE threads for each piece.
extern "C" __global__ void embedding_count(int *counts, const void *ids, int wide, int tokens, int vocab) {
    int *own = counts + (u64)blockIdx.x * vocab;
    for (int v = threadIdx.x; v < vocab; v += PIECE) own[v] = 0;
    __syncthreads();
    const int t = blockIdx.x * PIECE + threadIdx.x;
    if (t < tokens) atomicAdd(own + id_at(ids, wide, t), 1);
}

// counts[p, v] ← Σ over pieces before p, totals[v] ← Σ over all.
extern "C" __global__ void embedding_before(int *counts, int *totals, int pieces, int vocab) {
    const int v = blockIdx.x * blockDim.x + threadIdx.x;
    if (v >= vocab) return;
    int sum = 0;
    for (int p = 0; p < pieces; p++) {
        int *at = counts + (u64)p * vocab + v;
        const int count = *at;
        *at = sum, sum += count;
    }
    totals[v] = sum;
}

// starts[v] = Σ over ids below v of their totals; [V + 1]. One block of 1024 threads.
extern "C" __global__ void embedding_starts(int *starts, const int *totals, int vocab) {
    __shared__ int of_warps[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int before = 0;
    for (int base = 0; base < vocab; base += 1024) {
        const int v = base + threadIdx.x;
        int sum = v < vocab ? totals[v] : 0;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int below = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += below;
        }
        if (lane == 31) of_warps[warp] = sum;
        __syncthreads();
        int all = 0;
        for (int w = 0; w < 32; w++) {
            if (w < warp) sum += of_warps[w];
            all += of_warps[w];
        }
        if (v < vocab) starts[v + 1] = before + sum;
        before += all;
        __syncthreads();
    }
    if (threadIdx.x == 0) starts[0] = 0;
}

// order: the tokens by id, those of one id as they come. A block of PIECE threads for each piece.
extern "C" __global__ void embedding_order(int *order, const int *before, const int *starts, const void *ids, int wide, int tokens, int vocab) {
    __shared__ __align__(16) int piece[PIECE];
    const int t = blockIdx.x * PIECE + threadIdx.x;
    const int id = t < tokens ? id_at(ids, wide, t) : -1;
    piece[threadIdx.x] = id;
    __syncthreads();
    if (t >= tokens) return;
    int earlier = 0, i = 0;
    for (; i + 4 <= threadIdx.x; i += 4) {
        const int4 x = *(const int4 *)(piece + i);
        earlier += (x.x == id) + (x.y == id) + (x.z == id) + (x.w == id);
    }
    for (; i < threadIdx.x; i++) earlier += piece[i] == id;
    order[starts[id] + before[(u64)blockIdx.x * vocab + id] + earlier] = t;
}

// sum += the gradients of tokens order[from .. to), eight columns of each.
__device__ __forceinline__ void add_tokens(F8 &sum, const int *order, int from, int to, const u16 *dy, int d) {
    // Eight loads are under way at once.
    for (; from + 8 <= to; from += 8) {
        uint4 x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = *(const uint4 *)(dy + (u64)order[from + i] * d);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const F8 one = unpack(x[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) sum.v[j] += one.v[j];
        }
    }
    for (; from < to; from++) {
        const F8 one = load8(dy + (u64)order[from] * d);
#pragma unroll
        for (int j = 0; j < 8; j++) sum.v[j] += one.v[j];
    }
}

// dw: [V, D] f32, written whole, in the same order of sums each time. A block: ROWS warps, as many rows, 256 columns
// (blockIdx.y). A warp adds a row of few tokens; a row of many is added by all warps, groups of eight tokens in
// turn.
extern "C" __global__ void embedding_backward(float *dw, const int *order, const int *starts, const u16 *dy, int vocab, int d) {
    __shared__ F8 parts[ROWS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.y * 256 + 8 * lane;
    const bool in_range = c < d;
    const int first = blockIdx.x * ROWS;
    const int own = first + warp;
    if (own < vocab && in_range) {
        const int from = starts[own], to = starts[own + 1];
        if (to - from <= FEW) {
            F8 sum = {};
            add_tokens(sum, order, from, to, dy + c, d);
            store8(dw + (u64)own * d + c, sum);
        }
    }
    for (int v = first; v < min(first + ROWS, vocab); v++) {
        const int from = starts[v], to = starts[v + 1];
        if (to - from <= FEW) continue;
        F8 sum = {};
        if (in_range)
            for (int at = from + 8 * warp; at < to; at += 8 * ROWS) add_tokens(sum, order, at, min(at + 8, to), dy + c, d);
        parts[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && in_range) {
            for (int w = 1; w < ROWS; w++)
#pragma unroll
                for (int j = 0; j < 8; j++) sum.v[j] += parts[w][lane].v[j];
            store8(dw + (u64)v * d + c, sum);
        }
        __syncthreads();
    }
}
