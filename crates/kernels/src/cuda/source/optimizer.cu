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

// A gradient where its parts lie. Part p has the elements begin[p] .. begin[p + 1], a multiple of four the
// first; at[p] is null for zeros. Bit p of `narrow`: bf16, else f32.
#define PARTS 12

struct Parts {
    u64 begin[PARTS + 1], at[PARTS];
    u32 narrow;
    int count;

    // The part with element `at`, given an earlier one.
    __device__ __forceinline__ int find(u64 at, int p) const {
        while (p + 1 < count && at >= begin[p + 1]) p++;
        return p;
    }

    __device__ __forceinline__ float one(u64 i, int p) const {
        const u64 from = i - begin[p];
        if (!at[p]) return 0.f;
        return narrow >> p & 1 ? widen(((const u16 *)at[p])[from]) : ((const float *)at[p])[from];
    }

    // Elements 4 i .. 4 i + 3.
    __device__ __forceinline__ float4 four(u64 i, int p) const {
        const u64 from = i - begin[p] / 4;
        if (!at[p]) return make_float4(0.f, 0.f, 0.f, 0.f);
        if (!(narrow >> p & 1)) return ((const float4 *)at[p])[from];
        const uint2 x = ((const uint2 *)at[p])[from];
        return make_float4(__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u), __uint_as_float(x.y << 16), __uint_as_float(x.y & 0xffff0000u));
    }
};

// Outputs may be the inputs. With keep[0] = 0 they are copied, whatever the gradient holds. `copy`, if given,
// receives the weights in bf16. Elements are those of `grad`, which need not begin with the first.
extern "C" __global__ void adamw(float *wo, float *mo, float *vo, u16 *copy, const float *wi, const float *mi, const float *vi, const __grid_constant__ Parts grad, const float *scale, const float *keep, u64 decay_begin, u64 decay_end, AdamW h) {
    const float factor = *scale;
    const bool apply = *keep != 0.f;
    const u64 stride = (u64)gridDim.x * blockDim.x, first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 n = grad.begin[grad.count], n4 = n / 4;
    int p = 0;
    for (u64 i = grad.begin[0] / 4 + first; i < n4; i += stride) {
        p = grad.find(4 * i, p);
        float4 w = ((const float4 *)wi)[i], m = ((const float4 *)mi)[i], v = ((const float4 *)vi)[i];
        const float4 g = grad.four(i, p);
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
        if (apply) adamw_one(w, m, v, grad.one(i, grad.count - 1) * factor, i >= decay_begin && i < decay_end ? h.decay : 1.f, h);
        wo[i] = w, mo[i] = m, vo[i] = v;
        if (copy) copy[i] = narrow(w);
    }
}

// partial[block] = Σ x²; scaled_total or sum_partials adds the blocks.
extern "C" __global__ void square_sum(float *partial, const __grid_constant__ Parts x) {
    __shared__ float shared[32];
    const u64 stride = (u64)gridDim.x * blockDim.x, first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 n = x.begin[x.count], n4 = n / 4;
    int p = 0;
    float s = 0.f;
#pragma unroll 4
    for (u64 i = x.begin[0] / 4 + first; i < n4; i += stride) {
        p = x.find(4 * i, p);
        const float4 v = x.four(i, p);
        s += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    for (u64 i = 4 * n4 + first; i < n; i += stride) {
        const float v = x.one(i, x.count - 1);
        s += v * v;
    }
    s = block_sum(s, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = s;
}
