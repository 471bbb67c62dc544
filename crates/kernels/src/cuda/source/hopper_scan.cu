// The TTT scan's products VᵀZ together with their running sums, for Hopper. Comes after hopper_gated.cu.
//
// The sums of wgmma are the state: a pair of blocks takes two tiles of [D, F] through the pieces of one document,
// each added onto what the pieces before it left. What the next piece reads is rounded to bf16 between two pieces, with
// W0 added in f32, and leaves in parts, each while wgmma multiplies one block of tokens of the next piece. The
// registers of a part that has left take W0 of the same place, for the next time; so with W0, which is f32, a tile
// has 192 columns, and 256 without.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A document's pieces in a group, 32 at most: one chain for each document.
struct Chains {
    u32 all[32];
};

// A chain: the piece multiplied first (5 bits), how many are, the slot that the last sums leave to (each 8), a bit
// each for: sums begin with `enter`, end in `leave`, the first slot is written; the index of Σ S² (5).
constexpr u32 NO_SLOT = 255, NO_SQUARE = 31;

// Which slot is written before the first piece p, and which between a piece and the next.
enum {
    SCAN_FORWARD = 0,  // p; the next piece's: W0 + η S.
    SCAN_BACKWARD = 1, // Pieces from the last to the first. p; the next piece's: η G.
    SCAN_PEEL = 2,     // The same way, each taken off S. p + 1; the piece's own: W0 + η S.
};

__device__ __forceinline__ void load_boxes(u32 to, const TensorMap *map, int row, int box, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(box) : "memory");
}

__device__ __forceinline__ void load_boxes_for_both(u32 to, const TensorMap *map, int row, int box, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to), "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(box), "h"((u16)3) : "memory");
}

// sum ± A (64 × 16) B (16 × 2 SUMS), both with K across memory; onto the sum if it `counts`.
template <int SIGN>
__device__ __forceinline__ void multiply_outer(float (&d)[128], u64 a, u64 b, u32 counts) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, p, %131, 1, 1, 1;\n"
        "}\n"
        : SUMS_64(0), SUMS_64(64)
        : "l"(a), "l"(b), "r"(counts), "n"(SIGN));
}

template <int SIGN>
__device__ __forceinline__ void multiply_outer(float (&d)[96], u64 a, u64 b, u32 counts) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
        "%96, %97, p, %99, 1, 1, 1;\n"
        "}\n"
        : SUMS_64(0), SUMS_8(64), SUMS_8(72), SUMS_8(80), SUMS_8(88)
        : "l"(a), "l"(b), "r"(counts), "n"(SIGN));
}

template <int SUMS>
__device__ __forceinline__ void fence_outer(float (&d)[SUMS]) {
#pragma unroll
    for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// v, z: [pieces · tokens, D] and [.., F] as boxes of 64 columns, F a multiple of 64; a tile: 128 rows of D, COLUMNS of
// F. slots: a matrix [D, F] of each piece. w0: f32 in boxes of 128 rows × 32. enter, leave: f32 [D, F], which may be
// one. squares[16 of a pair of tiles .., k]: Σ S² at the end of those chains that have an index k < ends, of each
// warp. tokens: of a piece, a multiple of 64, at least a block for each part to leave in.
//
// The two blocks of a cluster take tiles one below the other; of a block of Z, which both use, each loads half the
// tokens.
template <int FORM, int COLUMNS>
__device__ __forceinline__ void outer_products(const TensorMap *map_v, const TensorMap *map_z, const TensorMap *map_w0, const Chains &chains, int count, u16 *slots, const float *enter, float *leave, float *squares, int ends, float lr, int d, int f, int tokens) {
    constexpr bool BASED = FORM != SCAN_BACKWARD;
    constexpr int SUMS = COLUMNS / 2, BOX = COLUMNS / 64 * (DEPTH / 2) * 128;
    constexpr int STAGE = TILE_BYTES + 2 * BOX, COUNT = 4;
    // Parts: 32 columns of the thread's rows, which are eight apart.
    constexpr int HELD = COLUMNS / 4, PARTED = COLUMNS / 32;
    // Parts of W0 that are under way.
    constexpr int RING = 4, RING_BYTES = TILE * 128;
    constexpr int AHEAD_BY = FORM == SCAN_FORWARD ? 1 : -1;
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) u64 barriers[2 * COUNT + 2 * RING];
    const u32 skip = -shared_at(memory) & 1023, stages = shared_at(memory) + skip;
    const u32 full = shared_at(barriers), empty = full + 8 * COUNT, arrived = empty + 8 * COUNT, taken = arrived + 8 * RING;
    const int group = threadIdx.x / 128;
    const u32 rank = cluster_rank();
    if (threadIdx.x == 0) {
        // A stage is empty when both consumers of both blocks have multiplied it, a part of W0 taken by each warp.
        for (int s = 0; s < COUNT; s++) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, 4);
        for (int s = 0; s < RING; s++) barrier_init(arrived + 8 * s, 1), barrier_init(taken + 8 * s, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    const int blocks = tokens / DEPTH;
    const int across = (f + COLUMNS - 1) / COLUMNS, down = d / (2 * TILE), pairs = across * down;
    const int all = pairs * count, clusters = gridDim.x / 2;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            int stage = 0, ring = 0;
            u32 phase = 1, turn = 1;
            for (int unit = blockIdx.x / 2; unit < all; unit += clusters) {
                int row, column;
                place(unit % pairs, across, down, row, column);
                row += rank;
                const u32 chain = chains.all[unit / pairs];
                auto load_part = [&](int part) {
                    barrier_wait(taken + 8 * ring, turn);
                    barrier_expect(arrived + 8 * ring, RING_BYTES);
                    load_box(stages + COUNT * STAGE + ring * RING_BYTES, map_w0, column * COLUMNS + 32 * part, row * TILE, arrived + 8 * ring);
                    if (++ring == RING) ring = 0, turn ^= 1;
                };
                if (BASED && chain >> 21 & 1)
#pragma unroll 1 // there are few registers
                    for (int part = 0; part < PARTED; part++) load_part(part);
                int from = (chain & 31) * tokens;
                for (int steps = chain >> 5 & 255; steps; steps--, from += AHEAD_BY * tokens)
#pragma unroll 1
                    for (int b = 0; b < blocks; b++) {
                        barrier_wait(empty + 8 * stage, phase);
                        const u32 here = full + 8 * stage, to = stages + stage * STAGE;
                        barrier_expect(here, STAGE);
                        load_boxes(to, map_v, from + b * DEPTH, row * (TILE / 64), here);
                        load_boxes_for_both(to + TILE_BYTES + rank * BOX, map_z, from + b * DEPTH + rank * (DEPTH / 2), column * (COLUMNS / 64), here);
                        if (++stage == COUNT) stage = 0, phase ^= 1;
                        if (BASED && b < PARTED) load_part(b);
                    }
            }
        }
    } else if (blockIdx.x / 2 < all) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int own = group - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
        int stage = 0, last = 0, ring = 0;
        u32 phase = 0, turn = 0;
        float sums[SUMS];
        auto issue = [&](u32 counts) {
            barrier_wait(full + 8 * stage, phase);
            const u32 x = stages + stage * STAGE + own * (TILE_BYTES / 2), y = stages + stage * STAGE + TILE_BYTES;
            fence_outer(sums);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            // 16 along K: 16 rows of 128 bytes.
#pragma unroll
            for (int i = 0; i < 4; i++)
                multiply_outer<FORM == SCAN_PEEL ? -1 : 1>(sums, descriptor(x + i * 2048, 512, 64), descriptor(y + i / 2 * BOX + i % 2 * 2048, 256, 64), i ? 1 : counts);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            fence_outer(sums);
        };
        auto release = [&]() {
            if (thread < 2) barrier_arrive_in(empty + 8 * last, thread);
        };
        // Waits for the block before; none is, of a piece's first.
        auto settle = [&](bool first) {
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (!first) release();
            last = stage;
            if (++stage == COUNT) stage = 0, phase ^= 1;
        };
        // Where a thread's W0 begins in a part; 16 bytes lie where the swizzle of their row has them.
        const u32 own_row = own * 64 + warp * 16 + lane / 4;
        const u32 own_w0 = COUNT * STAGE + own_row * 128 + (lane / 2 % 2 ^ lane / 4 % 2) * 16 + lane % 2 * 8, turned = lane / 8 * 32;
        // The next part of W0, as the sums have it.
        auto take_part = [&](int part, float *w) {
            barrier_wait(arrived + 8 * ring, turn);
            const unsigned char *at = memory + skip + ring * RING_BYTES + own_w0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 x = *(const float2 *)(at + (i * 32 ^ turned)), y = *(const float2 *)(at + (i * 32 ^ turned) + 1024);
                float *to = w + 16 * part + 4 * i;
                to[0] = x.x, to[1] = x.y, to[2] = y.x, to[3] = y.y;
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(taken + 8 * ring);
            if (++ring == RING) ring = 0, turn ^= 1;
        };
        const u64 n = (u64)d * f;
        // bf16 pairs that leave, eight for each part: four blocks of eight columns of the first row, and of the
        // second.
        u32 held[HELD];
#pragma unroll
        for (int i = 0; i < HELD; i++) held[i] = 0;
        u16 *to = nullptr;
        int width = 0; // from the tile's first column to the last of F
        auto put = [&](u16 *to, int width, int part, const u32 *v) {
            const uint4 x = gather_block(v[0], v[1], v[2], v[3]), y = gather_block(v[4], v[5], v[6], v[7]);
            if (to && 32 * part < width) *(uint4 *)(to + 32 * part) = x, *(uint4 *)(to + 32 * part + 8 * f) = y;
        };
        // held ← bf16(W0 + scale · sums).
        auto hold = [&](float scale, const float *w) {
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                const int sum = 4 * (i / 8 * 4 + i % 4) + i % 8 / 4 * 2;
                held[i] = BASED ? pack(fmaf(scale, sums[sum], w[sum]), fmaf(scale, sums[sum + 1], w[sum + 1])) : pack(scale * sums[sum], scale * sums[sum + 1]);
            }
        };
        int unit = blockIdx.x / 2;
        do {
            int row, column;
            place(unit % pairs, across, down, row, column);
            u32 chain = chains.all[unit / pairs];
            const int first = chain & 31, steps = chain >> 5 & 255;
            const bool enters = chain >> 21 & 1;
            const u32 at = ((row + rank) * TILE + own_row) * f + column * COLUMNS + 8 * (lane % 4);
            // The thread's own columns of blocks of eight, as the sums have them.
            const u32 pair = at - 6 * (lane % 4);
            const int wide = f - column * COLUMNS;
            u16 *opening = chain >> 23 & 1 ? slots + (FORM == SCAN_PEEL ? first + 1 : first) * n + at : nullptr;
            if (enters) {
                float w[BASED ? SUMS : 1];
#pragma unroll
                for (int part = 0; part < PARTED; part++) {
                    if (to) put(to, width, part, held + 8 * part);
                    if (BASED) take_part(part, w);
                }
#pragma unroll
                for (int i = 0; i < SUMS / 4; i++) {
                    float2 x = make_float2(0.f, 0.f), y = x;
                    if (8 * i < wide) x = *(const float2 *)(enter + pair + 8 * i), y = *(const float2 *)(enter + pair + 8 * f + 8 * i);
                    sums[4 * i] = x.x, sums[4 * i + 1] = x.y, sums[4 * i + 2] = y.x, sums[4 * i + 3] = y.y;
                }
                hold(lr, w);
                to = opening, width = wide;
            }
            for (int step = 0; step < steps; step++) {
                float w[BASED ? SUMS : 1];
#pragma unroll
                for (int b = 0; b < PARTED; b++) {
                    issue(b || step || enters);
                    put(to, width, b, held + 8 * b);
                    if (BASED) {
                        take_part(b, w);
                        // Nothing added yet: the first piece reads W0 itself.
                        if (FORM == SCAN_FORWARD && !step && !enters) {
                            u32 v[8];
#pragma unroll
                            for (int i = 0; i < 8; i++) {
                                const float *x = w + 4 * (b * 4 + i % 4) + i / 4 * 2;
                                v[i] = pack(x[0], x[1]);
                            }
                            put(opening, wide, b, v);
                        }
                    }
                    settle(!b);
                }
                for (int b = PARTED; b < blocks; b++) issue(1), settle(false);
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                fence_outer(sums);
                release();
                const bool ended = step + 1 == steps;
                // The total of a document behind its first piece is no piece's ηG.
                hold(FORM == SCAN_BACKWARD && ended ? 1.f : lr, w);
                const u32 end = chain >> 13 & 255;
                const int slot = first + AHEAD_BY * step + (FORM == SCAN_PEEL ? 0 : AHEAD_BY);
                to = ended && end == NO_SLOT ? nullptr : slots + (ended ? end : slot) * n + at;
                width = wide;
            }
            const u32 index = chain >> 24 & 31;
            if (index != NO_SQUARE) {
                float square = 0.f;
#pragma unroll
                for (int i = 0; i < SUMS; i++) square += sums[i] * sums[i];
                square = warp_sum(square);
                if (lane == 0) squares[(u64)((unit % pairs * 2 + rank) * 8 + own * 4 + warp) * ends + index] = square;
            }
            if (chain >> 22 & 1)
#pragma unroll
                for (int i = 0; i < SUMS / 4; i++)
                    if (8 * i < wide) {
                        *(float2 *)(leave + pair + 8 * i) = make_float2(sums[4 * i], sums[4 * i + 1]);
                        *(float2 *)(leave + pair + 8 * f + 8 * i) = make_float2(sums[4 * i + 2], sums[4 * i + 3]);
                    }
        } while ((unit += clusters) < all);
        // The last leaves by way of the stages, which are all used up, as in `held_product`.
        asm volatile("bar.sync 1, 256;" ::: "memory");
        uint4 *mine = (uint4 *)(memory + skip) + threadIdx.x - 128;
#pragma unroll
        for (int i = 0; i < HELD / 4; i++) mine[256 * i] = make_uint4(held[4 * i], held[4 * i + 1], held[4 * i + 2], held[4 * i + 3]);
#pragma unroll 1
        for (int part = 0; part < PARTED; part++) {
            const uint4 x = mine[512 * part], y = mine[512 * part + 256];
            const u32 v[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
            put(to, width, part, v);
        }
    }
    // No block leaves while the other may still write to it.
    __syncwarp();
    cluster_sync();
}

#define OUTER_PRODUCTS(NAME, FORM, COLUMNS)                                                                                 \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) NAME(const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap z, const __grid_constant__ TensorMap w0, const __grid_constant__ Chains chains, int count, u16 *slots, const float *enter, float *leave, float *squares, int ends, float lr, int d, int f, int tokens) { \
        outer_products<FORM, COLUMNS>(&v, &z, &w0, chains, count, slots, enter, leave, squares, ends, lr, d, f, tokens);     \
    }

OUTER_PRODUCTS(scanned_forward, SCAN_FORWARD, 192)
OUTER_PRODUCTS(scanned_backward, SCAN_BACKWARD, 256)
OUTER_PRODUCTS(scanned_backward_192, SCAN_BACKWARD, 192)
OUTER_PRODUCTS(scanned_peel, SCAN_PEEL, 192)

#endif
