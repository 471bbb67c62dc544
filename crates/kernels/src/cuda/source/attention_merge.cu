// Queries that see keys in two parts.

// The first tokens of x, with what they have from other keys. With l₁, l₂ the log-sum-exps of both parts:
// l = log(e^l₁ + e^l₂), x = x e^(l₁ − l) + more e^(l₂ − l). x: `row` elements between rows of [heads, 8 width] tokens,
// sums: `sums_row`, `sums_head` and `sums_token` between theirs; more: [B, tokens, heads, 8 width], of_more:
// [B, heads, tokens]. `lanes` neighbours of a warp, a power of two and at least `width`, take a head of a token:
// they all read its sum before one of them replaces it.
extern "C" __global__ void merged_tokens(u16 *x, float *sums, const u16 *more, const float *of_more, u64 places, int tokens, int heads, int width, int lanes, u64 row, u64 sums_row, u64 sums_head, u64 sums_token) {
    const u64 stride = (u64)gridDim.x * blockDim.x;
    const u32 lane = threadIdx.x % 32;
    // A warp stays together: its first thread says whether it goes on.
    for (u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x - lane; first < places * lanes; first += stride) {
        const u64 place = (first + lane) / lanes, part = (first + lane) % lanes;
        const u64 head = place % heads, t = place / heads % tokens, b = place / heads / tokens;
        const bool inside = place < places && part < width;
        float *sum = sums + b * sums_row + head * sums_head + t * sums_token;
        const float one = inside ? *sum : 0.f, two = inside ? of_more[(b * heads + head) * tokens + t] : 0.f;
        __syncwarp();
        if (!inside) continue;
        const float most = fmaxf(one, two), e1 = __expf(one - most), e2 = __expf(two - most), r = 1.f / (e1 + e2);
        u16 *to = x + b * row + ((t * heads + head) * width + part) * 8;
        const F8 p = load8(to), q = load8(more + (place * width + part) * 8);
        F8 both;
#pragma unroll
        for (int j = 0; j < 8; j++) both.v[j] = (p.v[j] * e1 + q.v[j] * e2) * r;
        store8(to, both);
        if (part == 0) *sum = most + __logf(e1 + e2);
    }
}

// x[b, i] += part[b, i], rounded once: tokens of `width` vectors, `row` and `token` elements apart.
extern "C" __global__ void added_tokens(u16 *x, const u16 *part, u64 vectors, int tokens, int width, u64 row, u64 token, u64 part_row, u64 part_token) {
    const u64 stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += stride) {
        const u64 place = i / width, b = place / tokens, t = place % tokens, at = i % width * 8;
        u16 *to = x + b * row + t * token + at;
        F8 sum = load8(to);
        const F8 more = load8(part + b * part_row + t * part_token + at);
#pragma unroll
        for (int j = 0; j < 8; j++) sum.v[j] += more.v[j];
        store8(to, sum);
    }
}
