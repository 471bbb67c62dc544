// The elementwise half of the TTT scan: running sums over the pieces of a group, in f32 registers.
// Slabs are [pieces, D·F] bf16 with n = D·F a multiple of 8; bit i of a mask speaks of piece i.

// Pieces whose loads are under way. The compiler may not move a load over the store before it.
#define AHEAD 4

// Calls visit(i, x) with this thread's eight elements of each piece of `slab`, from the first to the last
// or BACK from the last to the first; visit may overwrite them. Pieces that are not in `there` hold anything
// and are given as zeros.
template <bool BACK, class Visit>
__device__ __forceinline__ void for_pieces(const u16 *slab, int pieces, u32 there, u64 n, u64 at, Visit visit) {
    auto load = [&](int step) {
        const int i = BACK ? pieces - 1 - step : step;
        return there >> i & 1 ? *(const uint4 *)(slab + (u64)i * n + at) : make_uint4(0, 0, 0, 0);
    };
    uint4 ring[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        if (k < pieces) ring[k] = load(k);
    for (int begin = 0; begin < pieces; begin += AHEAD) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int step = begin + k;
            if (step >= pieces) break;
            const F8 x = unpack(ring[k]);
            if (step + AHEAD < pieces) ring[k] = load(step + AHEAD);
            visit(BACK ? pieces - 1 - step : step, x);
        }
    }
}

__device__ __forceinline__ void take(F8 &s, const F8 &d, bool add, bool replace) {
#pragma unroll
    for (int j = 0; j < 8; j++) s.v[j] = add ? s.v[j] + d.v[j] : replace ? d.v[j] : s.v[j];
}

// In: slab = VᵀZ of each piece that adds or replaces. Out: slab = bf16(W0 + η S) of every piece, with S the
// state that it reads (bit in `reads`); S after the last piece, unless `state` is null: then S begins as zero
// and is not kept. A piece then adds to S, replaces it, or leaves it. partial[block, k]: Σ S² behind the k-th
// piece of `ends`.
extern "C" __global__ void scan_forward(u16 *slab, float *state, float *partial, const void *w0, int w0_f32, float lr, int pieces, u32 reads, u32 adds, u32 replaces, u32 ends, u64 n) {
    __shared__ float shared[32];
    const u64 own = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x), at = min(own, n - 8);
    const bool here = own < n; // the block's other threads help to add
    F8 s = {};
    if (state) s = load8(state + at);
    const F8 w = load8_as(w0, at, w0_f32);
    float *out = partial + (u64)blockIdx.x * __popc(ends);
    for_pieces<false>(slab, pieces, adds | replaces, n, at, [&](int i, const F8 &d) {
        const bool read = reads >> i & 1;
        F8 r;
#pragma unroll
        for (int j = 0; j < 8; j++) r.v[j] = w.v[j] + (read ? lr * s.v[j] : 0.f);
        if (here) store8(slab + (u64)i * n + at, r);
        take(s, d, adds >> i & 1, replaces >> i & 1);
        if (ends >> i & 1) {
            float square = 0.f;
#pragma unroll
            for (int j = 0; j < 8; j++) square += s.v[j] * s.v[j];
            const float sum = block_sum(here ? square : 0.f, shared);
            if (threadIdx.x == 0) *out = sum;
            out++;
        }
    });
    if (here && state) store8(state + at, s);
}

// S goes over the pieces of a slab of VᵀZ.
extern "C" __global__ void scan_state(const u16 *slab, float *state, int pieces, u32 adds, u32 replaces, u64 n) {
    const u64 at = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= n) return;
    F8 s = load8(state + at);
    for_pieces<false>(slab, pieces, adds | replaces, n, at, [&](int i, const F8 &d) { take(s, d, adds >> i & 1, replaces >> i & 1); });
    store8(state + at, s);
}

// In: weights = VᵀZ of each piece that adds (without a state: or replaces), sums = dOᵀZ of each. Out: weights =
// bf16(W0 + η S) of each, S what the piece read; sums = bf16(η G) (bit in `gets`, else 0) of each in `taken`, G
// the sum of dOᵀZ over the pieces that read what it wrote.
// With a state, S after the last piece, the pieces that added are taken off it on the way back, and `later` is
// G behind the last piece. Without, S and G begin as zero with each document; `weights` may then be null, where
// they are known. G goes on from the old G (bit in `keeps`) plus the piece's own sum where the piece reads.
// dw0 gathers every piece, on top of what it holds if it `holds` anything.
extern "C" __global__ void scan_backward(u16 *weights, u16 *sums, float *state, float *later, float *dw0, int holds, const void *w0, int w0_f32, float lr, int pieces, u32 reads, u32 adds, u32 replaces, u32 gets, u32 keeps, u32 taken, u64 n) {
    const u64 at = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= n) return;
    F8 w = {};
    if (weights) w = load8_as(w0, at, w0_f32);
    auto put = [&](int i, const F8 &s) {
        const bool read = reads >> i & 1;
        F8 r;
#pragma unroll
        for (int j = 0; j < 8; j++) r.v[j] = w.v[j] + (read ? lr * s.v[j] : 0.f);
        store8(weights + (u64)i * n + at, r);
    };
    F8 s = {}, g = {};
    if (state) {
        s = load8(state + at), g = load8(later + at);
        for_pieces<true>(weights, pieces, adds, n, at, [&](int i, const F8 &d) {
            const bool add = adds >> i & 1;
#pragma unroll
            for (int j = 0; j < 8; j++) s.v[j] = add ? s.v[j] - d.v[j] : s.v[j];
            put(i, s);
        });
        store8(state + at, s);
    } else if (weights) {
        for_pieces<false>(weights, pieces, adds | replaces, n, at, [&](int i, const F8 &d) {
            put(i, s);
            take(s, d, adds >> i & 1, replaces >> i & 1);
        });
    }
    F8 total = {};
    if (holds) total = load8(dw0 + at);
    for_pieces<true>(sums, pieces, ~0u, n, at, [&](int i, const F8 &e) {
        const bool read = reads >> i & 1, get = gets >> i & 1, keep = keeps >> i & 1;
        F8 b;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            b.v[j] = get ? lr * g.v[j] : 0.f;
            g.v[j] = read ? (keep ? g.v[j] : 0.f) + e.v[j] : g.v[j];
            total.v[j] += e.v[j];
        }
        if (taken >> i & 1) store8(sums + (u64)i * n + at, b);
    });
    if (state) store8(later + at, g);
    store8(dw0 + at, total);
}

// What the products of `hopper_scan.cu` leave to do for dW0: its sum over the pieces of `totals`, whose slots hold those
// of whole documents, and over the document that goes on, G before the group less G behind it (null: zero); on top of
// what dw0 holds if it `holds` anything. The slots in `clears` then become zero.
extern "C" __global__ void scan_totals(u16 *slots, u32 totals, u32 clears, const float *behind, const float *before, float *dw0, int holds, u64 n) {
    const u64 at = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= n) return;
    F8 total = {};
    auto add = [&](const F8 &x, float sign) {
#pragma unroll
        for (int j = 0; j < 8; j++) total.v[j] += sign * x.v[j];
    };
    if (holds) total = load8(dw0 + at);
    while (totals) {
        // Several loads under way.
        uint4 ring[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            ring[k] = totals ? *(const uint4 *)(slots + (u64)(__ffs(totals) - 1) * n + at) : make_uint4(0, 0, 0, 0);
            totals &= totals - 1;
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) add(unpack(ring[k]), 1.f);
    }
    if (before) add(load8(before + at), 1.f);
    if (behind) add(load8(behind + at), -1.f);
    store8(dw0 + at, total);
    for (; clears; clears &= clears - 1) *(uint4 *)(slots + (u64)(__ffs(clears) - 1) * n + at) = make_uint4(0, 0, 0, 0);
}

// Zeros over those of `pieces`, each of n bf16, whose bit is set. Block (_, k) clears a part of the k-th.
extern "C" __global__ void clear_pieces(u16 *pieces, u32 which, u64 n) {
    for (int k = blockIdx.y; k; k--) which &= which - 1;
    u16 *piece = pieces + (u64)(__ffs(which) - 1) * n;
    const u64 own = (u64)blockIdx.x * blockDim.x + threadIdx.x, step = (u64)gridDim.x * blockDim.x;
    const bool wide = (u64)piece % 16 == 0;
    const u64 vectors = wide ? n / 8 : 0;
    for (u64 i = own; i < vectors; i += step) ((uint4 *)piece)[i] = make_uint4(0, 0, 0, 0);
    for (u64 i = 8 * vectors + own; i < n; i += step) piece[i] = 0;
}

// out[0] = √ max x, x ≥ 0; not a number where an x is not finite. One warp.
extern "C" __global__ void largest_root(float *out, const float *x, int n) {
    float top = 0.f, bad = 0.f;
    for (int i = threadIdx.x; i < n; i += 32) top = fmaxf(top, x[i]), bad += 0.f * x[i];
    top = warp_max(top), bad = warp_sum(bad);
    if (threadIdx.x == 0) out[0] = sqrtf(top) + bad;
}
