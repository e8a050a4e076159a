// Decode on the ordinary arithmetic units: fp32 on every architecture, half precision where the tensor cores do not
// take it (fp16 before Turing, bf16 before Ampere).
#pragma once

#include "decode_tile.cuh"
#include "softmax_state.cuh"

constexpr int ROW_TILES = 1;
constexpr int TILE_HELD = TILE_ROWS;  // every lane holds every row,
constexpr int HELD_ROWS = TILE_ROWS;
constexpr int HELD_DIMS = 1;  // each for one dimension of its own
constexpr int MATRIX_ROWS = TILE_ROWS;

constexpr int QUERY_STRIDE = HEAD_DIM * 4;      // bytes of a query row in shared memory, as fp32
constexpr int ROW_STATE_BYTES = TILE_ROWS * 8;  // (max, sum) of each row behind the scores

DEVICE int held_row(int held) { return held; }

// The elements of a 128-bit chunk as floats.
DEVICE void widen(uint4 packed, float (&values)[CHUNK]) {
    const unsigned bits[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if defined(DTYPE_FP32)
        values[i] = bits_to_float(static_cast<int>(bits[i]));
#else
        values[2 * i] = unpack_low(bits[i]);
        values[2 * i + 1] = unpack_high(bits[i]);
#endif
    }
}

DEVICE void store_query_chunk(unsigned queries, int row, int chunk, uint4 value) {
    float q[CHUNK];
    widen(value, q);
#pragma unroll
    for (int i = 0; i < CHUNK; i += 4) {
        store_shared<float4>(queries + row * QUERY_STRIDE + (chunk * CHUNK + i) * 4,
                             make_float4(q[i], q[i + 1], q[i + 2], q[i + 3]));
    }
}

// S = Q K^T, scaled to log2 units and masked, into `scores` (TILE_ROWS, SCORE_STRIDE). Four lanes share a key.
DEVICE void write_scores(int, unsigned keys, unsigned queries, unsigned scores, float scale_log2, int first_key,
                         const Visibility& visibility) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int n = 0; n < KEY_ROWS; ++n) {
        float s[TILE_ROWS] = {};
#pragma unroll
        for (int j = 0; j < KEY_CHUNKS; ++j) {
            float k[CHUNK];
            widen(load_shared<uint4>(key_slot(keys, n, j)), k);
            const unsigned address = queries + (4 * j + t) * CHUNK * 4;
#pragma unroll
            for (int row = 0; row < TILE_ROWS; ++row) {
#pragma unroll
                for (int i = 0; i < CHUNK; i += 4) {
                    const float4 q = load_shared<float4>(address + row * QUERY_STRIDE + i * 4);
                    s[row] = fused_multiply_add(q.x, k[i], s[row]);
                    s[row] = fused_multiply_add(q.y, k[i + 1], s[row]);
                    s[row] = fused_multiply_add(q.z, k[i + 2], s[row]);
                    s[row] = fused_multiply_add(q.w, k[i + 3], s[row]);
                }
            }
        }
        const int key = warp_index() * WARP_KEYS + 8 * n + g;
#pragma unroll
        for (int row = 0; row < TILE_ROWS; ++row) {
            s[row] += shuffle_xor(s[row], 1);
            s[row] += shuffle_xor(s[row], 2);
            const float score = first_key + key < visibility.end(row) ? s[row] * scale_log2 : -infinity();
            if (t == 0) store_shared<float>(scores + (row * SCORE_STRIDE + key) * 4, score);
        }
    }
}

// P = 2^(S - max) in place, each row by one warp; the row's (max, sum) goes to `states`.
DEVICE void weigh_rows(unsigned scores, unsigned states) {
    for (int row = warp_index(); row < TILE_ROWS; row += WARPS) {
        const unsigned address = scores + (row * SCORE_STRIDE + lane_index()) * 4;
        SoftmaxState state = SoftmaxState::empty();
        float s[BLOCK_KEYS / WARP_LANES];
#pragma unroll
        for (int i = 0; i < BLOCK_KEYS / WARP_LANES; ++i) {
            s[i] = load_shared<float>(address + i * WARP_LANES * 4);
            state.max = larger(state.max, s[i]);
        }
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) state.max = larger(state.max, shuffle_xor(state.max, mask));
#pragma unroll
        for (int i = 0; i < BLOCK_KEYS / WARP_LANES; ++i) {
            s[i] = state.weight(s[i]);
            state.sum += s[i];
            store_shared<float>(address + i * WARP_LANES * 4, s[i]);
        }
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) state.sum += shuffle_xor(state.sum, mask);
        if (lane_index() == 0) store_shared<float2>(states + row * 8, make_float2(state.max, state.sum));
    }
}

// The value of one key in the lane's dimension.
DEVICE float load_value(unsigned values, int key) {
    const int lane = lane_index();
    const unsigned chunk = value_slot(values, key, lane / CHUNK);
#if defined(DTYPE_FP32)
    return load_shared<float>(chunk + lane % CHUNK * 4);
#else
    const unsigned pair = load_shared<unsigned>(chunk + lane % CHUNK / 2 * 4);
    return lane % 2 ? unpack_high(pair) : unpack_low(pair);
#endif
}

// O = P V of one block, merged into the states of the rows. The sums start from zero in every block, so that what a
// block contributes does not depend on what was there before it.
template <typename Row> DEVICE void merge_values(unsigned values, unsigned scores, unsigned states, Row* rows) {
    weigh_rows(scores, states);
    sync_block();  // the weights and row states are written; they change again only behind the next block's barrier
    float o[TILE_ROWS] = {};
#pragma unroll 4
    for (int key = 0; key < BLOCK_KEYS; key += 4) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = load_value(values, key + i);
#pragma unroll
        for (int row = 0; row < TILE_ROWS; ++row) {
            const float4 p = load_shared<float4>(scores + (row * SCORE_STRIDE + key) * 4);
            o[row] = fused_multiply_add(p.x, v[0], o[row]);
            o[row] = fused_multiply_add(p.y, v[1], o[row]);
            o[row] = fused_multiply_add(p.z, v[2], o[row]);
            o[row] = fused_multiply_add(p.w, v[3], o[row]);
        }
    }
#pragma unroll
    for (int row = 0; row < TILE_ROWS; ++row) {
        const float2 state = load_shared<float2>(states + row * 8);
        float own, theirs;
        rows[row].softmax.merge({state.x, state.y}, own, theirs);
        rows[row].merge_dim(0, o[row], own, theirs);
    }
}

// Whether this lane, among a warp's, stores the log-sum-exp of the rows that it holds.
DEVICE bool writes_lse() { return lane_index() == 0; }

// row: the output row, at the warp's first dimension.
DEVICE void store_output(Element* row, const float (&acc)[HELD_DIMS], float factor) {
    store_global<Element>(row + lane_index(), from_float(acc[0] * factor));
}
