// The chunk-local depthwise convolution of TTT targets, five taps.
// x, u: [rows of a batch, N, D] bf16; weight: [D, 1, 5]; D a multiple of 8.
// document: for each token, where its document begins in the row; null where rows are one document.

#define TAPS 5
#define RUN 32 // tokens per thread

#define AHEAD 4 // tokens whose loads are under way

struct Layout {
    const int *document;
    int tokens, chunk;
};

// The tokens begin − 2 .. of one row, in order: x of five neighbours, and which of them lie in one chunk of
// one document.
struct Window {
    const u16 *x; // the row's first token, this thread's channels
    Layout l;
    const int *document; // of the row
    int d, next, within; // the token that enters next, and where in its chunk
    uint4 ring[AHEAD];
    F8 near[TAPS]; // of tokens t − 2 .. t + 2
    u32 cuts;      // bit k: something begins at token t − 2 + k

    __device__ __forceinline__ uint4 load(int t) const {
        return t >= 0 && t < l.tokens ? *(const uint4 *)(x + (u64)t * d) : make_uint4(0, 0, 0, 0);
    }

    __device__ __forceinline__ Window(const u16 *x, Layout l, u64 row, int d, int begin) : x(x + row * l.tokens * d), l(l), document(l.document ? l.document + row * l.tokens : nullptr), d(d), next(begin - 2), cuts(0) {
        within = begin < 2 ? begin - 2 : (begin - 2) % l.chunk;
#pragma unroll
        for (int k = 0; k < TAPS; k++) near[k] = {};
#pragma unroll
        for (int k = 0; k < AHEAD; k++) ring[k] = load(next + k);
    }

    // One token on; `slot` is the count of calls before, modulo AHEAD.
    __device__ __forceinline__ void step(int slot) {
        const bool out = next >= l.tokens;
        const bool starts = within == 0 || out || (document && next > 0 && document[next] != document[next - 1]);
#pragma unroll
        for (int k = 0; k + 1 < TAPS; k++) near[k] = near[k + 1];
        near[TAPS - 1] = unpack(ring[slot]);
        ring[slot] = load(next + AHEAD);
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
    Window window(x + c, {document, tokens, chunk}, row, d, begin);
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

// partial[run of tokens, channel, k] = Σ_t du[t] x[t + k − 2].
extern "C" __global__ void conv_weight_grad(float *partial, const u16 *x, const u16 *du, const int *document, int tokens, int chunk, int d, int run) {
    const int c = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (c >= d) return;
    float w[TAPS][8] = {};
    const u64 row = blockIdx.z;
    const int begin = blockIdx.y * run, end = min(begin + run, tokens);
    Window window(x + c, {document, tokens, chunk}, row, d, begin);
    const u16 *g = du + row * tokens * d + c;
    auto load = [&](int t) { return t >= begin && t < end ? *(const uint4 *)(g + (u64)t * d) : make_uint4(0, 0, 0, 0); };
    uint4 ring[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) ring[k] = load(begin - 4 + k);
    for (int from = begin - 4; from < end; from += AHEAD) {
#pragma unroll
        for (int slot = 0; slot < AHEAD; slot++) {
            window.step(slot);
            const F8 v = unpack(ring[slot]); // zeros outside of the run
            ring[slot] = load(from + slot + AHEAD);
#pragma unroll
            for (int k = 0; k < TAPS; k++) {
                if (!window.sees(k)) continue;
#pragma unroll
                for (int j = 0; j < 8; j++) w[k][j] += v.v[j] * window.near[k].v[j];
            }
        }
    }
    const u64 group = row * gridDim.y + blockIdx.y;
    for (int k = 0; k < TAPS; k++)
        for (int j = 0; j < 8; j++) partial[(group * d + c + j) * TAPS + k] = w[k][j];
}
