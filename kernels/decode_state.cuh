// The running result of a decode thread block, how the keys of a sequence are cut into splits, and the workspace in
// which several thread blocks put their splits together.
#pragma once

#include "attention_params.cuh"
#include "decode_tile.cuh"
#include "softmax_state.cuh"

// One query row, for HELD_DIMS output dimensions of one thread.
struct RowState {
    static constexpr int VECTORS = HELD_DIMS / 4 + 1;  // 128-bit words in memory: 12 floats for 10, or 4 for 3

    SoftmaxState softmax;
    float acc[HELD_DIMS];

    DEVICE void clear() {
        softmax = SoftmaxState::empty();
#pragma unroll
        for (int d = 0; d < HELD_DIMS; ++d) acc[d] = 0.0f;
    }

    // Takes in the state of the keys that follow. Merging into an empty state copies, bit for bit.
    DEVICE void merge(const RowState& next) {
        float own, theirs;
        softmax.merge(next.softmax, own, theirs);
#pragma unroll
        for (int d = 0; d < HELD_DIMS; ++d) merge_dim(d, next.acc[d], own, theirs);
    }
    DEVICE void merge_dim(int d, float next, float own, float theirs) {
        acc[d] = fused_multiply_add(next, theirs, acc[d] * own);
    }

    DEVICE float4 vector(int i) const {
        if (i < HELD_DIMS / 4) return make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
        return make_float4(softmax.max, softmax.sum, HELD_DIMS == 1 ? acc[0] : 0.0f, 0.0f);
    }

    DEVICE void set_vector(int i, float4 v) {
        if (i < HELD_DIMS / 4) {
            acc[4 * i] = v.x, acc[4 * i + 1] = v.y, acc[4 * i + 2] = v.z, acc[4 * i + 3] = v.w;
        } else {
            softmax = {v.x, v.y};
            if (HELD_DIMS == 1) acc[0] = v.z;
        }
    }
};

DEVICE void clear(RowState (&rows)[HELD_ROWS]) {
#pragma unroll
    for (int i = 0; i < HELD_ROWS; ++i) rows[i].clear();
}

// Rows of the keys that follow into `rows`.
DEVICE void merge(RowState (&rows)[HELD_ROWS], const RowState (&next)[HELD_ROWS]) {
#pragma unroll
    for (int i = 0; i < HELD_ROWS; ++i) rows[i].merge(next[i]);
}

// Blocks in a split of a sequence of `keys` keys: the smallest power of two for which a split has no more blocks to
// go through one after the other than half the sequence has splits to merge one after the other; 1 up to 2,048 keys
// (512 in fp32).
DEVICE int split_blocks(int keys) {
    int blocks = 1;
    while (static_cast<long long>(blocks) * BLOCK_KEYS * blocks * BLOCK_KEYS < 2ll * keys) blocks *= 2;
    return blocks;
}

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The most splits that a sequence of up to `capacity` keys can have: of all of them, or just before the size doubles.
DEVICE int most_splits(int capacity) {
    const int blocks = split_blocks(capacity);
    const int splits = ceil_div(capacity, blocks * BLOCK_KEYS), before = blocks * BLOCK_KEYS / 4;
    return blocks > 1 && before > splits ? before : splits;
}

// Bytes to this thread's vector of a row that it holds, among those of a thread block: threads side by side.
DEVICE int state_offset(int held, int vector) {
    return ((held * RowState::VECTORS + vector) * THREADS + static_cast<int>(threadIdx.x)) * 16;
}
constexpr int STATE_BYTES = HELD_ROWS * RowState::VECTORS * THREADS * 16;

// The merged state of the splits so far, where one thread block takes them all and each has several blocks. In shared
// memory, because it is seldom touched and its registers are dear; every thread reads only what it wrote.
struct Total {
    unsigned smem;

    DEVICE void store(const RowState (&rows)[HELD_ROWS]) const {
#pragma unroll
        for (int i = 0; i < HELD_ROWS; ++i) {
#pragma unroll
            for (int v = 0; v < RowState::VECTORS; ++v) store_shared(smem + state_offset(i, v), rows[i].vector(v));
        }
    }
    DEVICE void load(RowState (&rows)[HELD_ROWS]) const {
#pragma unroll
        for (int i = 0; i < HELD_ROWS; ++i) {
#pragma unroll
            for (int v = 0; v < RowState::VECTORS; ++v) {
                rows[i].set_vector(v, load_shared<float4>(smem + state_offset(i, v)));
            }
        }
    }
    DEVICE void merge(const RowState (&next)[HELD_ROWS]) const {
        RowState rows[HELD_ROWS];
        load(rows);
        ::merge(rows, next);
        store(rows);
    }
};

// The splits of a sequence, and the share of them that one of `of` thread blocks has: whole splits, in order.
struct Splits {
    int blocks;      // in a split
    int count;       // of the sequence
    int shares;      // thread blocks that have something to do, at least 1
    int first;       // split of this share
    int begin, end;  // blocks of this share

    DEVICE Splits(int keys, int share, int of) {
        blocks = split_blocks(keys);
        const int all_blocks = ceil_div(keys, BLOCK_KEYS);
        count = ceil_div(all_blocks, blocks);
        const int each = of == 1 ? count : ceil_div(count, of);
        shares = count <= each ? 1 : ceil_div(count, each);
        first = share * each;
        begin = first * blocks;
        end = begin + each * blocks < all_blocks ? begin + each * blocks : all_blocks;
    }
};

constexpr int ARRIVAL_BYTES = 16384;  // of the workspace: 4,096 counters, all zero before and after every launch

// The states of the splits of one (sequence, key-value head, row group), as its thread blocks leave them.
struct Workspace {
    unsigned* arrivals;  // thread blocks that have finished; the last sets it back to 0
    char* states;        // STATE_BYTES for each split
    int live_rows;       // rows of the thread block that exist; the others are neither written nor read

    DEVICE Workspace(const AttentionParams& params, int row_group, int live) : live_rows(live) {
        const int row_groups = gridDim.x / params.splits;
        const int slot = (blockIdx.z * gridDim.y + blockIdx.y) * row_groups + row_group;
        arrivals = static_cast<unsigned*>(params.workspace) + slot;
        states = static_cast<char*>(params.workspace) + ARRIVAL_BYTES
                 + static_cast<long long>(slot) * most_splits(params.seqlen_k) * STATE_BYTES;
    }

    DEVICE void store(int split, const RowState (&state)[HELD_ROWS]) const {
        char* at = states + static_cast<long long>(split) * STATE_BYTES;
#pragma unroll
        for (int i = 0; i < HELD_ROWS; ++i) {
            if (held_row(i) >= live_rows) continue;
#pragma unroll
            for (int v = 0; v < RowState::VECTORS; ++v) store_global(at + state_offset(i, v), state[i].vector(v));
        }
    }

    DEVICE void load(int split, RowState (&state)[HELD_ROWS]) const {
        const char* at = states + static_cast<long long>(split) * STATE_BYTES;
#pragma unroll
        for (int i = 0; i < HELD_ROWS; ++i) {
            state[i].clear();
            if (held_row(i) >= live_rows) continue;
#pragma unroll
            for (int v = 0; v < RowState::VECTORS; ++v) {
                state[i].set_vector(v, load_global_fresh<float4>(at + state_offset(i, v)));
            }
        }
    }

    // True in the thread block that finishes last of `blocks`; it sees what the others stored.
    DEVICE bool last_to_arrive(int blocks, unsigned flag_smem) const {
        sync_block();  // this block's states are stored
        if (threadIdx.x == 0) {
            fence_device();
            store_shared<unsigned>(flag_smem, atomic_increment(arrivals, blocks - 1));
            fence_device();
        }
        sync_block();  // the flag is written
        return load_shared<unsigned>(flag_smem) == static_cast<unsigned>(blocks - 1);
    }

    // The states of the splits 0 to `splits` - 1 merged in order; several are on their way at a time.
    DEVICE void merge(int splits, RowState (&total)[HELD_ROWS]) const {
        constexpr int AT_ONCE = 8 / HELD_ROWS > 0 ? 8 / HELD_ROWS : 1;
        for (int split = 0; split < splits; split += AT_ONCE) {
            RowState next[AT_ONCE][HELD_ROWS];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                if (split + i < splits) load(split + i, next[i]);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                if (split + i < splits) ::merge(total, next[i]);
            }
        }
    }
};
