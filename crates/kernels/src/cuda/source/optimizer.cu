// Flat AdamW and the sum of squares.

struct AdamW {
    float beta1, beta2, eps, lr, decay; // decay: 1 − lr λ
    float correction1, correction2;     // 1 − βᵗ
};

__device__ __forceinline__ void adamw_one(float &w, float &m, float &v, float g, float decay, const AdamW &h) {
    m = h.beta1 * m + (1.f - h.beta1) * g;
    v = h.beta2 * v + (1.f - h.beta2) * g * g;
    w = w * decay - h.lr * (m / h.correction1) / (sqrtf(v / h.correction2) + h.eps);
}

// Elements of a gradient, f32 or bf16.
__device__ __forceinline__ float element(float x) {
    return x;
}

__device__ __forceinline__ float element(u16 x) {
    return widen(x);
}

// Four of them, number 4 i the first.
__device__ __forceinline__ float4 four(const float *x, u64 i) {
    return ((const float4 *)x)[i];
}

__device__ __forceinline__ float4 four(const u16 *x, u64 i) {
    const uint2 p = ((const uint2 *)x)[i];
    return make_float4(__uint_as_float(p.x << 16), __uint_as_float(p.x & 0xffff0000u), __uint_as_float(p.y << 16), __uint_as_float(p.y & 0xffff0000u));
}

// `grad` may be absent, which is zeros. Outputs may be the inputs. With keep[0] = 0 they are copied, whatever the gradient holds. `copy`, if
// given, receives the weights in bf16.
template <typename G>
__device__ __forceinline__ void adamw_all(float *wo, float *mo, float *vo, u16 *copy, const float *wi, const float *mi, const float *vi, const G *grad, const float *scale, const float *keep, u64 n, u64 decay_begin, u64 decay_end, const AdamW &h) {
    const float factor = *scale;
    const bool apply = *keep != 0.f;
    const u64 stride = (u64)gridDim.x * blockDim.x, first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 n4 = n / 4;
    for (u64 i = first; i < n4; i += stride) {
        float4 w = ((const float4 *)wi)[i], m = ((const float4 *)mi)[i], v = ((const float4 *)vi)[i];
        const float4 g = grad ? four(grad, i) : make_float4(0.f, 0.f, 0.f, 0.f);
        if (apply) {
            float *ws = &w.x, *ms = &m.x, *vs = &v.x;
            const float gs[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u64 at = 4 * i + j;
                adamw_one(ws[j], ms[j], vs[j], gs[j] * factor, at >= decay_begin && at < decay_end ? h.decay : 1.f, h);
            }
        }
        ((float4 *)wo)[i] = w, ((float4 *)mo)[i] = m, ((float4 *)vo)[i] = v;
        if (copy) ((uint2 *)copy)[i] = make_uint2(pack(w.x, w.y), pack(w.z, w.w));
    }
    for (u64 i = 4 * n4 + first; i < n; i += stride) {
        float w = wi[i], m = mi[i], v = vi[i];
        if (apply) adamw_one(w, m, v, grad ? element(grad[i]) * factor : 0.f, i >= decay_begin && i < decay_end ? h.decay : 1.f, h);
        wo[i] = w, mo[i] = m, vo[i] = v;
        if (copy) copy[i] = narrow(w);
    }
}

extern "C" __global__ void adamw(float *wo, float *mo, float *vo, u16 *copy, const float *wi, const float *mi, const float *vi, const float *grad, const float *scale, const float *keep, u64 n, u64 decay_begin, u64 decay_end, AdamW h) {
    adamw_all(wo, mo, vo, copy, wi, mi, vi, grad, scale, keep, n, decay_begin, decay_end, h);
}

extern "C" __global__ void adamw_narrow(float *wo, float *mo, float *vo, u16 *copy, const float *wi, const float *mi, const float *vi, const u16 *grad, const float *scale, const float *keep, u64 n, u64 decay_begin, u64 decay_end, AdamW h) {
    adamw_all(wo, mo, vo, copy, wi, mi, vi, grad, scale, keep, n, decay_begin, decay_end, h);
}

// Σ x² of the 16 bytes that are number i.
__device__ __forceinline__ float squares(const float *x, u64 i) {
    const float4 v = ((const float4 *)x)[i];
    return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
}

__device__ __forceinline__ float squares(const u16 *x, u64 i) {
    const F8 v = load8(x + 8 * i);
    float s = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) s += v.v[j] * v.v[j];
    return s;
}

template <typename G>
__device__ __forceinline__ void square_sum_all(float *partial, const G *x, u64 n) {
    __shared__ float shared[32];
    const u64 stride = (u64)gridDim.x * blockDim.x, first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 each = 16 / sizeof(G), vectors = n / each;
    float s = 0.f;
    for (u64 i = first; i < vectors; i += stride) s += squares(x, i);
    for (u64 i = vectors * each + first; i < n; i += stride) s += element(x[i]) * element(x[i]);
    s = block_sum(s, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = s;
}

// partial[block] = Σ x²; scaled_total or sum_partials adds the blocks.
extern "C" __global__ void square_sum(float *partial, const float *x, u64 n) {
    square_sum_all(partial, x, n);
}

extern "C" __global__ void square_sum_narrow(float *partial, const u16 *x, u64 n) {
    square_sum_all(partial, x, n);
}
