// RMSNorm. x, y, dx, dy: [rows, K] bf16, K a multiple of 8 and at most 8192.
//
// A group of threads, eight columns each, walks over rows: the whole block where K > 256, else one
// warp of it. The row stays in registers between the statistic and the result.

template <bool WARP> __device__ __forceinline__ float group_sum(float x, float *shared) {
    return WARP ? warp_sum(x) : block_sum(x, shared);
}

template <bool WARP>
__device__ void norm_forward(u16 *y, const u16 *x, const void *w, int w_f32, int rows, int k, float eps) {
    __shared__ float shared[32];
    const int per_block = WARP ? blockDim.x / 32 : 1;
    const int group = blockIdx.x * per_block + (WARP ? threadIdx.x / 32 : 0), groups = gridDim.x * per_block;
    const int c = 8 * (WARP ? threadIdx.x % 32 : threadIdx.x);
    const bool in = c < k;
    F8 gain = {};
    if (in) gain = load8_as(w, c, w_f32);
    for (int row = group; row < rows; row += groups) {
        F8 v = {};
        if (in) v = load8(x + (u64)row * k + c);
        float s = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) s += v.v[j] * v.v[j];
        const float r = rsqrtf(group_sum<WARP>(s, shared) / k + eps);
#pragma unroll
        for (int j = 0; j < 8; j++) v.v[j] *= r * gain.v[j];
        if (in) store8(y + (u64)row * k + c, v);
    }
}

extern "C" __global__ void rms_norm_forward_warp(u16 *y, const u16 *x, const void *w, int w_f32, int rows, int k, float eps) {
    norm_forward<true>(y, x, w, w_f32, rows, k, eps);
}

extern "C" __global__ void rms_norm_forward_block(u16 *y, const u16 *x, const void *w, int w_f32, int rows, int k, float eps) {
    norm_forward<false>(y, x, w, w_f32, rows, k, eps);
}

// With x̂ = x r: dx = r (w dy − x̂ mean(w dy x̂)), plus `residual` if given; partial[group] = Σ over the
// group's rows of dy x̂. With `y`, the forward's result is written again.
template <bool WARP>
__device__ void norm_backward(u16 *dx, u16 *y, float *partial, const u16 *x, const void *w, int w_f32, const u16 *dy, const u16 *residual, int rows, int k, float eps) {
    __shared__ float shared[64];
    const int per_block = WARP ? blockDim.x / 32 : 1;
    const int group = blockIdx.x * per_block + (WARP ? threadIdx.x / 32 : 0), groups = gridDim.x * per_block;
    const int c = 8 * (WARP ? threadIdx.x % 32 : threadIdx.x);
    const bool in = c < k;
    F8 gain = {}, sum = {};
    if (in) gain = load8_as(w, c, w_f32);
    for (int row = group; row < rows; row += groups) {
        const u64 at = (u64)row * k + c;
        F8 v = {}, d = {}, add = {};
        if (in) v = load8(x + at), d = load8(dy + at);
        if (in && residual) add = load8(residual + at);
        float s = 0.f, t = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) s += v.v[j] * v.v[j], t += v.v[j] * d.v[j] * gain.v[j];
        const float2 both = WARP ? make_float2(warp_sum(s), warp_sum(t)) : block_sum2(s, t, shared);
        const float r = rsqrtf(both.x / k + eps);
        const float along = r * r * r * both.y / k;
        F8 g, n;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sum.v[j] += d.v[j] * v.v[j] * r;
            g.v[j] = r * d.v[j] * gain.v[j] - v.v[j] * along + add.v[j];
            n.v[j] = v.v[j] * (r * gain.v[j]);
        }
        if (in) store8(dx + at, g);
        if (in && y) store8(y + at, n);
    }
    if (in) store8(partial + (u64)group * k + c, sum);
}

extern "C" __global__ void rms_norm_backward_warp(u16 *dx, u16 *y, float *partial, const u16 *x, const void *w, int w_f32, const u16 *dy, const u16 *residual, int rows, int k, float eps) {
    norm_backward<true>(dx, y, partial, x, w, w_f32, dy, residual, rows, k, eps);
}

extern "C" __global__ void __launch_bounds__(512) rms_norm_backward_block(u16 *dx, u16 *y, float *partial, const u16 *x, const void *w, int w_f32, const u16 *dy, const u16 *residual, int rows, int k, float eps) {
    norm_backward<false>(dx, y, partial, x, w, w_f32, dy, residual, rows, k, eps);
}

// For rows that take more than 512 threads: fewer registers each, or no block would fit.
extern "C" __global__ void __launch_bounds__(1024) rms_norm_backward_wide(u16 *dx, u16 *y, float *partial, const u16 *x, const void *w, int w_f32, const u16 *dy, const u16 *residual, int rows, int k, float eps) {
    norm_backward<false>(dx, y, partial, x, w, w_f32, dy, residual, rows, k, eps);
}
