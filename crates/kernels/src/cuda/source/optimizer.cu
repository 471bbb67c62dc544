// Flat AdamW and the sum of squares.

struct AdamW {
    float beta1, beta2, eps, lr, decay; // decay: 1 − lr λ
    float correction1, correction2;     // 1 − βᵗ
};

// With its fused products written out: left to the compiler, an element's last bit depends on whether it is
// read alone or in a vector.
__device__ __forceinline__ void adamw_one(float &w, float &m, float &v, float g, float decay, const AdamW &h) {
    m = fmaf(h.beta1, m, (1.f - h.beta1) * g);
    v = fmaf(h.beta2, v, (1.f - h.beta2) * g * g);
    w = fmaf(w, decay, -(h.lr * (m / h.correction1) / (sqrtf(v / h.correction2) + h.eps)));
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

// Halves of a weight: `ops/master.rs` says what they are.
__device__ __forceinline__ float join(u16 high, u16 low) {
    return __uint_as_float(((u32)high << 16) + (u32)(int)(short)low);
}

__device__ __forceinline__ u16 upper(float x) {
    const u32 bits = __float_as_uint(x);
    return x != x ? bits >> 16 | 0x40 : (bits + 0x8000u) >> 16;
}

__device__ __forceinline__ u16 lower(float x) {
    return (u16)__float_as_uint(x);
}

// Two elements of each half in a word.
__device__ __forceinline__ u32 two(u16 first, u16 second) {
    return first | (u32)second << 16;
}

// The weights before element `wide` are in `w`, the others, counted from there, in halves. Outputs may be the
// inputs. With keep[0] = 0 they are copied, whatever the gradient holds. Elements are those
// of `grad`, which need not begin with the first.
extern "C" __global__ void adamw(float *wo, u16 *ho, u16 *lo, float *mo, float *vo, const float *wi, const u16 *hi, const u16 *li, const float *mi, const float *vi, const __grid_constant__ Parts grad, const float *scale, const float *keep, u64 wide, u64 decay_begin, u64 decay_end, AdamW h) {
    const float factor = *scale;
    const bool apply = *keep != 0.f;
    const u64 stride = (u64)gridDim.x * blockDim.x, first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 n = grad.begin[grad.count];
    // Where halves begin between two vectors; else one element at a time, which small models alone need.
    const u64 n4 = (wide & 3) && wide < n ? grad.begin[0] / 4 : n / 4, wide4 = wide / 4;
    int p = 0;
    for (u64 i = grad.begin[0] / 4 + first; i < n4; i += stride) {
        p = grad.find(4 * i, p);
        const bool whole = 4 * i < wide;
        uint2 high = make_uint2(0, 0), low = high;
        float4 w, m = ((const float4 *)mi)[i], v = ((const float4 *)vi)[i];
        if (whole) {
            w = ((const float4 *)wi)[i];
        } else {
            high = ((const uint2 *)hi)[i - wide4], low = ((const uint2 *)li)[i - wide4];
            w = make_float4(join(high.x, low.x), join(high.x >> 16, low.x >> 16), join(high.y, low.y), join(high.y >> 16, low.y >> 16));
        }
        const float4 g = grad.four(i, p);
        if (apply) {
            float *ws = &w.x, *ms = &m.x, *vs = &v.x;
            const float gs[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u64 at = 4 * i + j;
                adamw_one(ws[j], ms[j], vs[j], gs[j] * factor, at >= decay_begin && at < decay_end ? h.decay : 1.f, h);
            }
            high = make_uint2(two(upper(w.x), upper(w.y)), two(upper(w.z), upper(w.w)));
            low = make_uint2(two(lower(w.x), lower(w.y)), two(lower(w.z), lower(w.w)));
        }
        ((float4 *)mo)[i] = m, ((float4 *)vo)[i] = v;
        if (whole) {
            ((float4 *)wo)[i] = w;
        } else {
            ((uint2 *)ho)[i - wide4] = high, ((uint2 *)lo)[i - wide4] = low;
        }
    }
    for (u64 i = 4 * n4 + first; i < n; i += stride) {
        p = grad.find(i, p);
        const bool whole = i < wide;
        float w = whole ? wi[i] : join(hi[i - wide], li[i - wide]), m = mi[i], v = vi[i];
        if (apply) adamw_one(w, m, v, grad.one(i, p) * factor, i >= decay_begin && i < decay_end ? h.decay : 1.f, h);
        mo[i] = m, vo[i] = v;
        if (whole) {
            wo[i] = w;
        } else {
            ho[i - wide] = upper(w), lo[i - wide] = lower(w);
        }
    }
}

// sum = x, or sum + x where `adds`: as many elements as x has, from its first on.
extern "C" __global__ void accumulate_parts(float *sum, const __grid_constant__ Parts x, int adds) {
    const u64 stride = (u64)gridDim.x * blockDim.x, first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 n = x.begin[x.count], n4 = n / 4;
    int p = 0;
#pragma unroll 4
    for (u64 i = x.begin[0] / 4 + first; i < n4; i += stride) {
        p = x.find(4 * i, p);
        float4 v = x.four(i, p), *to = (float4 *)sum + i;
        if (adds) {
            const float4 old = *to;
            v.x += old.x, v.y += old.y, v.z += old.z, v.w += old.w;
        }
        *to = v;
    }
    for (u64 i = 4 * n4 + first; i < n; i += stride) {
        const float v = x.one(i, x.count - 1);
        sum[i] = adds ? sum[i] + v : v;
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
