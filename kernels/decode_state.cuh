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

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A block of keys takes one thread block some 0.8 microseconds, and handing over and merging states 1.6 (H200).
constexpr int FEW_SPLITS = 3;

// How the keys of a sequence are cut. A split has 2^shift blocks: the least for which it has at most half as many keys
// to go through one block after the other as the sequence has splits to merge one after the other, 1 block up to 2,048
// keys (512 in fp32). Nothing else enters: the splits of a sequence are the same in every launch.
struct Splits {
    int shift;
    int blocks;  // of the sequence
    int count;   // splits of the sequence

    DEVICE explicit Splits(int keys) {
        shift = 0;
        while ((static_cast<long long>(BLOCK_KEYS * BLOCK_KEYS) << (2 * shift)) < 2ll * keys) ++shift;
        blocks = ceil_div(keys, BLOCK_KEYS);
        count = (blocks + (1 << shift) - 1) >> shift;
    }

    // How many of `thread_blocks` share the splits; the first takes all where they are so few that the merge
    // would cost more than it saves.
    DEVICE int shares(int thread_blocks) const {
        if (count <= FEW_SPLITS) return 1;
        return count < thread_blocks ? count : thread_blocks;
    }

    // Whether a block is the last of its split.
    DEVICE bool ends(int block) const { return (block + 1) >> shift != block >> shift || block + 1 == blocks; }

    // What a share takes after a block of its own: the next of the split, or the first of its next split; `blocks` or
    // more after its last.
    DEVICE int after(int block, int shares) const {
        return ends(block) ? ((block >> shift) + shares) << shift : block + 1;
    }

    // The most that a sequence of up to `capacity` keys can have: of all of them, or just before the size doubles.
    DEVICE static int most(int capacity) {
        const Splits all(capacity);
        const int before = (BLOCK_KEYS << all.shift) / 4;
        return all.shift > 0 && before > all.count ? before : all.count;
    }
};

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

constexpr int ARRIVAL_BYTES = 16384;  // of the workspace: 4,096 counters, all zero before and after every launch

// The states of the splits of one (sequence, key-value head, row group), as its thread blocks leave them.
struct Workspace {
    unsigned* arrivals;  // thread blocks that have finished; the last sets it back to 0
    char* states;        // STATE_BYTES for each split
    int live_rows;       // rows of the thread block that exist; the others are neither written nor read

    DEVICE Workspace(const AttentionParams& params, int row_group, int live) : live_rows(live) {
        const int row_groups = ceil_div(params.seqlen_q * GROUP, TILE_ROWS);
        const int slot = (blockIdx.z * gridDim.y + blockIdx.y) * row_groups + row_group;
        arrivals = static_cast<unsigned*>(params.workspace) + slot;
        states = static_cast<char*>(params.workspace) + ARRIVAL_BYTES +
                 static_cast<long long>(slot) * Splits::most(params.seqlen_k) * STATE_BYTES;
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
