// A tile of 16-bit rows, HEAD_DIM long, in shared memory. A row is CHUNKS pieces of 16 bytes; piece c of row r is kept
// at place c XOR (a hash of r), so that the eight rows of one 8 x 8 matrix lie in different banks: load_matrix, the
// copies that fill a tile and the stores that drain it are all free of conflicts without padding.
#pragma once

#include "device.cuh"

constexpr int CHUNK = 8;  // elements in 16 bytes
constexpr int CHUNKS = HEAD_DIM / CHUNK;
constexpr int ROW_BYTES = HEAD_DIM * 2;

// Byte offset of piece `chunk` of row `row`. Rows of 64 bytes (HEAD_DIM 32) share a 128-byte line in pairs.
DEVICE unsigned tile_offset(int row, int chunk) {
    const int hash = CHUNKS >= 8 ? row & 7 : (row >> 1) & 3;
    return row * ROW_BYTES + ((chunk ^ hash) << 4);
}

// Moving two pieces along a row (16 columns) flips bits that neither the row nor the lower chunk bit touches, so it is
// one XOR on an address whose tile begins at a multiple of ROW_BYTES.
DEVICE unsigned step_columns(unsigned address, int steps) { return address ^ (steps << 5); }

// Addresses for load_matrix_x4, as offsets from the first row. For the A operand (16 rows x 16 columns), and for V
// with _trans (16 keys x 16 columns of the B operand): matrices down the rows, then along them.
DEVICE unsigned lane_offset_rows_first(int lane) { return tile_offset(lane & 15, lane >> 4); }

// For K as the B operand (16 keys x 16 of depth): matrices along a row first, then down.
DEVICE unsigned lane_offset_columns_first(int lane) {
    return tile_offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}

// Issues the copies of ROWS rows, all threads of the block sharing the work. Rows from `valid_rows` on are filled with
// zeros and never read. first_row: the row of index 0 in global memory; stride: elements from row to row.
template <int ROWS, int THREADS>
DEVICE void copy_tile_async(unsigned tile_smem, const Element* first_row, long long stride, int valid_rows) {
    constexpr int ROWS_AT_ONCE = THREADS / CHUNKS, PASSES = ROWS / ROWS_AT_ONCE;
    static_assert(ROWS % ROWS_AT_ONCE == 0, "the block's threads must divide the tile");
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    const Element* source = first_row + row * stride + chunk * CHUNK;
#if __CUDA_ARCH__ >= 800
#pragma unroll
    for (int i = 0; i < PASSES; ++i)
        copy_async_16(tile_smem + tile_offset(row + i * ROWS_AT_ONCE, chunk), source + i * ROWS_AT_ONCE * stride,
                      row + i * ROWS_AT_ONCE < valid_rows);
#else
    // No asynchronous copies: all loads before the first store, so that they are in flight together.
    uint4 staged_rmem[PASSES];
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
        staged_rmem[i] = make_uint4(0u, 0u, 0u, 0u);
        if (row + i * ROWS_AT_ONCE < valid_rows)
            staged_rmem[i] = load_global<uint4>(source + i * ROWS_AT_ONCE * stride);
    }
#pragma unroll
    for (int i = 0; i < PASSES; ++i)
        store_shared<uint4>(tile_smem + tile_offset(row + i * ROWS_AT_ONCE, chunk), staged_rmem[i]);
#endif
}
