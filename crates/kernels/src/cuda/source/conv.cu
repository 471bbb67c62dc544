// The chunk-local depthwise convolution of TTT targets, five taps.
// x, u: [rows of a batch, N, D] bf16; weight: [D, 1, 5]; D a multiple of 8.
// document: for each token, where its document begins in the row; null where rows are one document.

#define TAPS 5
#define RUN 32 // tokens per thread

struct Layout {
    const int *document;
    int tokens, chunk;
};

// Whether tokens a and b of row `row` lie in one chunk of one document.
__device__ __forceinline__ bool together(const Layout &l, u64 row, int a, int b) {
    if (b < 0 || b >= l.tokens || a / l.chunk != b / l.chunk) return false;
    return !l.document || l.document[row * l.tokens + a] == l.document[row * l.tokens + b];
}

__device__ __forceinline__ float tap_weight(const void *w, int w_f32, int i) {
    return w_f32 ? ((const float *)w)[i] : widen(((const u16 *)w)[i]);
}

// out[t] = Σ_k w[k] x[t ± (k − 2)]: sign 1 the convolution, −1 its transpose.
extern "C" __global__ void conv_apply(u16 *out, const u16 *x, const void *weight, int w_f32, const int *document, int tokens, int chunk, int d, int sign) {
    const Layout l = {document, tokens, chunk};
    const int c = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (c >= d) return;
    float w[TAPS][8];
    for (int k = 0; k < TAPS; k++)
        for (int j = 0; j < 8; j++) w[k][j] = tap_weight(weight, w_f32, (c + j) * TAPS + k);
    const u64 row = blockIdx.z;
    const int begin = blockIdx.y * RUN, end = min(begin + RUN, tokens);
    for (int t = begin; t < end; t++) {
        F8 s = {};
#pragma unroll
        for (int k = 0; k < TAPS; k++) {
            const int o = t + sign * (k - TAPS / 2);
            if (!together(l, row, t, o)) continue;
            const F8 v = load8(x + (row * tokens + o) * d + c);
#pragma unroll
            for (int j = 0; j < 8; j++) s.v[j] += w[k][j] * v.v[j];
        }
        store8(out + (row * tokens + t) * d + c, s);
    }
}

// partial[run of tokens, channel, k] = Σ_t du[t] x[t + k − 2].
extern "C" __global__ void conv_weight_grad(float *partial, const u16 *x, const u16 *du, const int *document, int tokens, int chunk, int d, int run) {
    const Layout l = {document, tokens, chunk};
    const int c = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (c >= d) return;
    float w[TAPS][8] = {};
    const u64 row = blockIdx.z;
    const int begin = blockIdx.y * run, end = min(begin + run, tokens);
    for (int t = begin; t < end; t++) {
        const F8 g = load8(du + (row * tokens + t) * d + c);
#pragma unroll
        for (int k = 0; k < TAPS; k++) {
            const int o = t + k - TAPS / 2;
            if (!together(l, row, t, o)) continue;
            const F8 v = load8(x + (row * tokens + o) * d + c);
#pragma unroll
            for (int j = 0; j < 8; j++) w[k][j] += g.v[j] * v.v[j];
        }
    }
    const u64 group = row * gridDim.y + blockIdx.y;
    for (int k = 0; k < TAPS; k++)
        for (int j = 0; j < 8; j++) partial[(group * d + c + j) * TAPS + k] = w[k][j];
}
