// Linear layers of many rows on Hopper (sm_90a): D (features x rows) = W X^T with the ends of linear_params.cuh.
//
// W is the left operand of wgmma and comes from registers: its packed order is that operand's own, so a stage of packed
// weights arrives as it lies in memory and a lane reads its words of 16 x 16 weights in one 128-bit access. X is the right
// operand, rows along N, as a copy with the 128-byte swizzle lays it into shared memory. Both copies go by tensor maps.
//
// Two warps copy; two beside them work out the norm's factors; the other warpgroups compute. Blocks stay and walk over
// tiles of BLOCK_FEATURES x TILE_ROWS. All tiles of a block pass through one ring of stages, in order. With GROUPS = 2
// the groups of warpgroups take every second tile: while one finishes its tile, the other has the tensor cores. With
// SPLITS > 1 the blocks of a cluster divide the depth of one tile, and its rows when they bring the sums to their end.
//
// Compile-time: DTYPE_BF16 or DTYPE_FP16, END, NORM and RAGGED (linear_ends.cuh), GROUPS (1 or 2), WARPGROUPS (of a group,
// 64 * PRODUCTS features each), PRODUCTS (1 or 2), TILE_ROWS (64, 96, 128, 192, 256), SPLITS (1: no clusters), STAGES,
// BLOCKS (per multiprocessor), CONSUMER_REGISTERS and PRODUCER_REGISTERS (both 0: as launched).
// Launch: (GROUPS * WARPGROUPS + 1) * 128 threads, any grid along x; with clusters SPLITS blocks for every tile.
#include "device.cuh"
#include "linear_params.cuh"
#include "linear_ends.cuh"
#include "hopper.cuh"
#include "linear_hopper_products.cuh"
#include "linear_hopper_tiles.cuh"
#include "linear_hopper_ends.cuh"

struct LinearHopperParams {
    LinearParams linear;
    unsigned char unused[128 - sizeof(LinearParams)];
    TensorMap input;    // (rows or more, depth); boxes of TILE_ROWS x 64, swizzled
    TensorMap weights;  // (packed tiles, depth / 16, 256); boxes of PACKED_TILES x 4 x 256
};
static_assert(sizeof(LinearHopperParams) == 384, "soprano_cupy/gpu/linear_hopper.py packs it");

// ---- the copying warps ----

// One lane of a warp requests the copies; the others go with it, so that addresses are uniform and no step needs more
// than a few instructions. Where a tile lies is worked out once a tile: a division costs as much as four products.
struct Producer {
    const TensorMap *input, *weights;
    const Shared smem;
    const Schedule schedule;

    // Announces all bytes of a stage and requests its weights, which no other kernel writes. What lies past the ends of an
    // array arrives as zeros, and counts as bytes. packed_tile: the first of the block's tile.
    __device__ __forceinline__ void load_weights(int stage, int packed_tile, int step) const {
        const u32 full = smem.full(stage);
        mbarrier_arrive_expect(full, INPUT_BYTES + WEIGHT_BYTES);
        tma_load_tiles(smem.weights + stage * WEIGHT_BYTES, weights, full, (schedule.first_step + step) * STEP_PRODUCTS,
                       packed_tile);
    }
    __device__ __forceinline__ void load_input(int stage, int row, int step) const {
        tma_load_rows(smem.input + stage * INPUT_BYTES, input, smem.full(stage),
                      (schedule.first_step + step) * DEPTH_STEP, row);
    }
    // Weights of the first tile for as many stages as there are; the others are sent for as far as the L2 cache. The tiles
    // of the same features share that out.
    __device__ __forceinline__ void begin(int packed_tile, int first_row, int rows) const {
        const bool elected = elect_one();
        const int begun = min(STAGES, schedule.steps);
#pragma unroll 1
        for (int step = 0; step < begun; ++step) {
            if (elected) load_weights(step, packed_tile, step);
        }
        const int sharing = (rows + TILE_ROWS - 1) / TILE_ROWS;
#pragma unroll 1
        for (int step = begun + first_row / TILE_ROWS; step < schedule.steps; step += sharing) {
            if (elected) tma_prefetch_tiles(weights, (schedule.first_step + step) * STEP_PRODUCTS, packed_tile);
        }
    }
    // Everything else, once the input is there: a warp's share, every COPY_WARPS-th step from its own on. One warp alone was
    // seen to take longer for a step than the products. first_row: of the first tile.
    __device__ __forceinline__ void run(int warp, int first_row) const {
        const bool elected = elect_one();
        const int begun = min(STAGES, schedule.steps);
#pragma unroll 1
        for (int step = warp; step < begun; step += COPY_WARPS) {
            if (elected) load_input(step, first_row, step);
        }
        const int skipped = begun + (begun % COPY_WARPS == warp ? 0 : 1);  // of two warps
        Slot slot(skipped);
        int step = skipped;
#pragma unroll 1
        for (int turn = 0, tile; (tile = schedule.tile(turn)) < schedule.tiles; ++turn) {
            const int packed_tile = opaque(schedule.first_feature(tile) / TILE_FEATURES);
            const int row = opaque(schedule.first_row(tile));
#pragma unroll 1
            for (; step < schedule.steps; step += COPY_WARPS) {
                mbarrier_wait(smem.empty(slot.stage), slot.parity ^ 1);
                if (elected) {
                    load_weights(slot.stage, packed_tile, step);
                    load_input(slot.stage, row, step);
                }
                slot.advance<COPY_WARPS>();
            }
            step -= schedule.steps;
        }
    }
};

// ---- the norm's warps: the factor of each row of a tile, from the partial sums of squares ----

// Partial sums 4 i to 4 i + 3 of a row; zero where there are none.
__device__ __forceinline__ float4 four_sums(const LinearParams& p, int row, int i) {
    float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row >= p.rows) return sums;
    const float* first = p.square_sums + static_cast<long long>(row) * p.sum_tiles + 4 * i;
    if (p.sum_tiles % 4 == 0) return load_ahead(first);
    sums.x = load_global_fresh<float>(first);
    if (4 * i + 1 < p.sum_tiles) sums.y = load_global_fresh<float>(first + 1);
    if (4 * i + 2 < p.sum_tiles) sums.z = load_global_fresh<float>(first + 2);
    if (4 * i + 3 < p.sum_tiles) sums.w = load_global_fresh<float>(first + 3);
    return sums;
}

// Four lanes a row, as in all linear kernels; BATCH rows of a lane are asked for at once.
__device__ __forceinline__ void measure_rows(const LinearParams& p, const Shared smem, const Schedule schedule) {
    constexpr int LANES = 4, ROWS = NORM_THREADS / LANES, BATCH = 4;
    const int lane = threadIdx.x % LANES, first = (threadIdx.x - 32 * COPY_WARPS) / LANES;
#pragma unroll 1
    for (int turn = 0, tile; (tile = schedule.tile(turn)) < schedule.tiles; ++turn) {
        const int slot = turn % FACTOR_SLOTS;
        mbarrier_wait(smem.factors_empty(slot), (turn / FACTOR_SLOTS & 1) ^ 1);
        const int first_row = schedule.first_row(tile);
#pragma unroll 1
        for (int start = first; start < TILE_ROWS; start += BATCH * ROWS) {
            float partial[BATCH] = {};
#pragma unroll 1
            for (int i = lane; 4 * i < p.sum_tiles; i += LANES) {
                float4 sums[BATCH];
#pragma unroll
                for (int k = 0; k < BATCH; ++k) {
                    sums[k] = four_sums(p, first_row + start + k * ROWS, i);
                }
#pragma unroll
                for (int k = 0; k < BATCH; ++k) partial[k] += sum4(sums[k]);
            }
#pragma unroll
            for (int k = 0; k < BATCH; ++k) {
                const float factor = factor_of_sum(p, partial[k]);
                const int row = start + k * ROWS;
                if (lane == 0 && row < TILE_ROWS) store_shared<float>(smem.factor(slot, row), factor);
            }
        }
        mbarrier_arrive(smem.factors_full(slot));
    }
}

// ---- the warpgroups that compute ----

using Fragments = u32[PRODUCTS][4];

// Weights of 16 of the depth: each lane's words of its warp's 16-feature tiles.
__device__ __forceinline__ void load_fragments(Fragments& a, u32 address) {
#pragma unroll
    for (int n = 0; n < PRODUCTS; ++n) {
        const uint4 words = load_shared<uint4>(address + n * PACKED_STEP_BYTES);
        a[n][0] = words.x;
        a[n][1] = words.y;
        a[n][2] = words.z;
        a[n][3] = words.w;
    }
}

// The blocks of a cluster hold the same tile, summed over different parts of the depth. Each takes END_ROWS rows of it
// and adds what all blocks have of them, in the order of their ranks. The others' parts come into an area of their own,
// where a barrier counts their bytes: no block waits for another but for these. Values 4 i to 4 i + 3 of all consumer
// threads lie side by side; the threads hold the same places in every block.
__device__ __forceinline__ void merge(const Shared smem, int rank, const float (&d)[PRODUCTS][ACCUMULATORS],
                                      float (&sum)[PRODUCTS][END_ACCUMULATORS]) {
    constexpr u32 FOUR_BYTES = CONSUMERS * WARPGROUP * 16;
    const u32 mine = smem.landing + (threadIdx.x - WARPGROUP) * 16;
    cluster_wait();  // every block has begun
#pragma unroll
    for (int to = 0; to < SPLITS; ++to) {
        if (to != rank) {
            const u32 part = mine + (rank - (rank > to)) * PART_BYTES;
#pragma unroll
            for (int n = 0; n < PRODUCTS; ++n)
#pragma unroll
                for (int i = 0; i < END_ACCUMULATORS; i += 4) {
                    const float* const four = &d[n][to * END_ACCUMULATORS + i];
                    transfer_store(part + (n * END_ACCUMULATORS + i) / 4 * FOUR_BYTES, smem.landed, to,
                                   make_float4(four[0], four[1], four[2], four[3]));
                }
        } else {
#pragma unroll
            for (int n = 0; n < PRODUCTS; ++n)
#pragma unroll
                for (int i = 0; i < END_ACCUMULATORS; ++i) sum[n][i] = d[n][to * END_ACCUMULATORS + i];
        }
    }
    transfer_wait(smem.landed);
#pragma unroll
    for (int n = 0; n < PRODUCTS; ++n)
#pragma unroll
        for (int i = 0; i < END_ACCUMULATORS; i += 4) {
            const u32 four = mine + (n * END_ACCUMULATORS + i) / 4 * FOUR_BYTES;
            const float4 own = make_float4(sum[n][i], sum[n][i + 1], sum[n][i + 2], sum[n][i + 3]);
            float4 total = rank == 0 ? own : load_shared<float4>(four);
#pragma unroll
            for (int from = 1; from < SPLITS; ++from) {
                const float4 part =
                    from == rank ? own : load_shared<float4>(four + (from - (from > rank)) * PART_BYTES);
                total = make_float4(total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w);
            }
            sum[n][i] = total.x;
            sum[n][i + 1] = total.y;
            sum[n][i + 2] = total.z;
            sum[n][i + 3] = total.w;
        }
}

__device__ __forceinline__ void consume(const LinearParams& p, const Shared smem, const Schedule schedule,
                                        int consumer) {
    const int group = consumer / WARPGROUPS, member = consumer % WARPGROUPS;
    const int warp = threadIdx.x % WARPGROUP / 32, lane = threadIdx.x % 32;
    const bool leader = lane == 0;
    grid_dependency_wait();
    const u32 fragments = smem.weights + (member * 4 + warp) * PRODUCTS * PACKED_STEP_BYTES + lane * 16;
    const u64 input = descriptor_k_major(smem.input);
    const int steps = schedule.steps;
    const int rank = SPLITS == 1 ? 0 : static_cast<int>(cluster_rank());
    constexpr int GROUP_BARRIER = 1 + CONSUMERS;  // of group 0; the first ones are the warpgroups' own
    // A group enters the ring only when the other has passed through it: a parity tells two phases apart, not three.
    if (GROUPS == 2 && group == 1) named_barrier_arrive(GROUP_BARRIER, CONSUMERS * WARPGROUP);

#pragma unroll 1
    for (int turn = group, index; (index = schedule.tile(turn)) < schedule.tiles; turn += GROUPS) {
        const Place place{schedule.first_feature(index) + (member * 4 + warp) * WARP_FEATURES,
                          schedule.first_feature(index) + member * WARPGROUP_FEATURES,
                          schedule.first_row(index) + rank * END_ROWS};
        End end(p, place);
        float d_rmem[PRODUCTS][ACCUMULATORS];
        Fragments a_rmem[STEP_PRODUCTS];
        Slot slot(turn * steps);
        int last = 0;
        if (GROUPS == 2) named_barrier_sync(GROUP_BARRIER + group, CONSUMERS * WARPGROUP);

        // D += W X^T, DEPTH_STEP deep. Weights are in registers two products ahead, and while two products are under way
        // they are loaded into those of the product before: the next one waits for neither.
        if (steps > 0) {
            mbarrier_wait(smem.full(slot.stage), slot.parity);
#pragma unroll
            for (int k = 0; k < AHEAD; ++k)
                load_fragments(a_rmem[k], fragments + slot.stage * WEIGHT_BYTES + k * PACKED_BYTES);
        }
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            u32 weights = fragments + slot.stage * WEIGHT_BYTES;
            const u64 b = input + slot.stage * (INPUT_BYTES >> 4);
            const int stage = slot.stage;
            slot.advance();
#pragma unroll
            for (int k = 0; k < STEP_PRODUCTS; ++k) {
                products_fence();
#pragma unroll
                for (int n = 0; n < PRODUCTS; ++n) product(d_rmem[n], a_rmem[k][n], b + 2 * k, step + k > 0);
                wgmma_commit();
                products_wait<STEP_PRODUCTS - AHEAD>();
                if (k == STEP_PRODUCTS - AHEAD - 1 && step > 0 && leader) mbarrier_arrive(smem.empty(last));
                if (k == STEP_PRODUCTS - AHEAD && step + 1 < steps) {
                    mbarrier_wait(smem.full(slot.stage), slot.parity);
                    weights = fragments + slot.stage * WEIGHT_BYTES;
                }
                const int next = (k + AHEAD) % STEP_PRODUCTS;
                if (k + AHEAD < STEP_PRODUCTS || step + 1 < steps)
                    load_fragments(a_rmem[next], weights + next * PACKED_BYTES);
            }
            last = stage;
        }
        if (GROUPS == 2) named_barrier_arrive(GROUP_BARRIER + (group ^ 1), CONSUMERS * WARPGROUP);
        products_wait<0>();
#pragma unroll
        for (int n = 0; n < PRODUCTS; ++n) hold_accumulators(d_rmem[n]);
        if (leader) mbarrier_arrive(smem.empty(last));

        const int factor_slot = turn % FACTOR_SLOTS;
        if (p.square_sums) mbarrier_wait(smem.factors_full(factor_slot), turn / FACTOR_SLOTS & 1);
        const u32 staging = smem.staging + consumer * STAGING_BYTES,
                  factors = smem.factor(factor_slot, rank * END_ROWS);
#if SPLITS == 1
        end.finish(p, place, staging, factors, 1 + consumer, d_rmem);
#else
        float sum_rmem[PRODUCTS][END_ACCUMULATORS];
        merge(smem, rank, d_rmem, sum_rmem);
        end.finish(p, place, staging, factors, 1 + consumer, sum_rmem);
#endif
        __syncwarp();  // all lanes have read the factors
        if (p.square_sums && leader) mbarrier_arrive(smem.factors_empty(factor_slot));
    }
}

#if SPLITS > 1
#define CLUSTER __cluster_dims__(SPLITS, 1, 1)
#else
#define CLUSTER
#endif

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, BLOCKS)
    linear_hopper(const __grid_constant__ LinearHopperParams params) {
    grid_dependency_launch();
    const LinearParams& p = params.linear;
    const Shared smem(shared_base());
    const Schedule schedule(p);
    const Producer producer{&params.input, &params.weights, smem, schedule};
    if (threadIdx.x == 0) {
        tma_prefetch_map(&params.weights);
        tma_prefetch_map(&params.input);
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(smem.full(stage), 1);
            mbarrier_init(smem.empty(stage), GROUP_WARPS);
        }
        for (int slot = 0; slot < FACTOR_SLOTS; ++slot) {
            mbarrier_init(smem.factors_full(slot), NORM_THREADS);
            mbarrier_init(smem.factors_empty(slot), GROUP_WARPS);
        }
        if (SPLITS > 1) {
            transfer_init(smem.landed);
            transfer_expect(smem.landed, LANDING_BYTES);
        }
        mbarrier_init_fence();
    }
    const bool at_work = schedule.tile(0) < schedule.tiles;
    const int first_row = opaque(schedule.first_row(schedule.tile(0)));
    if (threadIdx.x < 32) {
        __syncwarp();
        if (at_work)
            producer.begin(opaque(schedule.first_feature(schedule.tile(0)) / TILE_FEATURES), first_row, p.rows);
    }
    __syncthreads();  // the barriers are ready
    if (SPLITS > 1) cluster_arrive();

    // The same in all lanes of a warp, and known to be so: roles are branches of whole warps.
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    // Whether there is a norm is asked at run time: without its warps the compiler was seen to hold the consumers to the
    // registers of the launch, and to make every product wait for the one before.
    if (warpgroup == 0) {
        if constexpr (PRODUCER_REGISTERS > 0) registers_release<PRODUCER_REGISTERS>();
        grid_dependency_wait();
        const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
        if (warp < COPY_WARPS && at_work) producer.run(warp, first_row);
        if (p.square_sums && warp >= COPY_WARPS) measure_rows(p, smem, schedule);
    } else {
        if constexpr (CONSUMER_REGISTERS > 0) registers_claim<CONSUMER_REGISTERS>();
        consume(p, smem, schedule, warpgroup - 1);
    }
}
