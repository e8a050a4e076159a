// Attention of a decode step: one new token for each row, its head norms, rotation and cache write included.
//
//   q, k = rope(norm(raw)); cache[position] = k, v; out = softmax(scale q K^T) V over the keys 0 .. position
//
// The arithmetic on keys and values is that of attention_decode.cu, from the same headers: splits by the sequence's own
// length, each reduced from a fresh state, merged in order. Which thread blocks do it changes no bit.
//
// Latency is what a step for one voice consists of, so nothing waits for what can be guessed. Before
// grid_dependency_wait the block reads slot and position, which may be a step old, and asks for those keys and values
// in the second-level cache. Behind the wait it asks for slot and position again and, before they come, starts the
// copies that the guess stands for; hardly ever do they have to be started anew. Raw products become queries while the
// copies are on their way. The newest key and value go from registers to shared memory; nobody reads them from the
// cache in this step.
//
// Hardly any memory is read meanwhile. Blocks beyond those of the rows use the time: they ask for the weights of the
// products to come in the second-level cache.
//
// Compile-time: HEAD_DIM 32, 64 or 128; GROUP; CAUSAL 0; DTYPE_FP16 or DTYPE_BF16; TILE_ROWS 8, 16 or 32; STAGES 1 or
// 2; CLUSTER: thread blocks of a cluster, which then are the blocks of a sequence; 1: none.
// Launch (soprano_cupy/gpu/step.py): grid (row groups x splits, num_kv_heads, rows, and more for what
// lies ahead), HEAD_DIM threads.
#include "attention_params.cuh"
#include "device.cuh"
#include "softmax_state.cuh"
#include "decode_tile.cuh"
#include "decode_mma.cuh"
#include "decode_state.cuh"
#include "step_params.cuh"
#include "step_newest.cuh"
#include "step_merge.cuh"

// Shared memory, in bytes; soprano_cupy/gpu/step.py counts the same.
constexpr int SCORE_BYTES = MATRIX_ROWS * SCORE_STRIDE * 4;
constexpr int VALUES_AT = WARPS * WARP_TILE_BYTES;  // behind the keys
constexpr int STAGE_BYTES = VALUES_AT + WARPS * WARP_TILE_BYTES;
constexpr int SCORES_AT = STAGES * STAGE_BYTES;  // two buffers
constexpr int NEWEST_AT = SCORES_AT + 2 * SCORE_BYTES;
constexpr int ARRIVAL_AT = NEWEST_AT + NEWEST_BYTES;  // a word, or a cluster's barrier of 8 bytes
constexpr int QUERIES_AT = ARRIVAL_AT + 16;
// STATE_BYTES of a block that takes all splits, or of a cluster SPLIT_BYTES for each split
constexpr int TOTAL_AT = QUERIES_AT + TILE_ROWS * QUERY_STRIDE;

constexpr int WARPS_PER_MULTIPROCESSOR = TILE_ROWS == 8 ? 16 : TILE_ROWS == 16 ? 12 : 8;

constexpr int LINE_CHUNKS = 2;  // of a lane's key chunks in one line of the caches: 128 bytes

// Keys and values of one sequence and key-value head.
struct Cached {
    Element *keys, *values;
    long long token_stride;

    DEVICE Cached(const AttentionStepParams& params, int slot) {
        token_stride = static_cast<long long>(gridDim.y) * HEAD_DIM;
        const long long offset = slot * params.capacity * token_stride + blockIdx.y * HEAD_DIM;
        keys = static_cast<Element*>(params.keys) + offset;
        values = static_cast<Element*>(params.values) + offset;
    }
};

// How many blocks share the splits of a sequence. In a cluster every split has a block, as far as those go: merging
// costs less there than a second split does.
DEVICE int count_shares(const Splits& splits, int thread_blocks) {
    if (CLUSTER == 1) return splits.shares(thread_blocks);
    return splits.count < thread_blocks ? splits.count : thread_blocks;
}

// A row's slot and the place of its new token; slot -1: nothing to do.
struct Place {
    int slot, position;

    DEVICE bool operator==(const Place& other) const { return slot == other.slot && position == other.position; }

    // What is there now; before grid_dependency_wait it may be a step old. `likely`, if not null: the position of the
    // slot that will be there, asked for at the same time; settle asks for that of another slot.
    DEVICE static Place read(const int* slot_of_row, const int* likely) {
        Place place{load_global_fresh<int>(slot_of_row), 0};
        if (likely != nullptr) place.position = load_global_fresh<int>(likely);
        return place;
    }
    DEVICE void settle(const AttentionStepParams& params, int likely_slot) {
        if (slot >= 0 && slot != likely_slot) position = load_global_fresh<int>(&params.slots[slot].position);
        if (slot < 0 || position < 0 || position >= params.capacity) *this = {-1, 0};
    }
};

// The copies of the first blocks of keys and values of a share, of the keys before the newest, by this lane. Where they
// go is as in load_keys and load_values.
struct FirstCopies {
    const Element *keys[STAGES], *values[STAGES];  // of the lane's first key, and first value, of a block
    int keys_left[STAGES], values_left[STAGES];    // keys from that one on; none or less: nothing to read
    long long token_stride;
    static constexpr int VALUES_AT_ONCE = WARP_LANES / VALUE_CHUNKS;

    DEVICE FirstCopies(const AttentionStepParams& params, const Place& place, int share) {
        const Cached cached(params, place.slot);
        const Splits splits(place.position + 1);
        const int shares = count_shares(splits, params.splits);
        const int key = warp_index() * WARP_KEYS + lane_index() / 4, value = lane_index() / VALUE_CHUNKS;
        token_stride = cached.token_stride;
        int block = share << splits.shift;
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            const int first = block * BLOCK_KEYS;
            keys[stage] = cached.keys + (first + key) * token_stride + lane_index() % 4 * CHUNK;
            values[stage] = cached.values + (first + value) * token_stride + warp_index() * WARP_DIMS +
                            lane_index() % VALUE_CHUNKS * CHUNK;
            keys_left[stage] = place.slot < 0 ? 0 : place.position - first - key;
            values_left[stage] = place.slot < 0 ? 0 : place.position - first - value;
            block = splits.after(block, shares);
        }
    }
    // Asks for them in the second-level cache. It also has their addresses ready.
    DEVICE void prefetch() const {
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
#pragma unroll
            for (int n = 0; n < KEY_ROWS; ++n) {
#pragma unroll
                for (int j = 0; j < KEY_CHUNKS; j += LINE_CHUNKS) {
                    if (8 * n < keys_left[stage]) prefetch_l2(keys[stage] + 8 * n * token_stride + 4 * j * CHUNK);
                }
            }
#pragma unroll
            for (int i = 0; i < TILE_CHUNKS; ++i) {
                if (i * VALUES_AT_ONCE >= values_left[stage]) continue;
                prefetch_l2(values[stage] + i * VALUES_AT_ONCE * token_stride);
            }
        }
    }
    // A group of keys and one of values for each stage.
    DEVICE void start(unsigned first_stage) const {
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            const unsigned keys_smem = first_stage + stage * STAGE_BYTES, values_smem = keys_smem + VALUES_AT;
#pragma unroll
            for (int n = 0; n < KEY_ROWS; ++n) {
#pragma unroll
                for (int j = 0; j < KEY_CHUNKS; ++j) {
                    copy_async_16(key_slot(keys_smem, n, j), keys[stage] + 8 * n * token_stride + 4 * j * CHUNK,
                                  8 * n < keys_left[stage]);
                }
            }
            copy_async_commit();
#pragma unroll
            for (int i = 0; i < TILE_CHUNKS; ++i) {
                const int value = lane_index() / VALUE_CHUNKS + i * VALUES_AT_ONCE;
                copy_async_16(value_slot(values_smem, value, lane_index() % VALUE_CHUNKS),
                              values[stage] + i * VALUES_AT_ONCE * token_stride,
                              i * VALUES_AT_ONCE < values_left[stage]);
            }
            copy_async_commit();
        }
    }
};

DEVICE AttentionParams workspace_params(const AttentionStepParams& params) {
    AttentionParams p;
    p.seqlen_q = 1;
    p.seqlen_k = params.capacity;
    p.workspace = params.workspace;
    return p;
}

DEVICE void store_rows(const AttentionStepParams& params, int first_row, const RowState (&state)[HELD_ROWS]) {
#pragma unroll
    for (int i = 0; i < HELD_ROWS; ++i) {
        const int head = first_row + held_row(i);
        if (head >= GROUP) continue;
        const long long row = static_cast<long long>(blockIdx.z) * params.attended_stride;
        store_output(static_cast<Element*>(params.attended) + row + (blockIdx.y * GROUP + head) * HEAD_DIM +
                         warp_index() * WARP_DIMS,
                     state[i].acc, state[i].softmax.inverse_sum());
    }
}

DEVICE void fetch_ahead(const AttentionStepParams& params) {
    const int others = (gridDim.z - params.rows) * gridDim.y * gridDim.x;
    const int block = ((blockIdx.z - params.rows) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
#pragma unroll
    for (int i = 0; i < AHEAD_RANGES; ++i) {
#pragma unroll 1
        for (int line = block * THREADS + threadIdx.x; line < params.ahead_lines[i]; line += others * THREADS)
            prefetch_l2(params.ahead[i] + line * 128ll);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, WARPS_PER_MULTIPROCESSOR / WARPS)
    attention_step(const __grid_constant__ AttentionStepParams params) {
    grid_dependency_launch();
    if (static_cast<int>(blockIdx.z) >= params.rows) return fetch_ahead(params);
    const int row_group = GROUP <= TILE_ROWS ? 0 : blockIdx.x / params.splits;
    const int share = blockIdx.x - row_group * params.splits;  // takes the splits share, share + shares, ...
    const unsigned smem = shared_base(), first_stage = smem + warp_index() * WARP_TILE_BYTES;
#if CLUSTER > 1
    const SplitStates states(smem + ARRIVAL_AT, smem + TOTAL_AT);
    if (share == 0 && threadIdx.x == 0) states.prepare();
    sync_warp();
    cluster_arrive();
#endif

    Newest newest(params, row_group);
    newest.clear_unused(smem + QUERIES_AT);
    const int* slot_of_row = opaque_global(params.slot_of_row + blockIdx.z);
    Place guessed = Place::read(slot_of_row, nullptr);
    guessed.settle(params, -1);
    float4 angles = load_angles(params.rope, guessed.position);
    const int* likely = opaque_global(guessed.slot < 0 ? nullptr : &params.slots[guessed.slot].position);
    const FirstCopies copies(params, guessed, share);
    copies.prefetch();
    newest.make_ready();

    grid_dependency_wait();
    Place place = Place::read(slot_of_row, likely);
    newest.ask();
    sync_warp();                // keeps the compiler from putting those loads behind the copies
    copies.start(first_stage);  // of nothing where no slot was guessed
    place.settle(params, guessed.slot);
    if (!(place == guessed)) {
        copy_async_wait<0>();  // what the wrong guess has started; each lane asks for the same places again
        if (place.slot >= 0) FirstCopies(params, place, share).start(first_stage);
    }
    const int position = place.position;  // keys before this one are in the cache
    const Splits splits(position + 1);
    const int shares = count_shares(splits, params.splits);
    if (place.slot < 0 || share >= shares) {
        copy_async_wait<0>();
        return;
    }
    const Cached cached(params, place.slot);
    const int begin = share << splits.shift;

    if (position != guessed.position) angles = load_angles(params.rope, position);
    const int last_split = (splits.blocks - 1) >> splits.shift;
    const bool stores = row_group == 0 && share == last_split % shares;  // the newest key and value
    const long long offset = position * cached.token_stride;
    newest.finish(angles, params.epsilon, smem + QUERIES_AT, smem + NEWEST_AT, stores ? cached.keys + offset : nullptr,
                  stores ? cached.values + offset : nullptr);
#if CLUSTER > 1
    if (shares > 1 && share == 0 && threadIdx.x == 0) states.expect(splits.count);
    sync_warp();
    cluster_wait();  // the first block has begun
#else
    const Workspace workspace(workspace_params(params), row_group, GROUP - newest.first_row);
    const Total total{smem + TOTAL_AT};
#endif
    sync_block();  // the queries, the newest key and the newest value are written

    const Visibility visibility{position + 1, 1, newest.first_row};
    RowState state[HELD_ROWS];  // of the split under way
    clear(state);

    unsigned keys_smem = first_stage, scores_smem = smem + SCORES_AT;
    int next;
    for (int block = begin; block < splits.blocks; block = next) {
        next = splits.after(block, shares);
        const int ahead = STAGES == 1 ? next : splits.after(next, shares);  // the block to ask for
        const bool has_newest = block == splits.blocks - 1;
        const unsigned values_smem = keys_smem + VALUES_AT;
        copy_async_wait<2 * STAGES - 1>();  // the keys are there; the values may still be on their way
        if (has_newest) put_key(keys_smem, smem + NEWEST_AT, block * BLOCK_KEYS, position);
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            write_scores(tile, keys_smem, smem + QUERIES_AT, scores_smem, params.scale_log2, block * BLOCK_KEYS,
                         visibility);
            if (tile == ROW_TILES - 1) {
                if (ahead < splits.blocks) {
                    load_keys(keys_smem, cached.keys, cached.token_stride, ahead * BLOCK_KEYS, position);
                }
                copy_async_commit();
            }
            if (tile == 0) {
                copy_async_wait<2 * STAGES - (ROW_TILES == 1 ? 1 : 2)>();  // the values
                if (has_newest) put_value(values_smem, smem + NEWEST_AT, block * BLOCK_KEYS, position);
            }
            sync_block();  // scores and values are there; the other buffer's readers were done before they came here

            merge_values(values_smem, scores_smem, 0u, state + tile * TILE_HELD);
            scores_smem = scores_smem == smem + SCORES_AT ? smem + SCORES_AT + SCORE_BYTES : smem + SCORES_AT;
        }
        sync_warp();  // this warp's lanes have read the values
        if (ahead < splits.blocks) {
            load_values(values_smem, cached.values, cached.token_stride, ahead * BLOCK_KEYS, position);
        }
        copy_async_commit();
        keys_smem = STAGES == 2 && keys_smem == first_stage ? first_stage + STAGE_BYTES : first_stage;

        if (!splits.ends(block)) continue;
#if CLUSTER > 1
        if (shares == 1) continue;  // the only split there is
        states.send(block >> splits.shift, state);
#else
        if (shares == 1 && splits.shift == 0) continue;  // alone, blocks are splits and merged already
        const int split = block >> splits.shift;
        if (shares > 1)
            workspace.store(split, state);
        else if (split == 0)
            total.store(state);
        else
            total.merge(state);
#endif
        clear(state);
    }
#if CLUSTER > 1
    if (share != 0) return;
    if (shares > 1) states.merge(splits.count, state);
#else
    if (shares > 1) {
        if (!workspace.last_to_arrive(shares, smem + ARRIVAL_AT)) return;
        workspace.merge(splits.count, state);
    } else if (splits.shift > 0) {
        total.load(state);
    }
#endif
    store_rows(params, newest.first_row, state);
}
