// How a decode block of threads is laid over keys, values and query rows.
//
// The keys of a sequence are taken in blocks of BLOCK_KEYS. For each block the warps share the keys out among
// themselves for the scores (WARP_KEYS each) and the output dimensions for the weighted sum (WARP_DIMS each), so that
// no output has to be added up across warps: only the scores, a few KB, pass between them.
//
// Each warp therefore loads what it alone reads, into shared memory of its own, asynchronously: its keys of all
// dimensions and its dimensions of all values. No barrier stands between memory and arithmetic; a lane even reads the
// very chunks of K that it copied.
#pragma once

#include "device.cuh"

constexpr int WARP_DIMS = 32;  // output dimensions of one warp
constexpr int WARPS = HEAD_DIM / WARP_DIMS;
constexpr int THREADS = WARPS * WARP_LANES;
constexpr int CHUNK = 16 / static_cast<int>(sizeof(Element));  // elements of one 128-bit copy
constexpr int TILE_CHUNKS = 8;                                 // copies of one lane for a block's keys, or its values
constexpr int BLOCK_KEYS = TILE_CHUNKS * CHUNK;                // 64 keys of half precision, 32 of fp32
constexpr int WARP_KEYS = BLOCK_KEYS / WARPS;
constexpr int KEY_ROWS = WARP_KEYS / 8;             // keys of one lane for the scores: lane / 4, lane / 4 + 8, ...
constexpr int KEY_CHUNKS = TILE_CHUNKS / KEY_ROWS;  // of each it has the chunks lane % 4, lane % 4 + 4, ...
constexpr int VALUE_CHUNKS = WARP_DIMS / CHUNK;     // of one key in a warp's part of the values
constexpr int SCORE_STRIDE = BLOCK_KEYS + 8;        // floats a row: eight rows on eight sets of banks

constexpr int WARP_TILE_BYTES = TILE_CHUNKS * WARP_LANES * 16;  // 4 KB of keys, or of values

// Shared address of the lane's chunk j of its key row n.
DEVICE unsigned key_slot(unsigned tile, int n, int j) {
    return tile + ((n * KEY_CHUNKS + j) * WARP_LANES + lane_index()) * 16;
}

// Shared address of a chunk of a key's values. Eight keys of one chunk, which ldmatrix takes together, lie in eight
// different sets of banks.
DEVICE unsigned value_slot(unsigned tile, int key, int chunk) {
    return tile + key * (VALUE_CHUNKS * 16) + (chunk ^ (key / 2 % VALUE_CHUNKS)) * 16;
}

// Issues the copies of this warp's keys of the block that begins at key `first`. Past `count` keys zeros are written
// and nothing is read: what the unused part of a cache holds never enters the arithmetic.
DEVICE void load_keys(unsigned tile, const Element* keys, long long token_stride, int first, int count) {
    const int key = first + warp_index() * WARP_KEYS + lane_index() / 4;
#pragma unroll
    for (int n = 0; n < KEY_ROWS; ++n) {
        const Element* row = keys + (key + 8 * n) * token_stride + lane_index() % 4 * CHUNK;
#pragma unroll
        for (int j = 0; j < KEY_CHUNKS; ++j) {
            copy_async_16(key_slot(tile, n, j), row + 4 * j * CHUNK, key + 8 * n < count);
        }
    }
}

// The same for this warp's dimensions of the values.
DEVICE void load_values(unsigned tile, const Element* values, long long token_stride, int first, int count) {
    const int key = lane_index() / VALUE_CHUNKS, chunk = lane_index() % VALUE_CHUNKS;
    const Element* lane = values + warp_index() * WARP_DIMS + chunk * CHUNK;
#pragma unroll
    for (int i = 0; i < TILE_CHUNKS; ++i) {
        const int row = key + i * (WARP_LANES / VALUE_CHUNKS);
        copy_async_16(value_slot(tile, row, chunk), lane + (first + row) * token_stride, first + row < count);
    }
}

// Which keys a query row sees. Row r of a sequence is query r / GROUP, head r % GROUP of the key-value head.
struct Visibility {
    int keys;       // of the sequence
    int queries;    // of the sequence
    int first_row;  // of this thread block

    // Keys before this one are seen by `row` of the thread block: aligned bottom right, so that the last query sees
    // every key. Zero or less where the row sees nothing.
    DEVICE int end(int row) const { return CAUSAL ? keys - queries + 1 + (first_row + row) / GROUP : keys; }
};

DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // the other one where one is NaN
