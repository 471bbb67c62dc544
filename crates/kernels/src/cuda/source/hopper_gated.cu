// Products that end in an elementwise step, for Hopper: gate, up and Z = silu(gate) ∘ up; queries, keys and
// values with rotary embedding. Comes after hopper.cu.
//
// A consumer never waits for memory: at the end of a tile it rounds its sums to bf16, which halves the
// registers they take, and begins the next tile. What it holds leaves in parts, last step and all, each while
// wgmma multiplies one block of the new tile.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A tile: 128 rows, 64 to a consumer; two times HALF columns, in SwiGLU gate and up.
constexpr int HALF = 128, HELD_STAGES = 4;
constexpr int HALF_BYTES = HALF * DEPTH * 2, HELD_STAGE_BYTES = TILE_BYTES + 2 * HALF_BYTES;
// Parts that a tile leaves in: 32 columns and 32 that belong to them, for a thread eight each of one row. The
// second half of the parts are of the rows eight below.
constexpr int PARTS = HALF / 16;

// sum[128] = A (64 × 16) B (16 × 256), both with K along memory; added to the sum if it `counts`.
__device__ __forceinline__ void multiply_wide(float (&d)[128], u64 a, u64 b, u32 counts) {
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
        "%128, %129, p, 1, 1, 0, 0;\n"
        "}\n"
        : SUMS_64(0), SUMS_64(64)
        : "l"(a), "l"(b), "r"(counts));
}

__device__ __forceinline__ void fence_sums(float (&d)[128]) {
#pragma unroll
    for (int i = 0; i < 128; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// A last step says which sums make up a part, where a tile begins, and what becomes of a part.
//
// Gate in the first half of a tile, up in the second. pair ← both side by side [M, 2F] unless it is null, z ← Z
// [M, F].
struct Swiglu {
    // Columns from a tile to the next, and from its first half to its second, among the rows of their matrices.
    static constexpr int STEP = HALF, ACROSS = 0;
    u16 *pair, *z;
    int m, f;
    // The thread's first row and column of the tile that leaves. None yet: no row is in range.
    int line = m, at = 0;

    // The first sum of pair i % 8 of part i / 8, of columns 8 (i % 4) ..; up's sums follow gate's.
    static __device__ __forceinline__ constexpr int sum_of(int i) {
        const int part = i / 8, block = part % (PARTS / 2) * 4 + i % 4;
        return i % 8 / 4 * 64 + 4 * block + part / (PARTS / 2) * 2;
    }

    __device__ __forceinline__ void begin(int row, int column) {
        line = row, at = column;
    }

    __device__ __forceinline__ void leave(int part, const u32 *v) {
        const uint4 x = gather_block(v[0], v[1], v[2], v[3]), y = gather_block(v[4], v[5], v[6], v[7]);
        const int l = line + part / (PARTS / 2) * 8, c = at + part % (PARTS / 2) * 32;
        const bool in_range = l < m;
        if (pair && in_range) {
            u16 *to = pair + (u64)l * 2 * f + c;
            *(uint4 *)to = x;
            *(uint4 *)(to + f) = y;
        }
        const F8 g = unpack(x), u = unpack(y);
        F8 product;
#pragma unroll
        for (int j = 0; j < 8; j++) product.v[j] = g.v[j] * sigmoid(g.v[j]) * u.v[j];
        if (in_range) store8(z + (u64)l * f + c, product);
    }
};

// Two heads of 128 columns in a tile. out ← queries, keys and values [M, width], those in the first `turned` columns
// turned by the angles of their tokens: cosine, sine [N, 64]. N a multiple of 16, so that the rows of a warp are
// of one sequence.
struct Rotary {
    static constexpr int STEP = 2 * HALF, ACROSS = HALF;
    u16 *out;
    const float *cosine, *sine;
    int m, width, tokens, turned;
    int line = m, at = 0, token = 0;
    // Angles of the part that leaves; the second head, which comes next, is turned by the same.
    F8 c = {}, s = {};

    // Part i / 8 % 4: 32 of the first 64 columns and the 32 that they pair with, of one head and then of the
    // other.
    static __device__ __forceinline__ constexpr int sum_of(int i) {
        const int part = i / 8, block = part % 2 * 16 + part / 2 % 2 * 4 + i % 8 / 4 * 8 + i % 4;
        return 4 * block + part / (PARTS / 2) * 2;
    }

    __device__ __forceinline__ void begin(int row, int column) {
        line = row, at = column, token = row % tokens;
    }

    __device__ __forceinline__ void leave(int part, const u32 *v) {
        const int below = part / (PARTS / 2) * 8, l = line + below, within = part / 2 % 2 * 32, head = at + part % 2 * HALF;
        const bool turns = head < turned;
        if (turns && part % 2 == 0) {
            const u64 from = (u64)(token + below) * (HALF / 2) + (at % HALF + within);
            c = load8(cosine + from), s = load8(sine + from);
        }
        uint4 x = gather_block(v[0], v[1], v[2], v[3]), y = gather_block(v[4], v[5], v[6], v[7]);
        if (turns) {
            F8 p, q;
            turn(unpack(x), unpack(y), c, s, p, q);
            x = pack8(p), y = pack8(q);
        }
        if (l < m) {
            u16 *to = out + (u64)l * width + (head + within);
            *(uint4 *)to = x;
            *(uint4 *)(to + HALF / 2) = y;
        }
    }
};

// a: [M, K]; b0, b1: what the first and the second half of a tile's columns are rows of, K along memory, K a
// multiple of 64. across: tiles of a row.
//
// The two blocks of a cluster take tiles one below the other; each loads one half of the columns for both.
template <class Last>
__device__ __forceinline__ void held_product(const TensorMap *map_a, const TensorMap *map_b0, const TensorMap *map_b1, Last step, int m, int across, int k) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) u64 barriers[2 * HELD_STAGES];
    const u32 skip = -shared_at(memory) & 1023, stages = shared_at(memory) + skip;
    const u32 full = shared_at(barriers), empty = full + 8 * HELD_STAGES;
    const int group = threadIdx.x / 128;
    const u32 rank = cluster_rank();
    if (threadIdx.x == 0) {
        // A stage is empty when both consumers of both blocks have multiplied it.
        for (int s = 0; s < HELD_STAGES; s++) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    // A block for each part of the tile before: beyond K, TMA fills in zeros.
    const int blocks = max(k / DEPTH, PARTS);
    const int down = (m + 2 * TILE - 1) / (2 * TILE);
    const int all = across * down, clusters = gridDim.x / 2;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            int stage = 0;
            u32 phase = 1;
            for (int tile = blockIdx.x / 2; tile < all; tile += clusters) {
                int row, column;
                place(tile, across, down, row, column);
#pragma unroll 1 // there are few registers
                for (int b = 0; b < blocks; b++) {
                    barrier_wait(empty + 8 * stage, phase);
                    const u32 here = full + 8 * stage, to = stages + stage * HELD_STAGE_BYTES;
                    barrier_expect(here, HELD_STAGE_BYTES);
                    load_box(to, map_a, b * DEPTH, (row + rank) * TILE, here);
                    load_box_for_both(to + TILE_BYTES + rank * HALF_BYTES, rank ? map_b1 : map_b0, b * DEPTH, column * Last::STEP + rank * Last::ACROSS, here);
                    if (++stage == HELD_STAGES) stage = 0, phase ^= 1;
                }
            }
        }
    } else if (blockIdx.x / 2 < all) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int own = group - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
        int stage = 0, last = 0;
        u32 phase = 0;
        float sums[128];
        auto issue = [&](int b) {
            barrier_wait(full + 8 * stage, phase);
            const u32 x = stages + stage * HELD_STAGE_BYTES + own * (TILE_BYTES / 2), y = stages + stage * HELD_STAGE_BYTES + TILE_BYTES;
            fence_sums(sums);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            // 16 along K: 32 bytes of a row.
#pragma unroll
            for (int i = 0; i < 4; i++) multiply_wide(sums, descriptor(x + i * 32, 1, 64), descriptor(y + i * 32, 1, 64), i || b);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            fence_sums(sums);
        };
        auto release = [&]() {
            if (thread < 2) barrier_arrive_in(empty + 8 * last, thread);
        };
        // Waits for the block before b.
        auto settle = [&](int b) {
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (b) release();
            last = stage;
            if (++stage == HELD_STAGES) stage = 0, phase ^= 1;
        };
        // bf16 pairs of the tile before, eight for each part: four of its columns, four of those that belong to them.
        u32 held[PARTS * 8];
#pragma unroll
        for (int i = 0; i < PARTS * 8; i++) held[i] = 0;
        int tile = blockIdx.x / 2;
        do {
#pragma unroll
            for (int b = 0; b < PARTS; b++) {
                issue(b);
                step.leave(b, held + b * 8);
                settle(b);
            }
            for (int b = PARTS; b < blocks; b++) issue(b), settle(b);
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            fence_sums(sums);
            release();
#pragma unroll
            for (int i = 0; i < PARTS * 8; i++) held[i] = pack(sums[Last::sum_of(i)], sums[Last::sum_of(i) + 1]);
            int row, column;
            place(tile, across, down, row, column);
            step.begin((row + rank) * TILE + own * 64 + warp * 16 + lane / 4, column * Last::STEP + 8 * (lane % 4));
        } while ((tile += clusters) < all);
        // The last tile leaves by way of the stages, which are all used up: were its registers read once more
        // here, they would not all stay registers above.
        asm volatile("bar.sync 1, 256;" ::: "memory");
        uint4 *mine = (uint4 *)(memory + skip) + threadIdx.x - 128;
#pragma unroll
        for (int i = 0; i < 2 * PARTS; i++) mine[256 * i] = make_uint4(held[4 * i], held[4 * i + 1], held[4 * i + 2], held[4 * i + 3]);
#pragma unroll 1
        for (int part = 0; part < PARTS; part++) {
            const uint4 x = mine[512 * part], y = mine[512 * part + 256];
            const u32 v[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
            step.leave(part, v);
        }
    }
    // No block leaves while the other may still write to it.
    __syncwarp();
    cluster_sync();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) product_gated(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up, u16 *pair, u16 *z, int m, int f, int k) {
    held_product(&a, &gate, &up, Swiglu{pair, z, m, f}, m, f / HALF, k);
}

// b: [S, K], S a multiple of 256.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) product_rotated(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, u16 *out, const float *cosine, const float *sine, int m, int s, int k, int tokens, int turned) {
    held_product(&a, &b, &b, Rotary{out, cosine, sine, m, s, tokens, turned}, m, s / (2 * HALF), k);
}

#endif
