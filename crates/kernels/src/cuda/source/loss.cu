// Softmax cross-entropy of one slice of logits [rows, V] bf16, one block per row.
// loss[row] = lse − logit[label], 0 without a label (label < 0). Where `with_grad`, the logits are
// replaced by scale · (softmax − onehot), 0 in rows without a label.

__device__ __forceinline__ i64 label_of(const void *labels, int wide, int row) {
    return wide ? ((const i64 *)labels)[row] : (i64)((const int *)labels)[row];
}

extern "C" __global__ void cross_entropy(float *loss, u16 *logits, const void *labels, int wide, int vocab, float scale, int with_grad) {
    __shared__ float shared[32];
    const int row = blockIdx.x;
    u16 *z = logits + (u64)row * vocab;
    const i64 label = label_of(labels, wide, row);
    const bool vector = vocab % 8 == 0;
    const int n8 = vector ? vocab / 8 : 0;
    if (label < 0) {
        if (threadIdx.x == 0) loss[row] = 0.f;
        if (with_grad) {
            for (int i = threadIdx.x; i < n8; i += blockDim.x) ((uint4 *)z)[i] = make_uint4(0, 0, 0, 0);
            for (int i = 8 * n8 + threadIdx.x; i < vocab; i += blockDim.x) z[i] = 0;
        }
        return;
    }
    const float target = widen(z[label]);
    // Maximum and sum in one pass: the sum is rescaled when the maximum moves.
    float top = __int_as_float(0xff800000), sum = 0.f;
    for (int i = threadIdx.x; i < n8; i += blockDim.x) {
        const F8 v = load8(z + 8 * i);
        float m = top;
#pragma unroll
        for (int j = 0; j < 8; j++) m = fmaxf(m, v.v[j]);
        float s = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) s += __expf(v.v[j] - m);
        sum = sum * __expf(top - m) + s;
        top = m;
    }
    for (int i = 8 * n8 + threadIdx.x; i < vocab; i += blockDim.x) {
        const float v = widen(z[i]), m = fmaxf(top, v);
        sum = sum * __expf(top - m) + __expf(v - m);
        top = m;
    }
    const float most = block_max(top, shared);
    // A thread without elements has top = −inf and sum = 0.
    sum = sum == 0.f ? 0.f : sum * __expf(top - most);
    const float total = block_sum(sum, shared);
    if (threadIdx.x == 0) loss[row] = most + __logf(total) - target;
    if (!with_grad) return;
    __syncthreads(); // every thread has read z[label]
    const float factor = scale / total;
    for (int i = threadIdx.x; i < n8; i += blockDim.x) {
        F8 v = load8(z + 8 * i);
#pragma unroll
        for (int j = 0; j < 8; j++) v.v[j] = __expf(v.v[j] - most) * factor - (8 * i + j == label ? scale : 0.f);
        store8(z + 8 * i, v);
    }
    for (int i = 8 * n8 + threadIdx.x; i < vocab; i += blockDim.x)
        z[i] = narrow(__expf(widen(z[i]) - most) * factor - (i == label ? scale : 0.f));
}

// out[0] = scale · Σ x. One block, so that the order of the sum is fixed.
extern "C" __global__ void scaled_total(float *out, const float *x, int n, float scale) {
    __shared__ float shared[32];
    float s = 0.f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) s += x[i];
    s = block_sum(s, shared);
    if (threadIdx.x == 0) out[0] = scale * s;
}
