// The residual stream: its rows on their way to the cluster, and its sums over the clusters.
#pragma once

#include "persistent_worker.cuh"

// Sends this warp's rows of the residual stream, times the next norm's gain, to the cluster.
template <int ROWS, int SUMS> DEVICE void Worker::publish_residual(float next_gain) {
    const int lane = lane_index();
    const float scaled = residual * next_gain * NORM_SCALE;
    const unsigned word = pack2(shuffle(scaled, lane * 2 % 32), shuffle(scaled, (lane * 2 + 1) % 32));
    const int unit = lane % 4;  // of 8 rows
    uint4 v;
    v.x = shuffle(word, unit * 4), v.y = shuffle(word, unit * 4 + 1);
    v.z = shuffle(word, unit * 4 + 2), v.w = shuffle(word, unit * 4 + 3);
    const int pair = own_pair_of_tiles();
    const int tiles = min(hidden.count() - pair * 2, 2), first = hidden.begin + pair * 2;
    if (unit < tiles * 2) {
#pragma unroll
        for (int to = lane / 4; to < RECEIVERS; to += 8)
            exchange.send<ROWS>(own_voice() * HIDDEN_STRIDE + first * 32 + unit * 16, to, v);
    }
    float square = owns_row() ? residual * residual : 0.0f;
#pragma unroll
    for (int mask = 1; mask < 16; mask *= 2) square += shuffle_xor(square, mask);
    const int tile = lane / 16;
    if (tile < tiles) {
#pragma unroll
        for (int to = lane % 16; to < RECEIVERS; to += 16)
            exchange.send<SUMS>(own_voice() * SUMS_STRIDE + (first + tile) * 4, to, square);
    }
}

// Adds a product's rows, summed over the clusters in their order, to the residual stream. words: words_of(which).
DEVICE void Worker::add_to_residual(int which, Word* words) {
    const float mine = owns_row() ? row_sum(base, own_voice(), own_row()) : 0.0f;
    if constexpr (CLUSTERS == 1) {
        residual += mine;
        return;
    }
    if (owns_row()) store_word(words + cluster * OF_CLUSTER, make_word(float_to_bits(mine), number));
    Word heard[CLUSTERS];
    const unsigned expected = number;
    spin_until(rooms.watch, 8 + which, [&] {
        bool all = true;
#pragma unroll
        for (int c = 0; c < CLUSTERS; ++c)
            if (c != cluster && owns_row()) heard[c] = load_word(words + c * OF_CLUSTER);
#pragma unroll
        for (int c = 0; c < CLUSTERS; ++c)
            all = all && (c == cluster || !owns_row() || word_number(heard[c]) == expected);
        return all;
    });
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < CLUSTERS; ++c)
        sum += c == cluster ? mine : bits_to_float(static_cast<int>(word_value(heard[c])));
    residual += sum;
}
