// What the matrix products for Hopper share: TMA, barriers, clusters, wgmma, and how a tile's sums become rows.
//
// Shared memory holds stages of tiles in TMA's 128-byte swizzle.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct alignas(64) TensorMap {
    u64 opaque[16];
};

constexpr int TILE = 128, DEPTH = 64;
constexpr int TILE_BYTES = TILE * DEPTH * 2;
constexpr int GROUP = 8; // pairs of tiles of A that share their way through B

__device__ __forceinline__ u32 shared_at(const void *p) {
    return (u32)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(u32 at, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count));
}

__device__ __forceinline__ void barrier_arrive(u32 at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 at, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 at, u32 phase) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\n"
        "bra again;\n"
        "done:\n"
        "}\n" ::"r"(at),
        "r"(phase)
        : "memory");
}

// The box of `map` at (x, y), x along memory.
__device__ __forceinline__ void load_box(u32 to, const TensorMap *map, int x, int y, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y) : "memory");
}

// Matrix descriptors of wgmma: address, leading and stride byte offsets in units of 16, 128-byte swizzle.
__device__ __forceinline__ u64 descriptor(u32 at, u32 leading, u32 stride) {
    return (u64)((at & 0x3ffff) >> 4) | (u64)leading << 16 | (u64)stride << 32 | (u64)1 << 62;
}

// Sums as operands of an instruction: from the i-th on.
#define SUMS_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_64(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24), SUMS_8(i + 32), SUMS_8(i + 40), SUMS_8(i + 48), SUMS_8(i + 56)

// sum[64] += A (64 × 16) B (16 × 128), B's rows along memory.
__device__ __forceinline__ void multiply(float (&d)[64], u64 a, u64 b) {
    asm volatile(
        "{\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, 0, 1;\n"
        "}\n"
        : SUMS_64(0)
        : "l"(a), "l"(b));
}

// Keeps the compiler from moving uses of the sums across the asynchronous products.
__device__ __forceinline__ void fence_sums(float (&d)[64]) {
#pragma unroll
    for (int i = 0; i < 64; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// A quad's four lanes hold two neighbouring columns each of four blocks of eight; afterwards lane q holds
// all eight of block q. v[i]: bf16 pair of block i.
__device__ __forceinline__ uint4 gather_block(u32 v0, u32 v1, u32 v2, u32 v3) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    const u32 p = __shfl_xor_sync(~0u, odd ? v0 : v1, 1), q = __shfl_xor_sync(~0u, odd ? v2 : v3, 1);
    const u32 a0 = odd ? p : v0, a1 = odd ? v1 : p, b0 = odd ? q : v2, b1 = odd ? v3 : q;
    const u32 r0 = __shfl_xor_sync(~0u, high ? a0 : b0, 2), r1 = __shfl_xor_sync(~0u, high ? a1 : b1, 2);
    return high ? make_uint4(r0, r1, b0, b1) : make_uint4(a0, a1, r0, r1);
}

// Columns 32 g + 8 q .. + 8 of a row: which = 0 the thread's first row, 1 the row eight below.
__device__ __forceinline__ uint4 row_block(const float (&d)[64], int g, int which) {
    u32 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int at = (4 * g + i) * 4 + 2 * which;
        v[i] = pack(d[at], d[at + 1]);
    }
    return gather_block(v[0], v[1], v[2], v[3]);
}

__device__ __forceinline__ u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(r));
    return r;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Arrives at the barrier that lies at `at` in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_in(u32 at, u32 rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}\n" ::"r"(at),
        "r"(rank)
        : "memory");
}

// load_box into both blocks of the cluster, at the same place and barrier of each.
__device__ __forceinline__ void load_box_for_both(u32 to, const TensorMap *map, int x, int y, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "h"((u16)3) : "memory");
}

// Where a cluster's pair of tiles begins, in tiles; pairs go down GROUP rows, then to the next column.
__device__ __forceinline__ void place(int tile, int across, int down, int &row, int &column) {
    const int band = tile / (GROUP * across), within = tile % (GROUP * across);
    const int rows = min(GROUP, down - band * GROUP);
    row = 2 * (band * GROUP + within % rows), column = within / rows;
}

#endif
