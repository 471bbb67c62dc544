// Back through SwiGLU at the end of a matrix product, for Hopper: TMA, wgmma, one producer and two consumer
// warpgroups that take turns, so that one multiplies while the other finishes its tile.
//
// C = A B over tiles of 128 × 128 × 64, bf16 in, f32 sums. A: [M, K] row-major, B: [K, F] row-major, K a
// multiple of 64, F of 128. Shared memory holds STAGES pairs of tiles in TMA's 128-byte swizzle.
// Comes after hopper.cu.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int STAGES = 6;

enum { GATED_BACKWARD = 0, LEARNED_BACKWARD = 1 };

// C = dZ. in: gate and up side by side [M, 2F].
//
// GATED_BACKWARD. out0 ← the gradients of gate and up side by side, out1 ← Z = silu(gate) ∘ up [M, F].
// LEARNED_BACKWARD. Two products into the same sums, each of half of K: C = A B + A' B', where each `piece`
//   rows of A and A' have matrices B and B' [K/2, F] of their own, one below the other. A' B' is left out of
//   piece i, and that B' not read, unless bit i of `second` is set. Else as GATED_BACKWARD, without out1.
//
// The two blocks of a cluster take tiles one below the other; each loads half of the B that both use. A piece
// is a multiple of two tiles, so that both are in the same and equally deep.
template <int FORM>
__device__ __forceinline__ void product(const TensorMap *map_a, const TensorMap *map_a1, const TensorMap *map_b, const TensorMap *map_b1, u16 *out0, u16 *out1, const u16 *in, int m, int f, int k, int piece, u32 second) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) u64 barriers[2 * STAGES + 2];
    const u32 tiles = (shared_at(memory) + 1023) & ~1023u;
    // turn[w] opens when consumer w may multiply: it must not look at a stage that the other has yet to
    // use, since a barrier knows the parity of its phase only.
    const u32 full = shared_at(barriers), empty = full + 8 * STAGES, turn = empty + 8 * STAGES;
    const int group = threadIdx.x / 128;
    const u32 rank = cluster_rank();
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, 2);
        barrier_init(turn, 1), barrier_init(turn + 8, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    const int blocks = k / DEPTH;
    const int across = f / TILE, down = (m + 2 * TILE - 1) / (2 * TILE);
    const int all = across * down, clusters = gridDim.x / 2;
    // Blocks of a tile's depth.
    auto depth = [&](int row) { return FORM != LEARNED_BACKWARD || second >> (row * TILE / piece) & 1 ? blocks : blocks / 2; };
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) {
            int stage = 0;
            u32 phase = 1;
            for (int tile = blockIdx.x / 2; tile < all; tile += clusters) {
                int row, column;
                place(tile, across, down, row, column);
                row += rank;
                const int deep = depth(row);
                for (int b = 0; b < deep; b++) {
                    barrier_wait(empty + 8 * stage, phase);
                    const u32 here = full + 8 * stage, a = tiles + stage * 2 * TILE_BYTES;
                    const u32 to = a + TILE_BYTES + rank * (TILE_BYTES / 2);
                    barrier_expect(here, 2 * TILE_BYTES);
                    if (FORM == GATED_BACKWARD) {
                        load_box(a, map_a, b * DEPTH, row * TILE, here);
                        load_box_for_both(to, map_b, column * TILE + 64 * rank, b * DEPTH, here);
                    } else {
                        const bool other = b >= blocks / 2;
                        const int from = (other ? b - blocks / 2 : b) * DEPTH;
                        load_box(a, other ? map_a1 : map_a, from, row * TILE, here);
                        load_box_for_both(to, other ? map_b1 : map_b, column * TILE + 64 * rank, row * TILE / piece * (k / 2) + from, here);
                    }
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int own = group - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
        u32 step = 0; // blocks of all tiles up to the one at hand
        u32 opened = own ^ 1;
        for (int tile = blockIdx.x / 2, next = 0; tile < all; tile += clusters, next ^= 1) {
            int row, column;
            place(tile, across, down, row, column);
            row += rank;
            const int deep = depth(row);
            const u32 before = step;
            step += deep;
            if (next != own) continue;
            // Four passes over the tile's rows: this thread's line of pass i.
            auto line = [&](int i) { return (u64)(row * TILE + i / 2 * 64 + warp * 16 + lane / 4 + i % 2 * 8); };
            uint4 gate[4], up[4];
            const u64 c = column * TILE + 8 * (lane % 4);
            auto fetch = [&](int i) {
                const u64 at = min(line(i), (u64)m - 1) * 2 * f + c;
#pragma unroll
                for (int g = 0; g < 4; g++) {
                    gate[g] = *(const uint4 *)(in + at + 32 * g);
                    up[g] = *(const uint4 *)(in + at + f + 32 * g);
                }
            };
            fetch(0); // arrives while the other consumer multiplies
            barrier_wait(turn + 8 * own, opened);
            opened ^= 1;
            float sums[2][64];
#pragma unroll
            for (int i = 0; i < 64; i++) sums[0][i] = 0.f, sums[1][i] = 0.f;
            auto release = [&](u32 at) {
                if (thread < 2) barrier_arrive_in(empty + 8 * (at % STAGES), thread);
            };
            for (int b = 0; b < deep; b++) {
                const u32 at = before + b, stage = at % STAGES, phase = at / STAGES & 1;
                barrier_wait(full + 8 * stage, phase);
                const u32 a = tiles + stage * 2 * TILE_BYTES, c = a + TILE_BYTES;
                fence_sums(sums[0]), fence_sums(sums[1]);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                // 16 along K: 32 bytes of a row of A, 16 rows of B.
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u64 db = descriptor(c + i * 2048, 512, 64);
                    multiply(sums[0], descriptor(a + i * 32, 1, 64), db);
                    multiply(sums[1], descriptor(a + 8192 + i * 32, 1, 64), db);
                }
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                fence_sums(sums[0]), fence_sums(sums[1]);
                // At most this block's products are not done.
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (b > 0) release(at - 1);
            }
            if (thread == 0) barrier_arrive(turn + 8 * (own ^ 1));
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            fence_sums(sums[0]), fence_sums(sums[1]);
            release(step - 1);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u64 l = line(i);
                const bool in_range = l < m;
                F8 x[4], y[4];
#pragma unroll
                for (int g = 0; g < 4; g++) x[g] = unpack(gate[g]), y[g] = unpack(up[g]);
                if (i < 3) fetch(i + 1);
#pragma unroll
                for (int g = 0; g < 4; g++) {
                    const F8 dz = unpack(row_block(sums[i / 2], g, i % 2));
                    F8 dx, dy, z;
                    swiglu_all(x[g], y[g], dz, dx, dy, z);
                    if (in_range) {
                        store8(out0 + l * 2 * f + c + 32 * g, dx);
                        store8(out0 + l * 2 * f + f + c + 32 * g, dy);
                        if (FORM == GATED_BACKWARD) store8(out1 + l * f + c + 32 * g, z);
                    }
                }
            }
        }
    }
    // No block leaves while the other may still write to it.
    __syncwarp();
    cluster_sync();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) product_gated_backward(const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap down, u16 *dpair, u16 *z, const u16 *pair, int m, int f, int k) {
    product<GATED_BACKWARD>(&dy, &dy, &down, &down, dpair, z, pair, m, f, k, m, 0);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) product_learned_backward(const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap sums, u16 *dpair, const u16 *pair, int m, int f, int k, int piece, u32 second) {
    product<LEARNED_BACKWARD>(&dy, &v, &weights, &sums, dpair, nullptr, pair, m, f, k, piece, second);
}

#endif
