// The prologue of a decode step's attention: the raw products of the newest token become queries, a key and a value in
// shared memory; one thread block stores the key and the value in the cache as well.
//
// Heads are units that the warps share out: first the query heads of this row group, then the key, then the value.
#pragma once

#include "decode_mma.cuh"
#include "decode_tile.cuh"
#include "head_pairs.cuh"
#include "step_params.cuh"

constexpr int LIVE_ROWS = GROUP < TILE_ROWS ? GROUP : TILE_ROWS;  // of a thread block; the last may have fewer
constexpr int UNITS = (LIVE_ROWS + 2 + WARPS - 1) / WARPS;        // of a warp
constexpr int UNITS_AT_ONCE = UNITS < 4 ? UNITS : 4;              // whose loads are under way together
constexpr int NEWEST_BYTES = 2 * HEAD_DIM * 2;                    // a key and a value

// Writes 32-bit word `word` of query row `row` in the order of store_query_chunk: x, z, y, w of each 128 bits.
DEVICE void store_query_word(unsigned queries, int row, int word, unsigned value) {
    const int within = word % 4, place = within == 1 ? 2 : within == 2 ? 1 : within;
    store_shared<unsigned>(queries + row * QUERY_STRIDE + word / 4 * 16 + place * 4, value);
}

struct Newest {
    const float* qkv;  // raw products of the row
    int heads, kv_heads;
    int first_row, rows;  // query heads of the key-value head: the first of this row group, and how many it has
    HeadPairs q_gain, k_gain;
    HeadPairs raw[UNITS_AT_ONCE];
    const float* sources[UNITS_AT_ONCE];

    DEVICE Newest(const AttentionStepParams& params, int row_group) {
        kv_heads = gridDim.y;
        heads = GROUP * kv_heads;
        qkv = params.qkv + static_cast<long long>(blockIdx.z) * (heads + 2 * kv_heads) * HEAD_DIM;
        first_row = row_group * TILE_ROWS;
        rows = GROUP - first_row < TILE_ROWS ? GROUP - first_row : TILE_ROWS;
        q_gain.load(params.q_gain);
        k_gain.load(params.k_gain);
    }

    // Zeros for the rows of the tile that never exist.
    DEVICE void clear_unused(unsigned queries) const {
        for (int i = threadIdx.x; i < (TILE_ROWS - LIVE_ROWS) * HALF_WORDS * 2; i += THREADS) {
            store_query_word(queries, LIVE_ROWS + i / (2 * HALF_WORDS), i % (2 * HALF_WORDS), 0u);
        }
    }

    DEVICE static int unit(int i) { return warp_index() + i * WARPS; }

    // Where the lane reads its part of a unit's raw head. What does not exist reads the first head, and is not looked
    // at: conditions would put the loads off.
    DEVICE const float* source(int u) const {
        const int kv_head = blockIdx.y;
        int head = kv_head * GROUP + first_row;
        if (u < rows) head += u;
        if (u == LIVE_ROWS || u == LIVE_ROWS + 1) head = heads + (u - LIVE_ROWS) * kv_heads + kv_head;
        return qkv + head * HEAD_DIM + (HeadPairs::holds() ? 2 * lane_index() : 0);
    }
    // Has the addresses of the first units ready before they are asked for: the compiler would put that off, had they
    // no use before. Those lines are being written in the second-level cache, so that no memory is read.
    DEVICE void make_ready() {
#pragma unroll
        for (int i = 0; i < UNITS_AT_ONCE; ++i) {
            sources[i] = opaque_global(source(unit(i)));
            prefetch_l2(sources[i]);
        }
    }
    DEVICE void ask() {
#pragma unroll
        for (int i = 0; i < UNITS_AT_ONCE; ++i) raw[i].load_fresh(sources[i]);
    }

    // newest: shared address of the key and value; null key and value: this thread block does not store them.
    DEVICE void finish(float4 angles, float epsilon, unsigned queries, unsigned newest, Element* key, Element* value) {
        for (int first = 0; first < UNITS; first += UNITS_AT_ONCE) {
            if (first > 0) {
#pragma unroll
                for (int i = 0; i < UNITS_AT_ONCE; ++i) sources[i] = source(unit(first + i));
                ask();
            }
            // without branches, so that the units' exchanges between lanes are under way together
#pragma unroll
            for (int i = 0; i < UNITS_AT_ONCE; ++i) {
                const int u = unit(first + i);
                if (!HeadPairs::holds()) raw[i].clear();
                HeadPairs turned = raw[i];
                turned.normalise(HeadPairs::select(u < LIVE_ROWS, q_gain, k_gain), epsilon);
                turned.rotate(angles);
                raw[i] = HeadPairs::select(u <= LIVE_ROWS, turned, raw[i]);
            }
#pragma unroll
            for (int i = 0; i < UNITS_AT_ONCE; ++i) store(raw[i], unit(first + i), queries, newest, key, value);
        }
    }

private:
    DEVICE void store(const HeadPairs& pairs, int u, unsigned queries, unsigned newest, Element* key,
                      Element* value) const {
        if (u >= LIVE_ROWS + 2 || !HeadPairs::holds()) return;
        const int low = lane_index(), high = HALF_WORDS + lane_index();
        if (u < LIVE_ROWS) {
            store_query_word(queries, u, low, pairs.low_word());
            store_query_word(queries, u, high, pairs.high_word());
            return;
        }
        const unsigned at = newest + (u - LIVE_ROWS) * HEAD_DIM * 2;
        store_shared<unsigned>(at + low * 4, pairs.low_word());
        store_shared<unsigned>(at + high * 4, pairs.high_word());
        Element* stored = u == LIVE_ROWS ? key : value;
        if (stored != nullptr) pairs.store(stored);
    }
};

// Puts the newest key in its place among this lane's, where the block that begins at key `first` has it and the lane's
// own copies have landed. The lane alone reads it there.
DEVICE void put_key(unsigned tile, unsigned newest, int first, int position) {
    const int key = first + warp_index() * WARP_KEYS + lane_index() / 4;
#pragma unroll
    for (int n = 0; n < KEY_ROWS; ++n) {
        if (key + 8 * n != position) continue;
#pragma unroll
        for (int j = 0; j < KEY_CHUNKS; ++j) {
            store_shared<uint4>(key_slot(tile, n, j), load_shared<uint4>(newest + (4 * j + lane_index() % 4) * 16));
        }
    }
}

// The same for the newest value; by the lane whose copies of zeros were there.
DEVICE void put_value(unsigned tile, unsigned newest, int first, int position) {
    constexpr int ROWS_AT_ONCE = WARP_LANES / VALUE_CHUNKS;
    const int row = position - first, chunk = lane_index() % VALUE_CHUNKS;
    if (row < 0 || row >= BLOCK_KEYS || row % ROWS_AT_ONCE != lane_index() / VALUE_CHUNKS) return;
    const unsigned value = newest + HEAD_DIM * 2 + warp_index() * (WARP_DIMS * 2) + chunk * 16;
    store_shared<uint4>(value_slot(tile, row, chunk), load_shared<uint4>(value));
}
