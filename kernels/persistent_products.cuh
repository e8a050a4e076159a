// The products of a layer by m16n8k16 instructions whose left operand is the weights. Each warp sums its share of the depth
// for all tiles of the rank; the warps' partial sums meet in shared memory and are added in their order.
#pragma once

#include "persistent_stream.cuh"

constexpr int LOADS = 10;  // blocks that a warp has in flight; eight warps then cover the latency of shared memory

DEVICE unsigned partial_row(unsigned base, int warp, int voice, int row) {
    return base + PARTIAL_AT + ((warp * VOICES + voice) * MOST_TILES * TILE + row) * 4;
}

// Partial sums of `tiles` tiles over DEPTH k-steps of the voices' vectors (Element, in shared memory) into PARTIAL_AT, from
// row `first_row` on. TILES: the most that a rank has. There are no branches inside: a rank that has fewer tiles multiplies its
// last one again, a warp that has fewer steps multiplies its last one by zeros.
template <int TILES, int DEPTH> DEVICE void multiply(Ring& ring, int tiles, unsigned vectors, int first_row) {
    constexpr int MOST = (DEPTH + TEAM_WARPS - 1) / TEAM_WARPS;
    constexpr int BATCHES = (MOST * TILES + LOADS - 1) / LOADS;
    constexpr int BATCH = (MOST + BATCHES - 1) / BATCHES;
    // Unsigned throughout: quotients are shifts, and this is on the way from one exchange to the next.
    const unsigned warp = warp_index(), lane = lane_index();
    const unsigned begin = DEPTH * warp / TEAM_WARPS, end = DEPTH * (warp + 1) / TEAM_WARPS;
    // Columns beyond the voices repeat them; nobody reads those.
    const unsigned vector = vectors + lane / 4 % VOICES * vector_stride(DEPTH * TILE) + lane % 4 * 4;
    if (tiles > 0) {
        ring.await(begin * tiles, end * tiles);
        float sums[TILES][4] = {};
#pragma unroll 1
        for (unsigned k = begin; k < end; k += BATCH) {
            uint4 weights[BATCH][TILES];
            unsigned low[BATCH], high[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const bool more = DEPTH % (TEAM_WARPS * BATCH) == 0 || k + i < end;
                const unsigned step = more ? k + i : end - 1;
                const unsigned at = vector + step * 32;
                low[i] = load_shared<unsigned>(at);
                high[i] = load_shared<unsigned>(at + 16);
                if (!more) low[i] = high[i] = 0u;
#pragma unroll
                for (int t = 0; t < TILES; ++t) weights[i][t] = ring.block(step * tiles + min(t, tiles - 1));
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    const unsigned a[4] = {weights[i][t].x, weights[i][t].y, weights[i][t].z, weights[i][t].w};
                    mma_16x8x16(sums[t], a, low[i], high[i]);
                }
            }
        }
        // Columns 2 t and 2 t + 1 of the result: rows g and g + 8.
        const unsigned voice = lane % 4 * 2;
        const unsigned at = partial_row(ring.base, warp, voice, first_row + lane / 4);
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            if (t >= tiles) break;
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
    ring.done(DEPTH * tiles);
}

// One row of the product, or four neighbouring rows: the warps' partial sums in their order.
DEVICE float row_sum(unsigned base, int voice, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < TEAM_WARPS; ++w) sum += load_shared<float>(partial_row(base, w, voice, row));
    return sum;
}
DEVICE float4 row_sums(unsigned base, int voice, int row) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < TEAM_WARPS; ++w) {
        const float4 part = load_shared<float4>(partial_row(base, w, voice, row));
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    return sum;
}

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
