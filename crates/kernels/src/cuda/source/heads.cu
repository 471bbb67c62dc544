// Norm and rotation of query and key heads in rows [queries, keys, values] of (H + 2 G) E elements; `split`:
// in rows of queries, then rows of keys, then rows of values.
// E/8 lanes, a power of two, share a head, eight elements each; the other half of a rotated pair is
// E/16 lanes away. qkv, raw, dqkv: [rows, (H + 2 G) E] bf16; cosine, sine: [N, E/2] f32.

// A warp takes a row's heads in turn, 32 / lanes at once: the angles of the row and the gains stay in
// registers, and nothing is divided for a head. Warps share the rows of more than HEAD_STEPS times as many.
#define HEAD_STEPS 8
// Steps whose loads are issued together, as registers allow.
#define FORWARD_AHEAD 4
#define BACKWARD_AHEAD 2

struct Row {
    int heads, groups, size, lanes;
    int split;
    u64 rows, row;
    int first, end; // steps of this warp
    F8 cosine, sine;
    bool low;  // whether this lane holds the first of each pair

    // Where this lane's eight elements of head `head` are.
    __device__ __forceinline__ u64 at(int head) const {
        const int all = heads + 2 * groups, lane = threadIdx.x % lanes;
        u64 place = row * all + head;
        if (split) place = head < heads ? row * heads + head : rows * (head < heads + groups ? heads : heads + groups) + row * groups + (head < heads + groups ? head - heads : head - heads - groups);
        return place * size + 8 * lane;
    }

    // The head that this lane works on in a step.
    __device__ __forceinline__ int head(int step) const {
        return step * (32 / lanes) + threadIdx.x % 32 / lanes;
    }

    // Its eight elements of that step's head among the first `count`; else of head 0, which nobody uses.
    __device__ __forceinline__ uint4 load(const u16 *from, int step, int count) const {
        const int head = this->head(step);
        return *(const uint4 *)(from + at(head < count ? head : 0));
    }

    // sign 1: the rotation; −1: its transpose. Pairs change hands in bf16, as which they come.
    __device__ __forceinline__ F8 rotated(const uint4 &packed, float sign) const {
        uint4 there;
        there.x = __shfl_xor_sync(~0u, packed.x, lanes / 2), there.y = __shfl_xor_sync(~0u, packed.y, lanes / 2);
        there.z = __shfl_xor_sync(~0u, packed.z, lanes / 2), there.w = __shfl_xor_sync(~0u, packed.w, lanes / 2);
        const F8 x = unpack(packed), other = unpack(there);
        const float s = low ? -sign : sign;
        F8 r;
#pragma unroll
        for (int j = 0; j < 8; j++) r.v[j] = x.v[j] * cosine.v[j] + s * sine.v[j] * other.v[j];
        return r;
    }

    __device__ __forceinline__ float sum(float x) const {
        for (int d = lanes / 2; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
        return x;
    }
};

// Part `unit` of all the rows' parts.
__device__ __forceinline__ Row row_of(u64 unit, u64 rows, int split, int tokens, int heads, int groups, int size, const float *cosine, const float *sine) {
    Row r;
    r.heads = heads, r.groups = groups, r.size = size, r.lanes = size / 8, r.split = split, r.rows = rows;
    const int steps = ((heads + 2 * groups) * r.lanes + 31) / 32, parts = (steps + HEAD_STEPS - 1) / HEAD_STEPS;
    r.row = unit / parts;
    r.first = (int)(unit % parts) * HEAD_STEPS, r.end = min(r.first + HEAD_STEPS, steps);
    const int lane = threadIdx.x % r.lanes;
    const u64 table = r.row % tokens * (size / 2) + 8 * (lane % (r.lanes / 2));
    r.cosine = load8(cosine + table), r.sine = load8(sine + table);
    r.low = lane < r.lanes / 2;
    return r;
}

__device__ __forceinline__ u64 units_of(u64 rows, int all, int lanes) {
    const int steps = (all * lanes + 31) / 32;
    return rows * ((steps + HEAD_STEPS - 1) / HEAD_STEPS);
}

extern "C" __global__ void __launch_bounds__(256, 2) head_norm_rope(u16 *qkv, const u16 *raw, const void *q_gain, const void *k_gain, int gain_f32, const float *cosine, const float *sine, u64 rows, int split, int tokens, int heads, int groups, int size, float eps) {
    const int lanes = size / 8, all = heads + 2 * groups;
    const u64 own = threadIdx.x % lanes * 8;
    const F8 of_queries = load8_as(q_gain, own, gain_f32), of_keys = load8_as(k_gain, own, gain_f32);
    const u64 units = units_of(rows, heads + 2 * groups, lanes), warps = (u64)gridDim.x * (blockDim.x / 32);
    // The warp stays whole, since the shuffles need every lane.
    for (u64 unit = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; unit < units; unit += warps) {
        const Row row = row_of(unit, rows, split, tokens, heads, groups, size, cosine, sine);
        for (int step = row.first; step < row.end; step += FORWARD_AHEAD) {
            uint4 loaded[FORWARD_AHEAD];
#pragma unroll
            for (int i = 0; i < FORWARD_AHEAD; i++) loaded[i] = row.load(raw, step + i, all);
#pragma unroll
            for (int i = 0; i < FORWARD_AHEAD; i++) {
                const int head = row.head(step + i);
                const F8 x = unpack(loaded[i]);
                float s = 0.f;
#pragma unroll
                for (int j = 0; j < 8; j++) s += x.v[j] * x.v[j];
                const float r = rsqrtf(row.sum(s) * (1.f / size) + eps);
                F8 y;
#pragma unroll
                for (int j = 0; j < 8; j++) y.v[j] = x.v[j] * r * (head < heads ? of_queries.v[j] : of_keys.v[j]);
                // Rounded between norm and rotation, as the separate operations do.
                y = row.rotated(pack8(y), 1.f);
                if (step + i >= row.end || head >= all) continue;
                if (head < heads + groups) store8(qkv + row.at(head), y);
                else *(uint4 *)(qkv + row.at(head)) = loaded[i];
            }
        }
    }
}

// dqkv: in, the gradient of what attention saw; out, that of `raw`. partial[block] = [2, E] sums of the
// gains' gradients. With x̂ = x r and g the gradient before the rotation: dx = r (w g − x̂ mean(w g x̂)).
extern "C" __global__ void __launch_bounds__(256, 2) head_norm_rope_backward(u16 *dqkv, float *partial, const u16 *raw, const void *q_gain, const void *k_gain, int gain_f32, const float *cosine, const float *sine, u64 rows, int split, int tokens, int heads, int groups, int size, float eps) {
    __shared__ float sums[8][2][256]; // by warp
    const int lanes = size / 8, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 own = threadIdx.x % lanes * 8;
    const F8 of_queries = load8_as(q_gain, own, gain_f32), of_keys = load8_as(k_gain, own, gain_f32);
    F8 dq = {}, dk = {};
    const u64 units = units_of(rows, heads + 2 * groups, lanes), warps = (u64)gridDim.x * (blockDim.x / 32);
    // The warp stays whole, since the shuffles need every lane.
    for (u64 unit = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; unit < units; unit += warps) {
        const Row row = row_of(unit, rows, split, tokens, heads, groups, size, cosine, sine);
        // Values pass as they are.
        const int normed = heads + groups;
        for (int step = row.first; step < row.end; step += BACKWARD_AHEAD) {
            uint4 of_x[BACKWARD_AHEAD], of_g[BACKWARD_AHEAD];
#pragma unroll
            for (int i = 0; i < BACKWARD_AHEAD; i++) of_x[i] = row.load(raw, step + i, normed), of_g[i] = row.load(dqkv, step + i, normed);
#pragma unroll
            for (int i = 0; i < BACKWARD_AHEAD; i++) {
                const int head = row.head(step + i);
                const bool in = step + i < row.end && head < normed, query = head < heads;
                const F8 x = unpack(of_x[i]);
                F8 g = row.rotated(of_g[i], -1.f);
                float s = 0.f, t = 0.f;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    s += x.v[j] * x.v[j];
                    t += x.v[j] * g.v[j] * (query ? of_queries.v[j] : of_keys.v[j]);
                }
                const float r = rsqrtf(row.sum(s) * (1.f / size) + eps);
                const float along = r * r * r * row.sum(t) * (1.f / size);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float part = in ? g.v[j] * x.v[j] * r : 0.f;
                    if (query) dq.v[j] += part;
                    else dk.v[j] += part;
                    g.v[j] = r * g.v[j] * (query ? of_queries.v[j] : of_keys.v[j]) - x.v[j] * along;
                }
                if (in) store8(dqkv + row.at(head), g);
            }
        }
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
