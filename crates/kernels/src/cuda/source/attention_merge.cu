// Queries that see keys in two parts, the second of them with its tokens turned round. A thread takes eight
// elements of one head.

// y[b, N − 1 − i] = x[b, i]; y: [B, N, width] dense, x: tokens of `width` vectors, `row` and `token` elements apart.
extern "C" __global__ void turned_tokens(u16 *y, const u16 *x, u64 vectors, int tokens, int width, u64 row, u64 token) {
    const u64 stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += stride) {
        const u64 place = i / width, b = place / tokens, t = tokens - 1 - place % tokens;
        *(uint4 *)(y + 8 * i) = *(const uint4 *)(x + b * row + t * token + i % width * 8);
    }
}

// With l₁, l₂ the log-sum-exps of both parts: l = log(e^l₁ + e^l₂), y = first e^(l₁ − l) + second e^(l₂ − l).
// y, second: [B, N, H, E] dense, first: the same with `row` and `token` elements between rows and tokens; of_both,
// of_first, of_second: [B, H, N]. `second` and `of_second` have the last token first. width = E/8.
extern "C" __global__ void attention_merged(u16 *y, float *of_both, const u16 *first, const float *of_first, const u16 *second, const float *of_second, u64 vectors, int tokens, int heads, int width, u64 row, u64 token) {
    const u64 stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += stride) {
        const u64 part = i % width, place = i / width, head = place % heads;
        const u64 t = place / heads % tokens, b = place / heads / tokens, back = tokens - 1 - t;
        const u64 sums = (b * heads + head) * tokens;
        const float one = of_first[sums + t], two = of_second[sums + back];
        const float most = fmaxf(one, two), e1 = __expf(one - most), e2 = __expf(two - most), r = 1.f / (e1 + e2);
        const F8 p = load8(first + b * row + t * token + (head * width + part) * 8);
        const F8 q = load8(second + (((b * tokens + back) * heads + head) * width + part) * 8);
        F8 both;
#pragma unroll
        for (int j = 0; j < 8; j++) both.v[j] = (p.v[j] * e1 + q.v[j] * e2) * r;
        store8(y + 8 * i, both);
        if (part == 0) of_both[sums + t] = most + __logf(e1 + e2);
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
