// The products of a layer by m16n8k16 instructions whose left operand is the weights. Each warp sums its share of the depth
// for all tiles of the rank; the warps' partial sums meet in shared memory and are added in their order.
#pragma once

#include "persistent_stream.cuh"

DEVICE unsigned partial_row(unsigned base, int warp, int voice, int row) {
    return base + PARTIAL_AT + ((warp * VOICES + voice) * MOST_TILES * TILE + row) * 4;
}

constexpr int IN_LAYER = 16, IN_HEAD = 12;  // blocks of weights that a warp holds in registers, four of them each

// A warp's share of a product's k-steps: as many for each, and one more for the first few.
template <int DEPTH> struct Steps {
    static constexpr int EACH = DEPTH / TEAM_WARPS, REST = DEPTH % TEAM_WARPS, MOST = EACH + (REST > 0 ? 1 : 0);
    DEVICE static unsigned begin(unsigned warp) { return warp * EACH + min(warp, static_cast<unsigned>(REST)); }
    DEVICE static unsigned count(unsigned warp) { return EACH + (warp < REST ? 1 : 0); }
};

// Partial sums of `tiles` tiles of a room over DEPTH k-steps of the voices' vectors (Element, in shared memory) into
// PARTIAL_AT, from row `first_row` on. TILES: the most that a rank has, LEAST: the fewest. A rank that has fewer multiplies its
// last one again, a warp that has fewer steps multiplies one by zeros: there are no branches inside. await() waits for the
// vectors; HELD_BLOCKS of the weights, which depend on nobody, are in registers by then. keep: the room stays this block's.
template <int ROOM, int TILES, int LEAST, int DEPTH, int HELD_BLOCKS, typename Await>
DEVICE void multiply(Rooms& rooms, int tiles, unsigned vectors, int first_row, Await await, bool keep = false) {
    typedef Steps<DEPTH> Share;
    constexpr int MOST = Share::MOST;
    constexpr int AHEAD = MOST * TILES <= HELD_BLOCKS ? TILES : larger(1, HELD_BLOCKS / MOST);  // tiles in registers
    constexpr unsigned ROOM_AT = room_at(ROOM), STRIDE = vector_stride(DEPTH * TILE);
    rooms.await<ROOM>();
    if (LEAST == 0 && tiles <= 0) {
        await();
        rooms.leave<ROOM>(keep);
        return;
    }
    const unsigned warp = warp_index(), lane = lane_index(), begin = Share::begin(warp);
    const unsigned room = rooms.base + ROOM_AT + lane * 16 + begin * BLOCK_BYTES;
    // Where the last step is this warp's no longer, it reads the tile's first one.
    const bool more = Share::REST == 0 || warp < Share::REST;
    const unsigned last = more ? (MOST - 1) * BLOCK_BYTES : 0u - begin * BLOCK_BYTES;
    uint4 weights[AHEAD][MOST];
    const auto load = [&](int t) {
        const unsigned at = room + (t < LEAST ? t : min(t, tiles - 1)) * (DEPTH * BLOCK_BYTES);
#pragma unroll
        for (int i = 0; i < MOST - 1; ++i) weights[t % AHEAD][i] = load_shared<uint4>(at + i * BLOCK_BYTES);
        weights[t % AHEAD][MOST - 1] = load_shared<uint4>(at + last);
    };
#pragma unroll
    for (int t = 0; t < AHEAD; ++t) load(t);
    await();
    // Columns beyond the voices repeat them; nobody reads those.
    const unsigned vector = vectors + lane / 4 % VOICES * STRIDE + lane % 4 * 4 + begin * 32;
    unsigned low[MOST], high[MOST];
    float sums[TILES][4] = {};
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
        low[i] = high[i] = 0u;
        if (i == MOST - 1 && !more) continue;
        low[i] = load_shared<unsigned>(vector + i * 32);
        high[i] = load_shared<unsigned>(vector + i * 32 + 16);
    }
    if (AHEAD == TILES) rooms.leave<ROOM>(keep);
#pragma unroll
    for (int first = 0; first < TILES; first += AHEAD) {
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
#pragma unroll
            for (int t = first; t < TILES && t < first + AHEAD; ++t) {
                const uint4& w = weights[t % AHEAD][i];
                const unsigned a[4] = {w.x, w.y, w.z, w.w};
                mma_16x8x16(sums[t], a, low[i], high[i]);
            }
        }
#pragma unroll
        for (int t = first + AHEAD; t < TILES && t < first + 2 * AHEAD; ++t) load(t);
    }
    if (AHEAD != TILES) rooms.leave<ROOM>(keep);
    // Columns 2 t and 2 t + 1 of the result: rows g and g + 8.
    const unsigned voice = lane % 4 * 2;
    const unsigned at = partial_row(rooms.base, warp, voice, first_row + lane / 4);
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        if (t >= LEAST && t >= tiles) break;
        if (voice < VOICES) {
            store_shared<float>(at + t * TILE * 4, sums[t][0]);
            store_shared<float>(at + (t * TILE + 8) * 4, sums[t][2]);
        }
        if (voice + 1 < VOICES) {
            store_shared<float>(at + (MOST_TILES * TILE + t * TILE) * 4, sums[t][1]);
            store_shared<float>(at + (MOST_TILES * TILE + t * TILE + 8) * 4, sums[t][3]);
        }
    }
}

// One row of the product, or four neighbouring rows: the warps' partial sums, by pairs, pairs of pairs and so on.
DEVICE float sum_of(float a, float b) { return a + b; }
DEVICE float4 sum_of(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
template <typename T> DEVICE T partial_sums(unsigned base, int voice, int row) {
    T parts[TEAM_WARPS];
#pragma unroll
    for (int w = 0; w < TEAM_WARPS; ++w) parts[w] = load_shared<T>(partial_row(base, w, voice, row));
#pragma unroll
    for (int step = 1; step < TEAM_WARPS; step *= 2) {
#pragma unroll
        for (int w = 0; w + step < TEAM_WARPS; w += 2 * step) parts[w] = sum_of(parts[w], parts[w + step]);
    }
    return parts[0];
}
DEVICE float row_sum(unsigned base, int voice, int row) { return partial_sums<float>(base, voice, row); }
DEVICE float4 row_sums(unsigned base, int voice, int row) { return partial_sums<float4>(base, voice, row); }

// The 1 / (NORM_SCALE rms) of a voice's residual stream, from the sums of squares of its tiles.
DEVICE float norm_factor(unsigned all_sums, int voice, float epsilon) {
    const unsigned sums = all_sums + voice * SUMS_STRIDE;
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);  // chains of additions, for speed
#pragma unroll
    for (int i = 0; i + 3 < HIDDEN_TILES; i += 4) {
        const float4 v = load_shared<float4>(sums + 4 * i);
        four.x += v.x, four.y += v.y, four.z += v.z, four.w += v.w;
    }
    float total = (four.x + four.y) + (four.z + four.w);
#pragma unroll
    for (int i = HIDDEN_TILES / 4 * 4; i < HIDDEN_TILES; ++i) total += load_shared<float>(sums + 4 * i);
    return inverse_sqrt(total * (1.0f / HIDDEN) + epsilon) * (1.0f / NORM_SCALE);
}
