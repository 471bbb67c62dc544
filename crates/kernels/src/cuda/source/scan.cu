// The elementwise half of the TTT scan: running sums over the pieces of a group, in f32 registers.
// Slabs are [pieces, D·F] bf16 with n = D·F a multiple of 8; bit i of a mask speaks of piece i.

// In: slab = VᵀZ of each piece. Out: slab = bf16(W0 + η S) with S the state that the piece reads
// (bit in `reads`); S after the last piece. A piece then adds to S, replaces it, or leaves it.
// Without WEIGHTS only S moves. The next piece is loaded before this one is stored: the compiler may
// not reorder the two, and the memory would idle.
template <bool WEIGHTS>
__device__ __forceinline__ void walk_forward(u16 *slab, float *state, const void *w0, int w0_f32, float lr, int pieces, u32 reads, u32 adds, u32 replaces, u64 n) {
    const u64 at = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= n) return;
    F8 s = load8(state + at);
    F8 w = {};
    if (WEIGHTS) w = load8_as(w0, at, w0_f32);
    F8 next = load8(slab + at);
    for (int i = 0; i < pieces; i++) {
        const F8 d = next;
        if (i + 1 < pieces) next = load8(slab + (i + 1) * n + at);
        const bool read = reads >> i & 1, add = adds >> i & 1, replace = replaces >> i & 1;
        if (WEIGHTS) {
            F8 r;
#pragma unroll
            for (int j = 0; j < 8; j++) r.v[j] = w.v[j] + (read ? lr * s.v[j] : 0.f);
            store8(slab + i * n + at, r);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) s.v[j] = add ? s.v[j] + d.v[j] : replace ? d.v[j] : s.v[j];
    }
    store8(state + at, s);
}

extern "C" __global__ void scan_forward(u16 *slab, float *state, const void *w0, int w0_f32, float lr, int pieces, u32 reads, u32 adds, u32 replaces, u64 n) {
    walk_forward<true>(slab, state, w0, w0_f32, lr, pieces, reads, adds, replaces, n);
}

extern "C" __global__ void scan_state(u16 *slab, float *state, const void *w0, int w0_f32, float lr, int pieces, u32 reads, u32 adds, u32 replaces, u64 n) {
    walk_forward<false>(slab, state, w0, w0_f32, lr, pieces, reads, adds, replaces, n);
}

// In: weights = VᵀZ, sums = dOᵀZ of each piece; S after the last piece; later = G, the sum of dOᵀZ over
// the pieces after the last. Walking back: a piece that added is taken off S; out, weights =
// bf16(W0 + η S), sums = bf16(η G) (bit in `gets`, else 0); G goes on from the old G (bit in `keeps`)
// plus the piece's own sum where the piece reads. dw0 gathers every piece.
extern "C" __global__ void scan_backward(u16 *weights, u16 *sums, float *state, float *later, float *dw0, const void *w0, int w0_f32, float lr, int pieces, u32 reads, u32 adds, u32 gets, u32 keeps, u64 n) {
    const u64 at = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= n) return;
    F8 s = load8(state + at), g = load8(later + at), total = load8(dw0 + at);
    const F8 w = load8_as(w0, at, w0_f32);
    F8 next_d = load8(weights + (pieces - 1) * n + at), next_e = load8(sums + (pieces - 1) * n + at);
    for (int i = pieces - 1; i >= 0; i--) {
        const F8 d = next_d, e = next_e;
        if (i > 0) next_d = load8(weights + (i - 1) * n + at), next_e = load8(sums + (i - 1) * n + at);
        const bool read = reads >> i & 1, add = adds >> i & 1, get = gets >> i & 1, keep = keeps >> i & 1;
        F8 a, b;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            s.v[j] = add ? s.v[j] - d.v[j] : s.v[j];
            a.v[j] = w.v[j] + (read ? lr * s.v[j] : 0.f);
            b.v[j] = get ? lr * g.v[j] : 0.f;
            g.v[j] = read ? (keep ? g.v[j] : 0.f) + e.v[j] : g.v[j];
            total.v[j] += e.v[j];
        }
        store8(weights + i * n + at, a);
        store8(sums + i * n + at, b);
    }
    store8(state + at, s);
    store8(later + at, g);
    store8(dw0 + at, total);
}

// out[0] = √ max x, x ≥ 0; not a number where an x is not finite. One warp.
extern "C" __global__ void largest_root(float *out, const float *x, int n) {
    float top = 0.f, bad = 0.f;
    for (int i = threadIdx.x; i < n; i += 32) top = fmaxf(top, x[i]), bad += 0.f * x[i];
    top = warp_max(top), bad = warp_sum(bad);
    if (threadIdx.x == 0) out[0] = sqrtf(top) + bad;
}
