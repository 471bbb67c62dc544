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

#define OWNED 32  // vocabulary rows of a block
#define LIST 1024 // tokens gathered before they are added

// dw[v] = Σ over tokens with ids[t] = v of dy[t], in token order: every block owns OWNED rows, scans
// all ids for them and adds in registers. dw: [V, D] f32, written whole. 256 threads.
extern "C" __global__ void embedding_backward(float *dw, const void *ids, int wide, const u16 *dy, int tokens, int vocab, int d) {
    __shared__ int list[LIST + 256]; // token · OWNED + row
    __shared__ int warp_count[8];
    __shared__ int used;
    const i64 first = (i64)blockIdx.x * OWNED;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    bool fresh = true;
    if (threadIdx.x == 0) used = 0;
    __syncthreads();
    for (int base = 0; base < tokens; base += 256) {
        const int t = base + threadIdx.x;
        i64 row = -1;
        if (t < tokens) row = (wide ? ((const i64 *)ids)[t] : (i64)((const int *)ids)[t]) - first;
        const bool mine = row >= 0 && row < OWNED;
        const u32 votes = __ballot_sync(~0u, mine);
        if (lane == 0) warp_count[warp] = __popc(votes);
        __syncthreads();
        int at = used;
        for (int i = 0; i < warp; i++) at += warp_count[i];
        if (mine) list[at + __popc(votes & ((1u << lane) - 1))] = t * OWNED + (int)row;
        __syncthreads();
        if (threadIdx.x == 0)
            for (int i = 0; i < 8; i++) used += warp_count[i];
        __syncthreads();
        const bool last = base + 256 >= tokens;
        if (used < LIST && !last) continue;
        const int count = used;
        for (int r = 0; r < OWNED && first + r < vocab; r++) {
            bool any = fresh;
            for (int i = 0; i < count && !any; i++) any = list[i] % OWNED == r;
            if (!any) continue;
            for (int c = 4 * threadIdx.x; c < d; c += 1024) {
                float4 *out = (float4 *)(dw + (first + r) * d + c);
                float4 s = fresh ? make_float4(0, 0, 0, 0) : *out;
                for (int i = 0; i < count; i++) {
                    if (list[i] % OWNED != r) continue;
                    const uint2 p = *(const uint2 *)(dy + (u64)(list[i] / OWNED) * d + c);
                    s.x += __uint_as_float(p.x << 16), s.y += __uint_as_float(p.x & 0xffff0000u);
                    s.z += __uint_as_float(p.y << 16), s.w += __uint_as_float(p.y & 0xffff0000u);
                }
                *out = s;
            }
        }
        fresh = false;
        __syncthreads();
        if (threadIdx.x == 0) used = 0;
        __syncthreads();
    }
}
