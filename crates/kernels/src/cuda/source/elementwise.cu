// SwiGLU, rotary embedding, sums. n8: vectors of eight elements; what is left is done singly.

// The reciprocal is the hardware's, good to one unit in the last place; e^−x may be infinite.
__device__ __forceinline__ float sigmoid(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.f + __expf(-x)));
    return r;
}

extern "C" __global__ void swiglu_forward(u16 *z, const u16 *gate, const u16 *up, u64 n8, u64 n) {
    const u64 stride = (u64)gridDim.x * blockDim.x, first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (u64 i = first; i < n8; i += stride) {
        const F8 g = load8(gate + 8 * i), u = load8(up + 8 * i);
        F8 r;
#pragma unroll
        for (int j = 0; j < 8; j++) r.v[j] = g.v[j] * sigmoid(g.v[j]) * u.v[j];
        store8(z + 8 * i, r);
    }
    for (u64 i = 8 * n8 + first; i < n; i += stride) {
        const float g = widen(gate[i]);
        z[i] = narrow(g * sigmoid(g) * widen(up[i]));
    }
}

__device__ __forceinline__ void swiglu_slope(float g, float u, float dz, float &dg, float &du) {
    const float s = sigmoid(g), silu = g * s;
    dg = dz * u * (s + silu * (1.f - s));
    du = dz * silu;
}

// The gradients, and z again.
__device__ __forceinline__ void swiglu_all(const F8 &g, const F8 &u, const F8 &dz, F8 &dg, F8 &du, F8 &z) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float s = sigmoid(g.v[j]), silu = g.v[j] * s;
        z.v[j] = silu * u.v[j];
        du.v[j] = dz.v[j] * silu;
        dg.v[j] = dz.v[j] * u.v[j] * (s + silu * (1.f - s));
    }
}

extern "C" __global__ void swiglu_backward(u16 *dgate, u16 *dup, const u16 *gate, const u16 *up, const u16 *dz, u64 n8, u64 n) {
    const u64 stride = (u64)gridDim.x * blockDim.x, first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (u64 i = first; i < n8; i += stride) {
        const F8 g = load8(gate + 8 * i), u = load8(up + 8 * i), d = load8(dz + 8 * i);
        F8 a, b;
#pragma unroll
        for (int j = 0; j < 8; j++) swiglu_slope(g.v[j], u.v[j], d.v[j], a.v[j], b.v[j]);
        store8(dgate + 8 * i, a);
        store8(dup + 8 * i, b);
    }
    for (u64 i = 8 * n8 + first; i < n; i += stride) {
        float a, b;
        swiglu_slope(widen(gate[i]), widen(up[i]), widen(dz[i]), a, b);
        dgate[i] = narrow(a);
        dup[i] = narrow(b);
    }
}

// gu: [T, 2F], gate beside up; z: [T, F]; F a multiple of 8, `vectors` = T F / 8.
extern "C" __global__ void swiglu_pair_forward(u16 *z, const u16 *gu, u64 vectors, int f) {
    const u64 stride = (u64)gridDim.x * blockDim.x;
    const int per_row = f / 8;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += stride) {
        const u16 *gate = gu + i / per_row * 2 * f + i % per_row * 8;
        const F8 g = load8(gate), u = load8(gate + f);
        F8 r;
#pragma unroll
        for (int j = 0; j < 8; j++) r.v[j] = g.v[j] * sigmoid(g.v[j]) * u.v[j];
        store8(z + 8 * i, r);
    }
}

// dgu from gu and dz; z is made again where it is asked for. dgu may be gu, z may be dz.
extern "C" __global__ void swiglu_pair_backward(u16 *dgu, u16 *z, const u16 *gu, const u16 *dz, u64 vectors, int f) {
    const u64 stride = (u64)gridDim.x * blockDim.x;
    const int per_row = f / 8;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += stride) {
        const u64 at = i / per_row * 2 * f + i % per_row * 8;
        const F8 g = load8(gu + at), u = load8(gu + at + f), d = load8(dz + 8 * i);
        F8 a, b, r;
        swiglu_all(g, u, d, a, b, r);
        store8(dgu + at, a);
        store8(dgu + at + f, b);
        if (z) store8(z + 8 * i, r);
    }
}

// Channel pairs (a, b) turned by angles of cosine c and sine s. The operations are named one by one, so that it
// comes out alike wherever it is done.
__device__ __forceinline__ void turn(const F8 &a, const F8 &b, const F8 &c, const F8 &s, F8 &p, F8 &q) {
#pragma unroll
    for (int k = 0; k < 8; k++) {
        p.v[k] = __fmaf_rn(a.v[k], c.v[k], -__fmul_rn(b.v[k], s.v[k]));
        q.v[k] = __fmaf_rn(b.v[k], c.v[k], __fmul_rn(a.v[k], s.v[k]));
    }
}

// The first `heads` heads of rows of `row` elements, x, y: [B, N, row] bf16, y may be x; cosine, sine:
// [N, E/2] f32. Eight channel pairs per thread; E/2 a multiple of 8.
extern "C" __global__ void rope(u16 *y, const u16 *x, const float *cosine, const float *sine, u64 vectors, int tokens, int heads, int half, int row, float sign) {
    const u64 stride = (u64)gridDim.x * blockDim.x;
    const int per_head = half / 8;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += stride) {
        const int j = (int)(i % per_head) * 8;
        const u64 head = i / per_head, place = head / heads;
        const u64 token = place % tokens;
        const u64 at = place * row + head % heads * 2 * half + j;
        const F8 a = load8(x + at), b = load8(x + at + half);
        const F8 c = load8(cosine + token * half + j);
        F8 s = load8(sine + token * half + j), p, q;
#pragma unroll
        for (int k = 0; k < 8; k++) s.v[k] *= sign;
        turn(a, b, c, s, p, q);
        store8(y + at, p);
        store8(y + at + half, q);
    }
}

// sum = x, or sum + x where `adds`; x f32 or bf16.
extern "C" __global__ void accumulate(float *sum, const void *x, int x_f32, int adds, u64 n8, u64 n) {
    const u64 stride = (u64)gridDim.x * blockDim.x, first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (u64 i = first; i < n8; i += stride) {
        F8 v = load8_as(x, 8 * i, x_f32);
        if (adds) {
            const F8 old = load8(sum + 8 * i);
#pragma unroll
            for (int j = 0; j < 8; j++) v.v[j] += old.v[j];
        }
        store8(sum + 8 * i, v);
    }
    for (u64 i = 8 * n8 + first; i < n; i += stride) {
        const float v = x_f32 ? ((const float *)x)[i] : widen(((const u16 *)x)[i]);
        sum[i] = adds ? sum[i] + v : v;
    }
}

// Does not end before somebody sets *go, which nobody does.
extern "C" __global__ void stall(const volatile u32 *go) {
    while (!*go) __nanosleep(100000);
}
