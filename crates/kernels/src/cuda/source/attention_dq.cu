// The gradient of attention's queries, summed in a fixed order: what the deterministic mode takes in place of
// cuDNN's, which adds parts of dq in whatever order they come.
//
//     dq[i] = scale · Σ_j P[i,j] (dy[i]·v[j] − δ[i]) k[j],  P[i,j] = exp(scale q[i]·k[j] − lse[i])
//
// A block takes 64 queries of one head, a warp 16 of them, and walks the keys that they see from first to last.
// Products are m16n8k16 on tensor cores: q, dy, dq in registers, k and v in shared memory with their 16-byte parts
// permuted by row, so that ldmatrix meets no bank twice. In a fragment, lane 4 g + t holds rows g and g + 8 at
// columns 2 t and 2 t + 1.

#define DQ_ROWS 64
#define DQ_KEYS 64

// d += a b: a [16, 16], b [16, 8], d [16, 8].
__device__ __forceinline__ void mma_bf16(float *d, const u32 *a, const u32 *b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 × 8 matrices; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 *r, const uint4 *row) {
    const u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// The same, transposed.
__device__ __forceinline__ void load_transposed(u32 *r, const uint4 *row) {
    const u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// The first key of query i's document, from the ascending first tokens of all documents of the batch, H times each.
__device__ __forceinline__ int document_start(const int *starts, int documents, int heads, int row, int tokens, int i) {
    int low = 0, high = documents;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (starts[middle] <= (row * tokens + i) * heads) low = middle;
        else high = middle;
    }
    return documents ? starts[low] / heads - row * tokens : 0;
}

// q, dy, dq: [B, N, H, size]; k, v: [B, S, G, size], with q_row, dq_row and k_row elements between neighbouring tokens of
// q, of dq, of k and v. Query i sees keys from i − window + 1 to i + ahead. Whole rows have no documents, and lse, δ:
// [B, H, N]; packed ones have [B, N, H].
// E: size rounded up to 64 or 128. 128 threads.
template <int E>
__device__ __forceinline__ void attention_dq(u16 *dq, const u16 *q, const u16 *k, const u16 *v, const u16 *dy, const float *lse,
                                             const float *delta, const int *starts, int documents, int queries, int keys, int heads,
                                             int groups, int size, int q_row, int dq_row, int k_row, int window, int ahead,
                                             float scale) {
    constexpr int PARTS = E / 8;
    __shared__ uint4 ks[DQ_KEYS * PARTS], vs[DQ_KEYS * PARTS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int head = blockIdx.y, group = head / (heads / groups), b = blockIdx.z;
    // Late queries see most where attention is causal: they begin first.
    const int block = DQ_ROWS * (gridDim.x - 1 - blockIdx.x), i0 = block + 16 * warp + g;
    const float log2e = 1.4426950408889634f;

    u32 aq[E / 16][4], ady[E / 16][4];
    float sum[E / 8][4], top[2], d[2];
    int first[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int i = i0 + 8 * r;
        const bool inside = i < queries;
        const u64 token = (u64)b * queries + i, at = token * q_row + head * size, dense = (token * heads + head) * size;
#pragma unroll
        for (int s = 0; s < E / 16; s++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int e = 16 * s + 8 * half + 2 * t;
                aq[s][r + 2 * half] = inside && e < size ? *(const u32 *)(q + at + e) : 0;
                ady[s][r + 2 * half] = inside && e < size ? *(const u32 *)(dy + dense + e) : 0;
            }
        const u64 one = documents ? token * heads + head : ((u64)b * heads + head) * queries + i;
        top[r] = inside ? lse[one] * log2e : 0.f;
        d[r] = inside ? delta[one] : 0.f;
        const int start = document_start(starts, documents, heads, b, queries, min(i, queries - 1));
        first[r] = max(start, i - window + 1);
    }
#pragma unroll
    for (int n = 0; n < E / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) sum[n][c] = 0.f;

    const int begin = max(document_start(starts, documents, heads, b, queries, block), block - window + 1);
    const int end = min(min(block + DQ_ROWS, queries) + ahead, keys);
    for (int j0 = begin / DQ_KEYS * DQ_KEYS; j0 < end; j0 += DQ_KEYS) {
        __syncthreads(); // the last tile has been read
        for (int c = threadIdx.x; c < DQ_KEYS * PARTS; c += 128) {
            const int key = c / PARTS, part = c % PARTS, to = key * PARTS + (part ^ (key & 7));
            const bool inside = j0 + key < keys && 8 * part < size;
            const u64 at = ((u64)b * keys + j0 + key) * k_row + group * size + 8 * part;
            ks[to] = inside ? *(const uint4 *)(k + at) : make_uint4(0, 0, 0, 0);
            vs[to] = inside ? *(const uint4 *)(v + at) : make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < DQ_KEYS; kk += 16) {
            float s[2][4] = {}, dp[2][4] = {};
            const int key = kk + lane / 16 * 8 + lane % 8;
#pragma unroll
            for (int e = 0; e < E / 16; e++) {
                const int part = (2 * e + lane / 8 % 2) ^ (key & 7);
                u32 bk[4], bv[4];
                load_matrices(bk, ks + key * PARTS + part);
                load_matrices(bv, vs + key * PARTS + part);
                mma_bf16(s[0], aq[e], bk), mma_bf16(s[1], aq[e], bk + 2);
                mma_bf16(dp[0], ady[e], bv), mma_bf16(dp[1], ady[e], bv + 2);
            }
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int r = c / 2, j = j0 + kk + 8 * n + 2 * t + c % 2;
                    const bool seen = j >= first[r] && j <= i0 + 8 * r + ahead && j < keys;
                    s[n][c] = seen ? exp2f(s[n][c] * scale * log2e - top[r]) * (dp[n][c] - d[r]) : 0.f;
                }
            const u32 a[4] = {pack(s[0][0], s[0][1]), pack(s[0][2], s[0][3]), pack(s[1][0], s[1][1]), pack(s[1][2], s[1][3])};
            const int row = kk + lane % 16;
#pragma unroll
            for (int n = 0; n < E / 16; n++) {
                u32 bk[4];
                load_transposed(bk, ks + row * PARTS + ((2 * n + lane / 16) ^ (row & 7)));
                mma_bf16(sum[2 * n], a, bk), mma_bf16(sum[2 * n + 1], a, bk + 2);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int i = i0 + 8 * r;
        if (i >= queries) continue;
        const u64 at = ((u64)b * queries + i) * dq_row + head * size;
#pragma unroll
        for (int n = 0; n < E / 8; n++) {
            const int e = 8 * n + 2 * t;
            if (e < size) *(u32 *)(dq + at + e) = pack(scale * sum[n][2 * r], scale * sum[n][2 * r + 1]);
        }
    }
}

#define DQ_KERNEL(E)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(128)                                                                             \
        attention_dq_##E(u16 *dq, const u16 *q, const u16 *k, const u16 *v, const u16 *dy, const float *lse, const float *delta,  \
                         const int *starts, int documents, int queries, int keys, int heads, int groups, int size, int q_row,     \
                         int dq_row, int k_row, int window, int ahead, float scale) {                                             \
        attention_dq<E>(dq, q, k, v, dy, lse, delta, starts, documents, queries, keys, heads, groups, size, q_row, dq_row, k_row, \
                        window, ahead, scale);                                                                                    \
    }
DQ_KERNEL(64)
DQ_KERNEL(128)
