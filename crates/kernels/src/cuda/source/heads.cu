// Norm and rotation of query and key heads in rows [queries, keys, values] of (H + 2 G) E elements; `split`:
// in rows of queries, then rows of keys, then rows of values.
// E/8 lanes, a power of two, share a head, eight elements each; the other half of a rotated pair is
// E/16 lanes away. qkv, raw, dqkv: [rows, (H + 2 G) E] bf16; cosine, sine: [N, E/2] f32.

struct HeadAt {
    u64 at;      // of this lane's eight elements
    u64 table;   // of their angles
    int kind;    // 0 query, 1 key, 2 value
    bool low;    // whether this lane holds the first of each pair
};

__device__ __forceinline__ HeadAt head_at(u64 vector, u64 rows, int split, int tokens, int heads, int groups, int size) {
    const int lanes = size / 8, all = heads + 2 * groups;
    const int lane = (int)(vector % lanes);
    const u64 index = vector / lanes, row = index / all;
    const int head = (int)(index % all);
    HeadAt r;
    r.kind = head < heads ? 0 : head < heads + groups ? 1 : 2;
    u64 place = index;
    if (split) place = r.kind == 0 ? row * heads + head : rows * (heads + (r.kind - 1) * groups) + row * groups + (head - heads) % groups;
    r.at = place * size + 8 * lane;
    r.low = lane < lanes / 2;
    r.table = row % tokens * (size / 2) + 8 * (lane % (lanes / 2));
    return r;
}

__device__ __forceinline__ float lanes_sum(float x, int lanes) {
    for (int d = lanes / 2; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
    return x;
}

// sign 1: the rotation; −1: its transpose.
__device__ __forceinline__ F8 rotated(const F8 &x, const HeadAt &h, const float *cosine, const float *sine, float sign, int lanes) {
    const F8 c = load8(cosine + h.table), s = load8(sine + h.table);
    F8 r;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float other = __shfl_xor_sync(~0u, x.v[j], lanes / 2);
        r.v[j] = x.v[j] * c.v[j] + (h.low ? -sign : sign) * s.v[j] * other;
    }
    return r;
}

// A grid-stride loop whose warps stay whole: the shuffles need every lane.
#define FOR_HEADS(vector, vectors)                                                         \
    const u64 stride_ = (u64)gridDim.x * blockDim.x;                                       \
    for (u64 vector = (u64)blockIdx.x * blockDim.x + threadIdx.x; vector - threadIdx.x % 32 < vectors; vector += stride_)

extern "C" __global__ void head_norm_rope(u16 *qkv, const u16 *raw, const void *q_gain, const void *k_gain, int gain_f32, const float *cosine, const float *sine, u64 rows, int split, int tokens, int heads, int groups, int size, float eps) {
    const int lanes = size / 8;
    const u64 vectors = rows * (heads + 2 * groups) * lanes;
    FOR_HEADS(i, vectors) {
        const bool in = i < vectors;
        const HeadAt h = head_at(in ? i : 0, rows, split, tokens, heads, groups, size);
        const F8 x = load8(raw + h.at);
        float s = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) s += x.v[j] * x.v[j];
        const float r = rsqrtf(lanes_sum(s, lanes) / size + eps);
        const F8 gain = load8_as(h.kind == 0 ? q_gain : k_gain, i % lanes * 8, gain_f32);
        F8 y;
        // Rounded between norm and rotation, as the separate operations do.
#pragma unroll
        for (int j = 0; j < 8; j++) y.v[j] = widen(narrow(x.v[j] * r * gain.v[j]));
        y = rotated(y, h, cosine, sine, 1.f, lanes);
        if (in) store8(qkv + h.at, h.kind == 2 ? x : y);
    }
}

// dqkv: in, the gradient of what attention saw; out, that of `raw`. partial[block] = [2, E] sums of the
// gains' gradients. With x̂ = x r and g the gradient before the rotation: dx = r (w g − x̂ mean(w g x̂)).
extern "C" __global__ void head_norm_rope_backward(u16 *dqkv, float *partial, const u16 *raw, const void *q_gain, const void *k_gain, int gain_f32, const float *cosine, const float *sine, u64 rows, int split, int tokens, int heads, int groups, int size, float eps) {
    __shared__ float sums[8][2][256]; // by warp
    const int lanes = size / 8, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 vectors = rows * (heads + 2 * groups) * lanes;
    F8 dq = {}, dk = {};
    FOR_HEADS(i, vectors) {
        const bool in = i < vectors;
        const HeadAt h = head_at(in ? i : 0, rows, split, tokens, heads, groups, size);
        const F8 x = load8(raw + h.at);
        F8 g = rotated(load8(dqkv + h.at), h, cosine, sine, -1.f, lanes);
        const F8 gain = load8_as(h.kind == 0 ? q_gain : k_gain, i % lanes * 8, gain_f32);
        float s = 0.f, t = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) s += x.v[j] * x.v[j], t += x.v[j] * g.v[j] * gain.v[j];
        const float r = rsqrtf(lanes_sum(s, lanes) / size + eps);
        const float along = r * r * r * lanes_sum(t, lanes) / size;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float part = in ? g.v[j] * x.v[j] * r : 0.f;
            if (h.kind == 0) dq.v[j] += part;
            if (h.kind == 1) dk.v[j] += part;
            g.v[j] = r * g.v[j] * gain.v[j] - x.v[j] * along;
        }
        if (in && h.kind != 2) store8(dqkv + h.at, g);
    }
    // Heads of a warp, then warps of the block, in a fixed order.
#pragma unroll
    for (int j = 0; j < 8; j++) {
        for (int d = lanes; d < 32; d <<= 1) {
            dq.v[j] += __shfl_xor_sync(~0u, dq.v[j], d);
            dk.v[j] += __shfl_xor_sync(~0u, dk.v[j], d);
        }
        if (lane < lanes) {
            sums[warp][0][8 * lane + j] = dq.v[j];
            sums[warp][1][8 * lane + j] = dk.v[j];
        }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < 2 * size; c += blockDim.x) {
        float total = 0.f;
        for (int w = 0; w < blockDim.x / 32; w++) total += sums[w][c / size][c % size];
        partial[(u64)blockIdx.x * 2 * size + c] = total;
    }
}
