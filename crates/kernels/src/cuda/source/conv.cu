// The chunk-local depthwise convolution of TTT targets, five taps.
// x, u: [rows of a batch, N, D] bf16; weight: [D, 1, 5]; D a multiple of 8.
// document: for each token, where its document begins in the row; null where rows are one document.

#define TAPS 5
#define RUN 32 // tokens per thread

#define AHEAD 4 // tokens whose loads are under way
#define DEEP 5 // the same of the weight's gradient; with as many as taps, neighbours need not move
#define WARPS 8 // of its blocks

struct F4 {
    float v[4];
};

__device__ __forceinline__ F4 unpack(uint2 p) {
    return {__uint_as_float(p.x << 16), __uint_as_float(p.x & 0xffff0000u), __uint_as_float(p.y << 16), __uint_as_float(p.y & 0xffff0000u)};
}

struct Layout {
    const int *document;
    int tokens, chunk;
};

// The tokens begin − 2 .. of one row, in order: x of five neighbours, and which of them lie in one chunk of
// one document.
// A thread has as many channels as a V holds.
template <class V, int LOADS>
struct Window {
    using F = decltype(unpack(V()));

    const u16 *x; // the row's first token, this thread's channels
    Layout l;
    const int *document; // of the row
    int d, next, within; // the token that enters next, and where in its chunk
    V ring[LOADS];
    F near[TAPS];  // of tokens t − 2 .. t + 2
    u32 cuts;      // bit k: something begins at token t − 2 + k

    __device__ __forceinline__ V load(int t) const {
        return t >= 0 && t < l.tokens ? *(const V *)(x + (u64)t * d) : V();
    }

    __device__ __forceinline__ Window(const u16 *x, Layout l, u64 row, int d, int begin) : x(x + row * l.tokens * d), l(l), document(l.document ? l.document + row * l.tokens : nullptr), d(d), next(begin - 2), cuts(0) {
        within = begin < 2 ? begin - 2 : (begin - 2) % l.chunk;
#pragma unroll
        for (int k = 0; k < TAPS; k++) near[k] = {};
#pragma unroll
        for (int k = 0; k < LOADS; k++) ring[k] = load(next + k);
    }

    // One token on; `slot` is the count of calls before, modulo LOADS.
    __device__ __forceinline__ void step(int slot) {
        const bool out = next >= l.tokens;
        const bool starts = within == 0 || out || (document && next > 0 && document[next] != document[next - 1]);
#pragma unroll
        for (int k = 0; k + 1 < TAPS; k++) near[k] = near[k + 1];
        near[TAPS - 1] = unpack(ring[slot]);
        ring[slot] = load(next + LOADS);
        cuts = cuts >> 1 | (u32)starts << (TAPS - 1);
        next++, within++;
        if (within == l.chunk) within = 0;
    }

    // Whether tap k sees what token t may see: nothing begins between the two.
    __device__ __forceinline__ bool sees(int k) const {
        const u32 between = k < 2 ? (2u << 2) - (2u << k) : (2u << k) - (2u << 2);
        return !(cuts & between);
    }
};

__device__ __forceinline__ float tap_weight(const void *w, int w_f32, int i) {
    return w_f32 ? ((const float *)w)[i] : widen(((const u16 *)w)[i]);
}

// out[t] = Σ_k w[k] x[t ± (k − 2)]: sign 1 the convolution, −1 its transpose.
extern "C" __global__ void conv_apply(u16 *out, const u16 *x, const void *weight, int w_f32, const int *document, int tokens, int chunk, int d, int sign) {
    const int c = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (c >= d) return;
    float w[TAPS][8];
#pragma unroll
    for (int k = 0; k < TAPS; k++)
#pragma unroll
        for (int j = 0; j < 8; j++) w[k][j] = tap_weight(weight, w_f32, (c + j) * TAPS + (sign > 0 ? k : TAPS - 1 - k));
    const u64 row = blockIdx.z;
    const int begin = blockIdx.y * RUN, end = min(begin + RUN, tokens);
    Window<uint4, AHEAD> window(x + c, {document, tokens, chunk}, row, d, begin);
    for (int from = begin - 4; from < end; from += AHEAD) {
#pragma unroll
        for (int slot = 0; slot < AHEAD; slot++) {
            const int t = from + slot;
            window.step(slot);
            if (t < begin || t >= end) continue;
            F8 s = {};
#pragma unroll
            for (int k = 0; k < TAPS; k++) {
                if (!window.sees(k)) continue;
#pragma unroll
                for (int j = 0; j < 8; j++) s.v[j] += w[k][j] * window.near[k].v[j];
            }
            store8(out + (row * tokens + t) * d + c, s);
        }
    }
}

// partial[group of tokens, channel, k] = Σ_t du[t] x[t + k − 2]. A warp sums RUN tokens of 128 channels, and the
// block's warps tokens that follow each other: few partial sums, yet enough blocks to fill the GPU evenly.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) conv_weight_grad(float *partial, const u16 *x, const u16 *du, const int *document, int tokens, int chunk, int d) {
    __shared__ float sums[WARPS][TAPS][128];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = 128 * blockIdx.x, c = first + 4 * lane;
    const u64 row = blockIdx.z;
    const int begin = min((int)(blockIdx.y * WARPS + warp) * RUN, tokens), end = min(begin + RUN, tokens);
    F4 w[TAPS] = {};
    if (c < d && begin < end) {
        Window<uint2, DEEP> window(x + c, {document, tokens, chunk}, row, d, begin);
        const u16 *g = du + row * tokens * d + c;
        auto load = [&](int t) { return t >= begin && t < end ? *(const uint2 *)(g + (u64)t * d) : uint2(); };
        uint2 ring[DEEP];
#pragma unroll
        for (int k = 0; k < DEEP; k++) ring[k] = load(begin - 4 + k);
        for (int from = begin - 4; from < end; from += DEEP) {
#pragma unroll
            for (int slot = 0; slot < DEEP; slot++) {
                window.step(slot);
                const F4 v = unpack(ring[slot]); // zeros outside of the run
                ring[slot] = load(from + slot + DEEP);
#pragma unroll
                for (int k = 0; k < TAPS; k++) {
                    if (!window.sees(k)) continue;
#pragma unroll
                    for (int j = 0; j < 4; j++) w[k].v[j] += v.v[j] * window.near[k].v[j];
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < TAPS; k++) *(float4 *)&sums[warp][k][4 * lane] = make_float4(w[k].v[0], w[k].v[1], w[k].v[2], w[k].v[3]);
    __syncthreads();
    float *out = partial + ((row * gridDim.y + blockIdx.y) * d + first) * TAPS;
    for (int i = threadIdx.x; i < 128 * TAPS && first + i / TAPS < d; i += blockDim.x) {
        float total = 0.f;
        for (int from = 0; from < WARPS; from++) total += sums[from][i % TAPS][i / TAPS];
        out[i] = total;
    }
}
