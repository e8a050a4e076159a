// One decoder layer for one new token, by a whole grid that stays: five exchanges inside the clusters, and two sums of the
// residual stream over them. The order of every sum is fixed.
#pragma once

#include "persistent_residual.cuh"
#include "persistent_shares.cuh"

// Queries, keys and values of the cluster's heads.
DEVICE void Worker::project_qkv(int layer, Keys& keys) {
    MARK(0);
    keys.begin(cache(p.keys, layer, 0), cache(p.values, layer, place.dims * OUT_DIMS), place.part, position);
    const auto await = [&] {
        exchange.await<EX_HIDDEN>();
        MARK(1);
        if (layer == 0) return;  // given back with the layer before, or the head
        rooms.give_back<ROOM_GATED>();
        rooms.give_back<ROOM_DOWN>();
    };
    multiply<ROOM_QKV, QKV_MOST, QKV_TILES / RANKS, HIDDEN_STEPS, IN_LAYER>(rooms, qkv().count(),
                                                                            exchange.at<EX_HIDDEN>(), 0, await, true);
    MARK(2);
    exchange.await<EX_SUMS>();
    // Four warps, or as many as it takes, send one voice's rows to all ranks.
    constexpr int SENDERS = RECEIVERS > 4 ? (RECEIVERS + 3) / 4 : 1, TOGETHER = TEAM_WARPS / SENDERS;
    const int first_voice = warp_index() / SENDERS, to = warp_index() % SENDERS * 4 + lane_index() / 8;
    float factors[(VOICES + TOGETHER - 1) / TOGETHER];
#pragma unroll
    for (int i = 0; i < (VOICES + TOGETHER - 1) / TOGETHER; ++i)
        factors[i] = norm_factor(exchange.at<EX_SUMS>(), min(first_voice + i * TOGETHER, VOICES - 1), p.epsilon);
    copy_async_wait<0>();
    sync();
    MARK(3);
#pragma unroll
    for (int i = 0; i < (VOICES + TOGETHER - 1) / TOGETHER; ++i) {
        const int voice = first_voice + i * TOGETHER;
#pragma unroll
        for (int first = 0; first < QKV_MOST * 4; first += 8) {
            const int unit = first + lane_index() % 8;
            if (unit >= qkv().count() * 4 || to >= RECEIVERS || voice >= VOICES) continue;
            float4 v = row_sums(base, voice, unit * 4);
            v.x *= factors[i], v.y *= factors[i], v.z *= factors[i], v.w *= factors[i];
            const uint4 bits =
                make_uint4(float_to_bits(v.x), float_to_bits(v.y), float_to_bits(v.z), float_to_bits(v.w));
            exchange.send<EX_QKV>((voice * QKV_ROWS + qkv().begin * TILE) * 4 + unit * 16, to, bits);
        }
    }
}

// The attended vector's product joins the residual stream. norm: the next one's index in the gains.
DEVICE void Worker::project_attended(int norm) {
    const float next_gain = owns_row() ? load_global<float>(gain(norm)) : 0.0f;
    Word* const words = words_of(0);
    const auto await = [&] {
        exchange.await<EX_ATTENDED>();
        MARK(9);
        merge_shares();
        MARK(10);
    };
    multiply<ROOM_O, OWN_TILES, HIDDEN_TILES / RANKS, ATTENDED_STEPS, IN_LAYER>(rooms, hidden.count(),
                                                                                base + ATTENDED_AT, 0, await, true);
    MARK(11);
    sync();
    MARK(12);
    if (!owns()) return;
    add_to_residual(0, words);
    MARK(13);
    publish_residual<EX_AFTER, EX_SUMS_AFTER>(next_gain);
    MARK(14);
}

// Gate and up, and their product of SiLU: 8 channels of each tile.
DEVICE void Worker::gate_and_up(bool last) {
    const auto await = [&] {
        exchange.await<EX_AFTER>();
        MARK(15);
        rooms.give_back<ROOM_QKV>();
        rooms.give_back<ROOM_O>();
    };
    multiply<ROOM_GATED, GATED_MOST, GATED_TILES / RANKS, HIDDEN_STEPS, IN_LAYER>(
        rooms, gated().count(), exchange.at<EX_AFTER>(), 0, await, !last);
    MARK(16);
    exchange.await<EX_SUMS_AFTER>();
    // Warps take turns at the tiles of all voices, and stay with a voice where their number divides.
    const int units = gated().count() * VOICES;
    float factor = norm_factor(exchange.at<EX_SUMS_AFTER>(), warp_index() % VOICES, p.epsilon);
    sync();
    MARK(17);
#pragma unroll 1
    for (int i = warp_index(); i < units; i += TEAM_WARPS) {
        const int lane = lane_index(), tile = i / VOICES, voice = i % VOICES;
        if (TEAM_WARPS % VOICES != 0) factor = norm_factor(exchange.at<EX_SUMS_AFTER>(), voice, p.epsilon);
        // Half of the lanes add up the rows of gate, half those of up.
        const float sum = row_sum(base, voice, tile * TILE + lane % TILE) * factor, other = shuffle_xor(sum, 8);
        const float gate = lane & 8 ? other : sum, up = lane & 8 ? sum : other;
        const float value = gate * reciprocal_fast(1.0f + exp2_fast(gate * -1.44269504f)) * up;
        const unsigned word = pack2(shuffle(value, lane * 2 % 8), shuffle(value, (lane * 2 + 1) % 8));
        uint4 v;
        v.x = shuffle(word, 0), v.y = shuffle(word, 1), v.z = shuffle(word, 2), v.w = shuffle(word, 3);
#pragma unroll
        for (int to = lane; to < RECEIVERS; to += 32)
            exchange.send<EX_GATED>(voice * GATED_STRIDE + (gated().begin + tile) * 16, to, v);
    }
}

DEVICE void Worker::project_gated(int norm, bool last) {
    const float next_gain = owns_row() ? load_global<float>(gain(norm)) : 0.0f;
    MARK(18);
    Word* const words = words_of(1);
    const auto await = [&] {
        exchange.await<EX_GATED>();
        MARK(19);
    };
    multiply<ROOM_DOWN, OWN_TILES, HIDDEN_TILES / RANKS, GATED_STEPS, IN_LAYER>(
        rooms, hidden.count(), exchange.at<EX_GATED>(), 0, await, !last);
    MARK(20);
    sync();
    MARK(21);
    if (!owns()) return;
    add_to_residual(1, words);
    MARK(22);
    publish_residual<EX_HIDDEN, EX_SUMS>(next_gain);
    MARK(23);
}

// What follows from a few numbers is computed again in each layer: registers are for weights and keys.
DEVICE void Worker::forget_addresses() {
    forget(base);
    forget(rank);
    rooms.base = exchange.base = base;
    rooms.watch.dead = exchange.watch.dead = base + DEAD_AT;
}

// A layer, from the exchange of its input to that of the next one's.
DEVICE void Worker::layer(int index) {
    ++number;
    forget_addresses();
    fetch_gains(index);
    Keys keys;
    project_qkv(index, keys);
    attend(index, keys);
    project_attended(index * 2 + 1);
    const bool last = index + 1 == p.layers;  // what comes next gives back no rooms
    gate_and_up(last);
    project_gated(index * 2 + 2, last);
}
