// What every kernel source begins with. No headers: NVRTC then needs no CUDA installation.
// Vectors are eight bf16 in 16 bytes; sums are f32.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct F8 {
    float v[8];
};

__device__ __forceinline__ float widen(u16 x) {
    return __uint_as_float((u32)x << 16);
}

// Two floats to bf16 pairs, round to nearest even; `low` lands at the lower address.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ u16 narrow(float x) {
    return (u16)pack(x, 0.f);
}

__device__ __forceinline__ F8 unpack(uint4 p) {
    F8 r;
    const u32 w[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        r.v[2 * i] = __uint_as_float(w[i] << 16);
        r.v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
    return r;
}

__device__ __forceinline__ F8 load8(const u16 *p) {
    return unpack(*(const uint4 *)p);
}

__device__ __forceinline__ F8 load8(const float *p) {
    F8 r;
    const float4 a = ((const float4 *)p)[0], b = ((const float4 *)p)[1];
    r.v[0] = a.x, r.v[1] = a.y, r.v[2] = a.z, r.v[3] = a.w;
    r.v[4] = b.x, r.v[5] = b.y, r.v[6] = b.z, r.v[7] = b.w;
    return r;
}

__device__ __forceinline__ uint4 pack8(const F8 &x) {
    return make_uint4(pack(x.v[0], x.v[1]), pack(x.v[2], x.v[3]), pack(x.v[4], x.v[5]), pack(x.v[6], x.v[7]));
}

__device__ __forceinline__ void store8(u16 *p, const F8 &x) {
    *(uint4 *)p = pack8(x);
}

__device__ __forceinline__ void store8(float *p, const F8 &x) {
    ((float4 *)p)[0] = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    ((float4 *)p)[1] = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}

// A gain or weight whose precision is known at run time.
__device__ __forceinline__ F8 load8_as(const void *p, u64 at, int is_f32) {
    return is_f32 ? load8((const float *)p + at) : load8((const u16 *)p + at);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = 16; d; d >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
    return x;
}

// The sum over a block, the same in every thread and in every run. `shared`: 32 floats.
__device__ __forceinline__ float block_sum(float x, float *shared) {
    const int warps = (blockDim.x + 31) / 32;
    x = warp_sum(x);
    if (warps == 1) return x;
    __syncthreads(); // an earlier use of `shared`
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0.f;
    for (int i = 0; i < warps; i++) total += shared[i];
    return total;
}

// Two sums at once. `shared`: 64 floats.
__device__ __forceinline__ float2 block_sum2(float x, float y, float *shared) {
    const int warps = (blockDim.x + 31) / 32;
    x = warp_sum(x), y = warp_sum(y);
    if (warps == 1) return make_float2(x, y);
    __syncthreads(); // an earlier use of `shared`
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x, shared[32 + threadIdx.x / 32] = y;
    __syncthreads();
    float2 total = make_float2(0.f, 0.f);
    for (int i = 0; i < warps; i++) total.x += shared[i], total.y += shared[32 + i];
    return total;
}

__device__ __forceinline__ float block_max(float x, float *shared) {
    const int warps = (blockDim.x + 31) / 32;
    x = warp_max(x);
    if (warps == 1) return x;
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float top = shared[0];
    for (int i = 1; i < warps; i++) top = fmaxf(top, shared[i]);
    return top;
}

// out[c] = Σ_g partial[g, c]: the second half of every reduction over rows. One warp per 32 columns
// and 8 warps over the groups; the order of the sum is fixed.
extern "C" __global__ void sum_partials(float *out, const float *partial, int groups, int columns) {
    __shared__ float sums[8][33];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int c = blockIdx.x * 32 + lane;
    float s = 0.f;
    if (c < columns)
        for (int g = warp; g < groups; g += 8) s += partial[(u64)g * columns + c];
    sums[warp][lane] = s;
    __syncthreads();
    if (warp == 0 && c < columns) {
        float total = 0.f;
        for (int i = 0; i < 8; i++) total += sums[i][lane];
        out[c] = total;
    }
}

// The same of few columns, each by a block of its own.
extern "C" __global__ void sum_few_partials(float *out, const float *partial, int groups, int columns) {
    __shared__ float shared[32];
    float s = 0.f;
    for (int g = threadIdx.x; g < groups; g += blockDim.x) s += partial[(u64)g * columns + blockIdx.x];
    s = block_sum(s, shared);
    if (threadIdx.x == 0) out[blockIdx.x] = s;
}
