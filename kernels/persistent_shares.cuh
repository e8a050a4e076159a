// The attention of a layer: each rank's share of a head, sent to the cluster and merged there.
#pragma once

#include "persistent_worker.cuh"

// This rank's share of the attention: its keys, its dimensions of the values.
DEVICE void Worker::attend(int layer, Keys& keys) {
    MARK(4);
    exchange.await<EX_QKV>();
    MARK(5);
    const unsigned raw = exchange.at<EX_QKV>() + place.voice * QKV_ROWS * 4;
    const unsigned turned = turned_at(), angles = base + ANGLES_AT;
    float squares = HeadLanes::turn(raw + place.head * HEAD_DIM * 4, base + GAINS_AT, angles, turned);
    // The newest key beside the query, by the warp that keeps it.
    const bool newest_here =
        position % PARTS == place.part && position / PARTS % GROUPS / 4 == static_cast<int>(warp_index());
    float key_squares = 0.0f;
    if (newest_here)
        key_squares = HeadLanes::turn(raw + (Q_ROWS + place.kv * HEAD_DIM) * 4, base + GAINS_AT + HEAD_DIM * 4, angles,
                                      turned + HEAD_DIM * 4);
    sync_warp();
    HeadLanes query;
    query.load(turned);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
        squares += shuffle_xor(squares, mask);
        if (newest_here) key_squares += shuffle_xor(key_squares, mask);
    }
    const float factor = head_factor(squares, p.epsilon) * (1.44269504f / sqrtf(static_cast<float>(HEAD_DIM)));
    Share share;
#pragma unroll 1
    while (keys.more()) {
        KeyValue pair = keys.next;
        const int at = keys.position;
        keys.position += Keys::STRIDE;
        keys.load();
        if (newest_here && at == position) take_newest(layer, head_factor(key_squares, p.epsilon), pair);
        const float score = pair.score(query) * factor;
        if (at <= keys.count) share.add(score, pair.value);
    }
    share.merge_groups();
    const unsigned at = base + SHARE_AT + warp_index() * OUT_STRIDE * 4;
#pragma unroll
    for (int i = 0; i < LAST_DIMS; ++i) store_shared<float>(at + (Share::first_dim() + i) * 4, share.values[i]);
    if (lane_index() == 0) store_shared<float2>(at + OUT_DIMS * 4, make_float2(share.maximum, share.sum));
    MARK(6);
    sync();
    MARK(7);
    send_share();
    MARK(8);
}

// The new token's own key and value, from the exchange: by the group whose position it is, which also stores them for the
// tokens to come.
DEVICE void Worker::take_newest(int layer, float factor, KeyValue& pair) const {
    const int lane = lane_index();
    HeadLanes key;
    key.load(turned_at() + HEAD_DIM * 4);
#pragma unroll
    for (int i = 0; i < HALF_LANE; i += 2) {
        pair.low.words[i / 2] = pack2(key.low[i] * factor, key.low[i + 1] * factor);
        pair.high.words[i / 2] = pack2(key.high[i] * factor, key.high[i + 1] * factor);
    }
    const unsigned raw = exchange.at<EX_QKV>() + (place.voice * QKV_ROWS + Q_ROWS + KV_ROWS + place.kv * HEAD_DIM) * 4;
    const int first = place.dims * OUT_DIMS + lane % 8 * VALUE_DIMS;
    float value[VALUE_DIMS];
    load_floats<VALUE_DIMS>(raw + first * 4, value);
#pragma unroll
    for (int i = 0; i < VALUE_DIMS; i += 2) pair.value.words[i / 2] = pack2(value[i], value[i + 1]);
    Element* keys = cache(p.keys, layer, 0) + static_cast<long long>(position) * Keys::TOKEN;
    Element* values = cache(p.values, layer, first) + static_cast<long long>(position) * Keys::TOKEN;
    pair.low.store(keys + lane % 8 * HALF_LANE);
    pair.high.store(keys + HEAD_DIM / 2 + lane % 8 * HALF_LANE);
    pair.value.store(values);
}

// Adds the warps' shares and sends the sum to the cluster: each thread four dimensions.
DEVICE void Worker::send_share() {
    constexpr int UNITS = OUT_DIMS / 4;
    float maxima[TEAM_WARPS], largest = NO_SCORE, sum = 0.0f;
    const unsigned at = base + SHARE_AT;
    const int unit = threadIdx.x % UNITS;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (threadIdx.x / UNITS >= RECEIVERS && threadIdx.x >= 32) return;
    float sums[TEAM_WARPS];
#pragma unroll
    for (int w = 0; w < TEAM_WARPS; ++w) {
        const float2 state = load_shared<float2>(at + (w * OUT_STRIDE + OUT_DIMS) * 4);
        maxima[w] = state.x, sums[w] = state.y;
        largest = fmaxf(largest, maxima[w]);
    }
#pragma unroll
    for (int w = 0; w < TEAM_WARPS; ++w) {
        const float weight = exp2_fast(maxima[w] - largest);
        const float4 part = load_shared<float4>(at + (w * OUT_STRIDE + unit * 4) * 4);
        sum += weight * sums[w];
        v.x += weight * part.x, v.y += weight * part.y, v.z += weight * part.z, v.w += weight * part.w;
    }
    const uint4 bits = make_uint4(float_to_bits(v.x), float_to_bits(v.y), float_to_bits(v.z), float_to_bits(v.w));
    const unsigned to_share = rank * OUT_STRIDE * 4;
#pragma unroll
    for (int to = threadIdx.x / UNITS; to < RECEIVERS; to += TEAM / UNITS)
        exchange.send<EX_ATTENDED>(to_share + unit * 16, to, bits);
    if (threadIdx.x >= 32) return;
    const uint4 state = make_uint4(float_to_bits(largest), float_to_bits(sum), 0u, 0u);
#pragma unroll
    for (int to = threadIdx.x; to < RECEIVERS; to += 32) exchange.send<EX_ATTENDED>(to_share + OUT_DIMS * 4, to, state);
}

// The shares of a head together: this warp's part of the attended vectors, which is what its products need.
DEVICE void Worker::merge_shares() const {
    typedef Steps<ATTENDED_STEPS> Part;
    // Where half of the lanes would be idle, two share the parts of an element.
    constexpr int TOGETHER = Part::MOST * TILE * VOICES <= 16 && PARTS % 2 == 0 ? 2 : 1;
    constexpr int LANES = 32 / TOGETHER, MINE = PARTS / TOGETHER;
    const int begin = Part::begin(warp_index()) * TILE, count = Part::count(warp_index()) * TILE;
    const int first_part = lane_index() / LANES * MINE;
#pragma unroll 1
    for (int first = 0; first < count * VOICES; first += LANES) {
        const int item = first + lane_index() % LANES, known = min(item, count * VOICES - 1);
        const int voice = known / count, dim = begin + known % count;
        const int head = dim / HEAD_DIM, dims = dim % HEAD_DIM / OUT_DIMS;
        const int rank_of_share = head * RANKS_OF_HEAD + voice * RANKS_OF_VOICE + first_part * DIM_PARTS + dims;
        const unsigned at = exchange.at<EX_ATTENDED>() + rank_of_share * OUT_STRIDE * 4;
        float2 states[MINE];
        float values[MINE], largest = NO_SCORE;
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            const unsigned share = at + i * DIM_PARTS * OUT_STRIDE * 4;
            states[i] = load_shared<float2>(share + OUT_DIMS * 4);
            values[i] = load_shared<float>(share + dim % OUT_DIMS * 4);
            largest = fmaxf(largest, states[i].x);
        }
        if (TOGETHER == 2) largest = fmaxf(largest, shuffle_xor(largest, LANES));
        float sum = 0.0f, value = 0.0f;
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            const float weight = exp2_fast(states[i].x - largest);
            sum += weight * states[i].y;
            value += weight * values[i];
        }
        if (TOGETHER == 2) {
            sum += shuffle_xor(sum, LANES);
            value += shuffle_xor(value, LANES);
        }
        if (item < count * VOICES && lane_index() < LANES)
            store_shared<Element>(base + ATTENDED_AT + voice * ATTENDED_STRIDE + dim * 2,
                                  from_float(value * reciprocal_fast(sum)));
    }
    sync_warp();
}
