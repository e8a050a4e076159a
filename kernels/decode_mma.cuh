// Decode on tensor cores: scores and weighted sums as products of 16 (query rows) x 8 x 16.
//
// The query rows are the M side, of which a decode step fills few (4 heads: a quarter). The waste is free: at 4 TB/s a
// multiprocessor receives 64 keys of 128 dimensions every 1,850 cycles and needs 64 products of about 6 cycles on each
// of its four tensor cores.
//
// Lane l = 4 g + t. Which element sits in which slot of a contraction is free as long as both factors agree. So a
// 128-bit chunk of a key, as memory has it, is the B operand of two products; the queries are put in the same order.
#pragma once

#include "decode_tile.cuh"
#include "softmax_state.cuh"

constexpr int MATRIX_ROWS = TILE_ROWS < 16 ? TILE_ROWS : 16;  // rows of a product that are looked at: 8 or 16
constexpr int ROW_TILES = TILE_ROWS / MATRIX_ROWS;
constexpr int TILE_HELD = MATRIX_ROWS / 8;        // rows of one product that a lane holds: g, g + 8
constexpr int HELD_ROWS = ROW_TILES * TILE_HELD;  // rows of the thread block that a lane holds
constexpr int HELD_DIMS = 8;                      // of each: 2 t and the next, of every 8 of the warp's 32

// Bytes of a query row in shared memory; 64 more than a multiple of 128 puts two rows side by side in the banks.
constexpr int QUERY_STRIDE = HEAD_DIM * 2 + (HEAD_DIM == 32 ? 0 : 64);
constexpr int ROW_STATE_BYTES = 0;

DEVICE int held_row(int held) { return lane_index() / 4 + 8 * held; }

// Two products whose contractions are the two halves of one: registers 0, 1 and registers 2, 3 of both factors. With
// 16 rows, `first` and `second` are the two halves. With 8 rows the A rows 8 to 15 would be idle: they hold the second
// half instead, one register quad serves both products, and the wanted sums are the upper rows of the first product
// and the lower rows of the second. Either way a result is (sum of the first half) + (sum of the second half), with
// the same bits.
struct SplitProduct {
    float first[4] = {}, second[4] = {};

    // a: registers 0, 2, 1, 3 of row g.
    DEVICE void add_8_rows(const unsigned (&a)[4], const unsigned (&b)[4]) {
        mma_16x8x16(first, a, b[0], b[1]);
        mma_16x8x16(second, a, b[2], b[3]);
    }
    // upper: the same of row g; lower: of row g + 8.
    DEVICE void add_16_rows(const unsigned (&upper)[4], const unsigned (&lower)[4], const unsigned (&b)[4]) {
        const unsigned first_half[4] = {upper[0], lower[0], upper[2], lower[2]};
        const unsigned second_half[4] = {upper[1], lower[1], upper[3], lower[3]};
        mma_16x8x16(first, first_half, b[0], b[1]);
        mma_16x8x16(second, second_half, b[2], b[3]);
    }
    // Column 2 t + column of row g + 8 half.
    DEVICE float result(int half, int column) const {
        if (TILE_HELD == 1) return first[column] + second[2 + column];
        return first[2 * half + column] + second[2 * half + column];
    }
};

struct Registers {
    unsigned r[4];
    DEVICE explicit Registers(uint4 v) : r{v.x, v.y, v.z, v.w} {}
};

DEVICE void store_query_chunk(unsigned queries, int row, int chunk, uint4 value) {
    // in the order that SplitProduct takes
    store_shared<uint4>(queries + row * QUERY_STRIDE + chunk * 16, make_uint4(value.x, value.z, value.y, value.w));
}

// S = Q K^T of one row tile, scaled to log2 units and masked, into `scores` (MATRIX_ROWS, SCORE_STRIDE).
DEVICE void write_scores(int tile, unsigned keys, unsigned queries, unsigned scores, float scale_log2, int first_key,
                         const Visibility& visibility) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const bool masked = first_key + BLOCK_KEYS > visibility.end(tile * MATRIX_ROWS);
#pragma unroll
    for (int pair = 0; pair < KEY_ROWS; pair += 2) {  // two key rows a lane share the reading of the queries
        SplitProduct s[2];
#pragma unroll
        for (int j = 0; j < KEY_CHUNKS; ++j) {
            const unsigned address = queries + (tile * MATRIX_ROWS + g) * QUERY_STRIDE + (4 * j + t) * 16;
            const Registers upper(load_shared<uint4>(address));
            Registers lower = upper;
            if (TILE_HELD == 2) lower = Registers(load_shared<uint4>(address + 8 * QUERY_STRIDE));
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const Registers k(load_shared<uint4>(key_slot(keys, pair + n, j)));
                if (TILE_HELD == 1)
                    s[n].add_8_rows(upper.r, k.r);
                else
                    s[n].add_16_rows(upper.r, lower.r, k.r);
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * TILE_HELD; ++i) {
            const int n = i % 2, half = i / 2, row = g + 8 * half;
            const int key = warp_index() * WARP_KEYS + 8 * (pair + n) + 2 * t;
            float2 score = make_float2(s[n].result(half, 0) * scale_log2, s[n].result(half, 1) * scale_log2);
            if (masked) {
                const int end = visibility.end(tile * MATRIX_ROWS + row) - first_key;
                if (key >= end) score.x = -infinity();
                if (key + 1 >= end) score.y = -infinity();
            }
            store_shared<float2>(scores + (row * SCORE_STRIDE + key) * 4, score);
        }
    }
}

// P = 2^(S - max) of row g + 8 half of the tile as A registers: weights[2 i] for the keys 16 i + 2 t and the next,
// weights[2 i + 1] for the keys 8 further on. Returns the row's max and sum. Every warp does this for itself: 16
// exponentials a lane cost less than another barrier.
DEVICE SoftmaxState weigh_row(int half, unsigned scores, unsigned (&weights)[BLOCK_KEYS / 8]) {
    const unsigned row = scores + (held_row(half) * SCORE_STRIDE + 2 * (lane_index() % 4)) * 4;
    float2 s[BLOCK_KEYS / 8];
    SoftmaxState state = SoftmaxState::empty();
#pragma unroll
    for (int i = 0; i < BLOCK_KEYS / 8; ++i) {
        s[i] = load_shared<float2>(row + 8 * i * 4);
        state.max = larger(state.max, larger(s[i].x, s[i].y));
    }
    state.max = larger(state.max, shuffle_xor(state.max, 1));
    state.max = larger(state.max, shuffle_xor(state.max, 2));
#pragma unroll
    for (int i = 0; i < BLOCK_KEYS / 8; ++i) {
        s[i] = make_float2(state.weight(s[i].x), state.weight(s[i].y));
        state.sum += s[i].x + s[i].y;
        weights[i] = pack2(s[i].x, s[i].y);
    }
    state.sum += shuffle_xor(state.sum, 1);
    state.sum += shuffle_xor(state.sum, 2);
    return state;
}

// O = P V of one row tile and block, merged into the states of the rows that this lane holds. The products start from
// zero in every block, so that what a block contributes does not depend on what was there before it.
template <typename Row> DEVICE void merge_values(unsigned values, unsigned scores, unsigned, Row* rows) {
    const int lane = lane_index();
    unsigned weights[TILE_HELD][BLOCK_KEYS / 8];
    float own[TILE_HELD], theirs[TILE_HELD];
#pragma unroll
    for (int half = 0; half < TILE_HELD; ++half) {
        rows[half].softmax.merge(weigh_row(half, scores, weights[half]), own[half], theirs[half]);
    }
#pragma unroll
    for (int pair = 0; pair < WARP_DIMS / 16; ++pair) {  // 16 dimensions
        SplitProduct o[2];
#pragma unroll
        for (int i = 0; i < BLOCK_KEYS / 16; i += 2) {  // 32 keys, of which the first 16 are the first half
            unsigned v[2][4];  // of 16 keys each: the B registers of dimensions 0-7, then of 8-15
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                load_matrix_x4_trans(v[n], value_slot(values, 16 * (i + n) + lane % 16, 2 * pair + lane / 16));
            }
            const unsigned (&w)[BLOCK_KEYS / 8] = weights[0];
            const unsigned upper[4] = {w[2 * i], w[2 * i + 2], w[2 * i + 1], w[2 * i + 3]};
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const unsigned b[4] = {v[0][2 * n], v[0][2 * n + 1], v[1][2 * n], v[1][2 * n + 1]};
                if constexpr (TILE_HELD == 1) {
                    o[n].add_8_rows(upper, b);
                } else {
                    const unsigned (&x)[BLOCK_KEYS / 8] = weights[1];
                    const unsigned lower[4] = {x[2 * i], x[2 * i + 2], x[2 * i + 1], x[2 * i + 3]};
                    o[n].add_16_rows(upper, lower, b);
                }
            }
        }
#pragma unroll
        for (int half = 0; half < TILE_HELD; ++half) {
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                rows[half].merge_dim(4 * pair + n, o[n / 2].result(half, n % 2), own[half], theirs[half]);
            }
        }
    }
}

// Whether this lane, among a warp's, stores the log-sum-exp of the rows that it holds.
DEVICE bool writes_lse() { return lane_index() % 4 == 0; }

// row: the output row, at the warp's first dimension.
DEVICE void store_output(Element* row, const float (&acc)[HELD_DIMS], float factor) {
#pragma unroll
    for (int n = 0; n < HELD_DIMS / 2; ++n) {
        const unsigned pair = pack2(acc[2 * n] * factor, acc[2 * n + 1] * factor);
        store_global<unsigned>(row + 8 * n + 2 * (lane_index() % 4), pair);
    }
}
