// Flash attention for long prefill on Hopper (sm_90a): softmax(scale * Q K^T) V, bfloat16 or float16, float32 sums.
//
// One producer warp copies tiles with tensor maps; CONSUMERS warpgroups of 64 query rows each compute. A tile row is
// token * GROUP + head of the group, so the query heads of one KV head share every K and V tile. The two products of
// a warpgroup overlap its own softmax (S of the next block is under way while this block's P V runs), and the
// warpgroups take turns at issuing products, so that one's softmax hides behind another's products
// (FlashAttention-3, arXiv 2407.08608, sections 3.1 and 3.2).
//
// Compile-time: HEAD_DIM 64 or 128, GROUP (divides BLOCK_M), CAUSAL 0 or 1, DTYPE_BF16 or DTYPE_FP16,
// CONSUMERS (warpgroups), STAGES (of the K and V rings), CONSUMER_REGISTERS, PRODUCER_REGISTERS, RESCALE_THRESHOLD,
// SPLITS (blocks of a cluster that divide the keys of one tile and merge their results in shared memory).
// Launch: (CONSUMERS + 1) * 128 threads. A grid of all tiles runs one tile per block, longest first; a smaller grid
// runs persistent blocks that walk the tiles back and forth. With SPLITS > 1: SPLITS blocks for every tile.
#include "attention_params.cuh"
#include "hopper.cuh"
#include "hopper_tiles.cuh"

constexpr int S_REGISTERS = BLOCK_N / 2;   // float32 scores of a thread: 64 rows * BLOCK_N / 128 threads
constexpr int O_REGISTERS = HEAD_DIM / 2;  // float32 outputs of a thread
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// ---- producer: one warp keeps Q and the rings of K and V filled ----

__device__ __forceinline__ void load_panels(u32 destination, u32 panel_bytes, const TensorMap* map, u32 barrier, int c1,
                                            int c2, int c3) {
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
        tma_load(destination + panel * panel_bytes, map, barrier, panel * PANEL_COLUMNS, c1, c2, c3);
}

// Rows of a V tile from `row` on become zero: their weights are zero, but what lies behind a sequence's last key
// may be NaN, and 0 * NaN would reach every row. Whole warp.
__device__ __forceinline__ void clear_rows(u32 tile, int row) {
    const int chunks = PANEL_ROW_BYTES / 16;
#pragma unroll 1
    for (int i = row * chunks + threadIdx.x % 32; i < BLOCK_N * chunks; i += 32) {
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel)
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tile + panel * KV_PANEL_BYTES + 16 * i),
                         "r"(0)
                         : "memory");
    }
}

__device__ __forceinline__ void produce(const AttentionParams& p, const Shared smem, const TensorMap* q_map,
                                        const TensorMap* k_map, const TensorMap* v_map) {
    const bool leader = threadIdx.x % 32 == 0;
    const int tiles = tile_count(p);
    Slot k_slot(1), v_slot(1);
    u32 q_parity = 1, landing_parity = 0;
#pragma unroll 1
    for (int turn = 0, index; (index = tile_of_turn(turn)) < tiles; ++turn) {
        const Tile tile(p, index);
        if (tile.begin == tile.end) continue;
        const int k_batch = p.cu_seqlens_k ? 0 : tile.batch;

        auto load_k = [&](int block) {
            mbarrier_wait(smem.k_empty(k_slot.stage), k_slot.parity);
            if (leader) {
                const u32 full = smem.k_full(k_slot.stage);
                mbarrier_arrive_expect(full, KV_BYTES);
                load_panels(smem.k + k_slot.stage * KV_BYTES, KV_PANEL_BYTES, k_map, full,
                            tile.k_begin + block * BLOCK_N, tile.kv_head, k_batch);
            }
            k_slot.advance();
        };
        load_k(tile.end - 1);
        mbarrier_wait(smem.q_empty(), q_parity);
        q_parity ^= 1;
        if (leader) {
            mbarrier_arrive_expect(smem.q_full(), Q_BYTES);
            load_panels(smem.q, Q_PANEL_BYTES, q_map, smem.q_full(), tile.kv_head * GROUP,
                        tile.q_begin + tile.first_token, p.cu_seqlens_q ? 0 : tile.batch);
        }
#pragma unroll 1
        for (int block = tile.end - 1; block >= tile.begin; --block) {
            if (block > tile.begin) load_k(block - 1);
            mbarrier_wait(smem.v_empty(v_slot.stage), v_slot.parity);
            const u32 v_tile = smem.v + v_slot.stage * KV_BYTES;
            const int rows = tile.k_len - block * BLOCK_N;  // rows of the tile that hold this sequence's keys
            // A tile with rows to clear lands on a barrier of its own and is announced when it is clean.
            const u32 full = smem.v_full(v_slot.stage);
            const u32 landing = rows < BLOCK_N ? smem.v_landing() : full;
            if (leader) {
                mbarrier_arrive_expect(landing, KV_BYTES);
                load_panels(v_tile, KV_PANEL_BYTES, v_map, landing, tile.k_begin + block * BLOCK_N, tile.kv_head,
                            k_batch);
            }
            if (rows < BLOCK_N) {
                mbarrier_wait(landing, landing_parity);
                landing_parity ^= 1;
                clear_rows(v_tile, rows);
                fence_async_proxy();
                __syncwarp();
                if (leader) mbarrier_arrive(full);
            }
            v_slot.advance();
        }
    }
}

// ---- consumers ----

template <bool V> struct Flag {
    static constexpr bool VALUE = V;
};

// The online softmax of the two rows that a thread shares with the other three lanes of its quad. `sum` covers this
// lane's columns only; the quad's sums are added once, at the end. `top` may lag behind the largest score by
// RESCALE_THRESHOLD in the exponent: weights then reach 2^RESCALE_THRESHOLD, with the same relative precision, and
// the outputs need no correction (FlashAttention-4).
struct Softmax {
    float top[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};  // the score that weighs 1
    float sum[2] = {0.0f, 0.0f};

    // S becomes exp2(scale * (S - top)); `correction` brings earlier sums and outputs to the new top.
    __device__ __forceinline__ void update(float (&s)[S_REGISTERS], float scale_log2, float (&correction)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float even = top[i], odd = NEGATIVE_INFINITY;
#pragma unroll
            for (int j = 0; j < S_REGISTERS; j += 4) {
                even = fmaxf(even, s[j + 2 * i]);
                odd = fmaxf(odd, s[j + 2 * i + 1]);
            }
            float now = fmaxf(even, odd);
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
            if (RESCALE_THRESHOLD > 0 && (now - top[i]) * scale_log2 <= RESCALE_THRESHOLD) now = top[i];
            // A row that has seen no key yet: any finite base gives exp2(-inf) = 0 below.
            const float base = now == NEGATIVE_INFINITY ? 0.0f : __fmul_rn(now, scale_log2);
            // Rounded like `base`, not fused: an unchanged top corrects by exactly 1.
            correction[i] = exp2_fast(__fmul_rn(top[i], scale_log2) - base);
            top[i] = now;
            float sum_even = 0.0f, sum_odd = 0.0f;
#pragma unroll
            for (int j = 0; j < S_REGISTERS; j += 4) {
                s[j + 2 * i] = exp2_fast(fmaf(s[j + 2 * i], scale_log2, -base));
                s[j + 2 * i + 1] = exp2_fast(fmaf(s[j + 2 * i + 1], scale_log2, -base));
                sum_even += s[j + 2 * i];
                sum_odd += s[j + 2 * i + 1];
            }
            sum[i] = fmaf(sum[i], correction[i], sum_even + sum_odd);
        }
    }
};

// Scores of keys that a row does not see become -inf. visible[i]: keys that row i of the thread sees.
__device__ __forceinline__ void mask(float (&s)[S_REGISTERS], int block, const int (&visible)[2]) {
    const int first = block * BLOCK_N + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int end = visible[i] - first;
#pragma unroll
        for (int j = 0; j < S_REGISTERS / 4; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (8 * j + e >= end) s[4 * j + 2 * i + e] = NEGATIVE_INFINITY;
    }
}

// P in the 16-bit type, as the A operand of the second product: accumulators 8 k .. 8 k + 7 are its k-th 16 columns.
__device__ __forceinline__ void round_weights(u32 (&p)[S_REGISTERS / 2], const float (&s)[S_REGISTERS]) {
#pragma unroll
    for (int i = 0; i < S_REGISTERS / 2; ++i) p[i] = pack_pair(s[2 * i], s[2 * i + 1]);
}

// S = Q K^T, issued and committed.
__device__ __forceinline__ void issue_scores(float (&s)[S_REGISTERS], u64 q, u64 k) {
    wgmma_fence(s);
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
        const int panel = step / 4, chunk = step % 4 * 2;  // 16 columns are two chunks of 16 bytes
        const u64 a = q + panel * (Q_PANEL_BYTES >> 4) + chunk, b = k + panel * (KV_PANEL_BYTES >> 4) + chunk;
        if (step == 0)
            wgmma_shared<false>(s, a, b);
        else
            wgmma_shared<true>(s, a, b);
    }
    wgmma_commit();
}

// O += P V, issued and committed.
__device__ __forceinline__ void issue_output(float (&o)[O_REGISTERS], const u32 (&p)[S_REGISTERS / 2], u64 v) {
    wgmma_fence(o);
#pragma unroll
    for (int step = 0; step < BLOCK_N / 16; ++step)
        wgmma_registers(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                        v + step * (16 * PANEL_ROW_BYTES >> 4));
    wgmma_commit();
}

// Lane q of a quad gives words[t] and receives word q of lane t: a 4 x 4 transpose.
__device__ __forceinline__ void transpose_quad(u32 (&words)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit <<= 1) {
        const bool upper = threadIdx.x & bit;
#pragma unroll
        for (int low = 0; low < 4; ++low) {
            if (low & bit) continue;
            const int high = low | bit;
            const u32 received = __shfl_xor_sync(0xffffffffu, upper ? words[low] : words[high], bit);
            (upper ? words[low] : words[high]) = received;
        }
    }
}

// The blocks of a cluster hold the same rows over different keys. Each takes a part of the columns and sums them
// over the blocks in the order of their ranks. Slot r of the receiving block, in place of the K and V rings, is
// block r's part: value i of all consumer threads, then value i + 1; the threads hold the same rows in every block.
__device__ __forceinline__ void merge(const Shared smem, u32 rank, float scale_log2, const float (&o)[O_REGISTERS],
                                      float (&part)[O_REGISTERS / SPLITS], Softmax& softmax) {
    constexpr int PART = O_REGISTERS / SPLITS;
    constexpr u32 VALUE_BYTES = CONSUMERS * WARPGROUP * 4, SLOT_BYTES = (PART + 4) * VALUE_BYTES;
    static_assert(SPLITS * SLOT_BYTES <= 2 * STAGES * KV_BYTES, "the slots fit into the rings");
    const u32 mine = smem.k + (threadIdx.x - WARPGROUP) * 4;
    cluster_sync();  // every block is done with its rings
#pragma unroll
    for (int to = 0; to < SPLITS; ++to) {
        const u32 slot = cluster_address(mine + rank * SLOT_BYTES, to);
#pragma unroll
        for (int i = 0; i < PART; ++i) cluster_store(slot + i * VALUE_BYTES, o[to * PART + i]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            cluster_store(slot + (PART + i) * VALUE_BYTES, softmax.top[i]);
            cluster_store(slot + (PART + 2 + i) * VALUE_BYTES, softmax.sum[i]);
        }
    }
    cluster_sync();  // every slot is filled
    float weight[SPLITS][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float top = NEGATIVE_INFINITY, sum = 0.0f;
#pragma unroll
        for (int from = 0; from < SPLITS; ++from) {
            weight[from][i] = shared_load(mine + from * SLOT_BYTES + (PART + i) * VALUE_BYTES);  // its top, first
            top = fmaxf(top, weight[from][i]);
        }
        const float base = top == NEGATIVE_INFINITY ? 0.0f : top;
#pragma unroll
        for (int from = 0; from < SPLITS; ++from) {
            weight[from][i] = exp2_fast((weight[from][i] - base) * scale_log2);
            sum += weight[from][i] * shared_load(mine + from * SLOT_BYTES + (PART + 2 + i) * VALUE_BYTES);
        }
        softmax.top[i] = top;
        softmax.sum[i] = sum;
    }
#pragma unroll
    for (int i = 0; i < PART; ++i) {
        part[i] = 0.0f;
#pragma unroll
        for (int from = 0; from < SPLITS; ++from)
            part[i] += weight[from][i / 2 % 2] * shared_load(mine + from * SLOT_BYTES + i * VALUE_BYTES);
    }
}

// O / sum to global memory, 16 bytes a lane, from column `first_column` on, and the log-sum-exp.
template <int COUNT>
__device__ __forceinline__ void store(const AttentionParams& p, const Tile& tile, int first_row, int first_column,
                                      const float (&o)[COUNT], Softmax& softmax) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first_row + 8 * i;
        const int token = tile.first_token + row / GROUP;
        const int head = tile.kv_head * GROUP + row % GROUP;
        const bool inside = token < tile.q_len;
        float sum = softmax.sum[i];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        const long long batch_row = p.cu_seqlens_q ? 0 : tile.batch;
        unsigned short* out = static_cast<unsigned short*>(p.out) + batch_row * p.out_batch_stride +
                              static_cast<long long>(tile.q_begin + token) * p.out_token_stride +
                              head * p.out_head_stride + first_column;
#pragma unroll
        for (int group = 0; group < COUNT / 16; ++group) {
            u32 words[4];
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                const int at = 4 * (4 * group + t) + 2 * i;
                words[t] = pack_pair(o[at] * inverse, o[at + 1] * inverse);
            }
            transpose_quad(words);
            if (inside)
                *reinterpret_cast<uint4*>(out + 8 * (4 * group + lane % 4)) =
                    make_uint4(words[0], words[1], words[2], words[3]);
        }
        if (p.lse && inside && first_column == 0 && lane % 4 == 0) {
            const long long at = batch_row * p.seqlen_q + tile.q_begin + token;
            constexpr float LN_2 = 0.693147180559945309f;
            p.lse[static_cast<long long>(head) * p.total_q + at] = (softmax.top[i] * p.scale_log2 + log2f(sum)) * LN_2;
        }
    }
}

__device__ __forceinline__ void consume(const AttentionParams& p, const Shared smem, int group) {
    const bool leader = threadIdx.x % 32 == 0;
    const int first_row = group * 64 + threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4;
    const int tiles = tile_count(p);
    const float scale_log2 = p.scale_log2;
    const int turn_here = 1 + group, turn_next = 1 + (group + 1) % CONSUMERS;  // named barriers
    const u64 q_tile = descriptor_k_major(smem.q + group * 64 * PANEL_ROW_BYTES);
    const u64 k_ring = descriptor_k_major(smem.k);
    const u64 v_ring = descriptor_n_major<KV_PANEL_BYTES>(smem.v);
    Slot k_slot(0), v_slot(0);
    u32 q_parity = 0;
    if (TAKE_TURNS && group == CONSUMERS - 1) named_barrier_arrive(1, 2 * WARPGROUP);  // the first goes first

#pragma unroll 1
    for (int turn = 0, index; (index = tile_of_turn(turn)) < tiles; ++turn) {
        const Tile tile(p, index);
        Softmax softmax;
        float o_rmem[O_REGISTERS];
#pragma unroll
        for (int i = 0; i < O_REGISTERS; ++i) o_rmem[i] = 0.0f;

        if (tile.begin < tile.end) {
            const int visible[2] = {tile.visible_keys(tile.first_token + first_row / GROUP),
                                    tile.visible_keys(tile.first_token + (first_row + 8) / GROUP)};
            float s_rmem[S_REGISTERS], correction[2];
            u32 p_rmem[S_REGISTERS / 2];
            int block = tile.end - 1;

            // The last block first, alone: S = Q K^T, P = softmax(S)
            mbarrier_wait(smem.q_full(), q_parity);
            q_parity ^= 1;
            mbarrier_wait(smem.k_full(k_slot.stage), k_slot.parity);
            issue_scores(s_rmem, q_tile, k_ring + k_slot.stage * (KV_BYTES >> 4));
            wgmma_wait<0>(s_rmem);
            if (leader) mbarrier_arrive(smem.k_empty(k_slot.stage));
            k_slot.advance();
            mask(s_rmem, block, visible);
            softmax.update(s_rmem, scale_log2, correction);
            round_weights(p_rmem, s_rmem);

            if (block > tile.begin) mbarrier_wait(smem.k_full(k_slot.stage), k_slot.parity);

            // S of this block and O += P V of the one before it run together
            auto step = [&](auto masked) {
                if (TAKE_TURNS) named_barrier_sync(turn_here, 2 * WARPGROUP);  // this warpgroup's turn to issue
                issue_scores(s_rmem, q_tile, k_ring + k_slot.stage * (KV_BYTES >> 4));
                mbarrier_wait(smem.v_full(v_slot.stage), v_slot.parity);
                issue_output(o_rmem, p_rmem, v_ring + v_slot.stage * (KV_BYTES >> 4));
                if (TAKE_TURNS) named_barrier_arrive(turn_next, 2 * WARPGROUP);
                wgmma_wait<1>(s_rmem);
                if (leader) mbarrier_arrive(smem.k_empty(k_slot.stage));
                k_slot.advance();
                if (decltype(masked)::VALUE) mask(s_rmem, block, visible);
                softmax.update(s_rmem, scale_log2, correction);
                hold(s_rmem);
                if (block > tile.begin) mbarrier_wait(smem.k_full(k_slot.stage), k_slot.parity);
                wgmma_wait<0>(o_rmem);
                if (leader) mbarrier_arrive(smem.v_empty(v_slot.stage));
                v_slot.advance();
                round_weights(p_rmem, s_rmem);
                // A warp whose rows all keep their top has nothing to correct.
                if (RESCALE_THRESHOLD == 0 || __any_sync(0xffffffffu, correction[0] != 1.0f || correction[1] != 1.0f)) {
#pragma unroll
                    for (int i = 0; i < O_REGISTERS; ++i) o_rmem[i] *= correction[i / 2 % 2];
                }
            };
#pragma unroll 1
            for (--block; block >= max(tile.unmasked, tile.begin); --block) step(Flag<true>{});
#pragma unroll 1
            for (; block >= tile.begin; --block) step(Flag<false>{});

            // The first block's O += P V
            if (leader) mbarrier_arrive(smem.q_empty());
            mbarrier_wait(smem.v_full(v_slot.stage), v_slot.parity);
            issue_output(o_rmem, p_rmem, v_ring + v_slot.stage * (KV_BYTES >> 4));
            wgmma_wait<0>(o_rmem);
            if (leader) mbarrier_arrive(smem.v_empty(v_slot.stage));
            v_slot.advance();
        }
        if constexpr (SPLITS == 1) {
            store(p, tile, first_row, 0, o_rmem, softmax);
        } else {
            float part_rmem[O_REGISTERS / SPLITS];
            const u32 rank = cluster_rank();
            merge(smem, rank, scale_log2, o_rmem, part_rmem, softmax);
            store(p, tile, first_row, rank * (HEAD_DIM / SPLITS), part_rmem, softmax);
        }
    }
}

#if SPLITS > 1
#define CLUSTER __cluster_dims__(SPLITS, 1, 1)
#else
#define CLUSTER
#endif

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
    attention_prefill_hopper(const AttentionParams params, const __grid_constant__ TensorMap q_map,
                             const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map) {
    extern __shared__ unsigned char shared_bytes[];
    const Shared smem(smem_address(shared_bytes));
    if (threadIdx.x == 0) {
        tma_prefetch_map(&q_map);
        tma_prefetch_map(&k_map);
        tma_prefetch_map(&v_map);
        mbarrier_init(smem.q_full(), 1);
        mbarrier_init(smem.q_empty(), CONSUMER_WARPS);
        mbarrier_init(smem.v_landing(), 1);
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(smem.k_full(stage), 1);
            mbarrier_init(smem.k_empty(stage), CONSUMER_WARPS);
            mbarrier_init(smem.v_full(stage), 1);
            mbarrier_init(smem.v_empty(stage), CONSUMER_WARPS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();  // the barriers are ready

    // The same in all lanes of a warp, and known to be so: roles are branches of whole warps.
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 0) {
        registers_release<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32) produce(params, smem, &q_map, &k_map, &v_map);
        if (SPLITS > 1) {  // the two barriers of `merge`: its slots lie where the producer wrote
            __syncwarp();
            cluster_sync();
            cluster_sync();
        }
    } else {
        registers_claim<CONSUMER_REGISTERS>();
        consume(params, smem, warpgroup - 1);
    }
}
