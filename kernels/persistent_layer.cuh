// One decoder layer for one new token, by a whole grid that stays: five exchanges inside the clusters, and two sums of the
// residual stream over them. The order of every sum is fixed.
#pragma once

#include "persistent_attention.cuh"

// -D PROFILE: the clock of each block's first thread at these points of its last layer, behind the words of the launch.
#if defined(PROFILE)
constexpr int PROFILE_AT = 1 << 19, MARKS = 32;
#define MARK(point) mark(point)
#define WORKER_MARK(point) worker.mark(point)
#else
#define MARK(point)
#define WORKER_MARK(point)
#endif

// What does not change during a launch.
struct LayerParams {
    const void* stream;  // weights of block b from b * stream_bytes on, in the order of use
    const float* gains;  // (layers + 1, 2, HIDDEN): input norm and post-attention norm of each layer; the final norm
    const float* head_gains;  // (layers, 2, HEAD_DIM): queries, keys
    const float2* rope;       // (positions, HEAD_DIM / 2): cosine, sine
    void* keys[VOICES];       // (layers, ..., capacity, KV_HEADS, HEAD_DIM) Element, at each voice's slot
    void* values[VOICES];
    Word*
        words;  // (2, CLUSTERS, VOICES, HIDDEN) zeroed before the launch: partial sums on their way to the other clusters
    unsigned* error;  // zeroed before the launch
    long long stream_bytes;
    long long layer_elements;  // from one layer's keys to the next's
    int layers;
    float epsilon;
};

// A thread's part in a launch.
struct Worker {
    const LayerParams& p;
    unsigned base;
    const int cluster;
    int rank;
    const Tiles hidden;
    const Place place;
    Rooms rooms;
    Exchange exchange;
    float residual = 0.0f;        // of this lane's row, in the warps that finish the residual stream
    int position = 0;             // of the new token of the voice for which this rank attends; -1: it does not go on
    float2 angle = {0.0f, 0.0f};  // of this thread's pair at the next position, in the last threads
    unsigned number = 0;          // of layers so far in the launch, from 1

    DEVICE Worker(const LayerParams& params, unsigned shared, int cluster_, int rank_, Watch watch)
        : p(params),
          base(shared),
          cluster(cluster_),
          rank(rank_),
          hidden(tiles_of(HIDDEN_TILES, rank_)),
          place(rank_),
          rooms{shared, watch},
          exchange{shared, watch} {}

    DEVICE void sync() const { sync_named(1, TEAM); }
    DEVICE Tiles qkv() const { return tiles_of(QKV_TILES, rank); }
    DEVICE Tiles gated() const { return tiles_of(GATED_TILES, rank); }
#if defined(PROFILE)
    DEVICE void mark(int point) const {
        if (threadIdx.x == 0)
            reinterpret_cast<unsigned*>(p.words + PROFILE_AT)[blockIdx.x * MARKS + point] =
                static_cast<unsigned>(clock64());
    }
#endif

    // ---- the residual stream: each of the first warps owns 32 rows of this rank, of one voice ----

    static constexpr int OWN_TILES = HIDDEN_MOST;
    static constexpr int OWN_PAIRS = (OWN_TILES + 1) / 2;  // of tiles
    static_assert(OWN_PAIRS * VOICES <= TEAM_WARPS, "a warp for each pair of tiles and voice");
    DEVICE int own_voice() const { return warp_index() / OWN_PAIRS; }
    DEVICE int own_pair_of_tiles() const { return warp_index() % OWN_PAIRS; }
    DEVICE bool owns() const { return own_voice() < VOICES && own_pair_of_tiles() * 2 < hidden.count(); }
    DEVICE int own_row() const { return own_pair_of_tiles() * 32 + lane_index(); }  // of this rank
    DEVICE bool owns_row() const { return own_voice() < VOICES && own_row() < hidden.count() * TILE; }
    DEVICE int row() const { return hidden.begin * TILE + own_row(); }  // of the model
    DEVICE const float* gain(int norm) const { return p.gains + norm * HIDDEN + row(); }

    // Sends this warp's rows of the residual stream, times the next norm's gain, to the cluster.
    template <int ROWS, int SUMS> DEVICE void publish_residual(float next_gain) {
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

    static constexpr int UNITS = OWN_PAIRS * VOICES;  // warps that own rows

    // Where the sums of this lane's row meet.
    static constexpr int OF_CLUSTER = VOICES * HIDDEN;
    DEVICE Word* words_of(int which) const {
        return p.words + which * CLUSTERS * OF_CLUSTER + min(own_voice(), VOICES - 1) * HIDDEN + row();
    }

    // Adds a product's rows, summed over the clusters in their order, to the residual stream. words: words_of(which).
    DEVICE void add_to_residual(int which, Word* words) {
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

    // ---- the stages ----

    // A layer's keys or values of this rank's head at the first position, from dimension `dim` on.
    DEVICE Element* cache(void* const* all, int layer, int dim) const {
        const int head = LOCAL_HEADS < GROUP ? cluster * LOCAL_HEADS / GROUP : cluster * LOCAL_KV + place.kv;
        return static_cast<Element*>(all[place.voice]) + layer * p.layer_elements + head * HEAD_DIM + dim;
    }

    // The angles of a position, on their way: by the last threads, which own no rows.
    DEVICE int own_pair() const { return static_cast<int>(threadIdx.x) - (TEAM - HEAD_DIM / 2); }
    DEVICE void fetch_angles(int of_position) {
        if (own_pair() >= 0)
            angle =
                load_global<float2>(p.rope + static_cast<long long>(max(of_position, 0)) * (HEAD_DIM / 2) + own_pair());
    }
    // A new token at the position whose angles were fetched; a barrier of the block follows before they are read.
    DEVICE void begin_token(int new_position) {
        position = new_position;
        if (own_pair() >= 0) {
            store_shared<float>(base + ANGLES_AT + own_pair() * 4, angle.x);
            store_shared<float>(base + ANGLES_AT + (HEAD_DIM / 2 + own_pair()) * 4, angle.y);
        }
    }

    // The gains of this layer's heads, on their way while the first product is made.
    DEVICE void fetch_gains(int layer) const {
        const int piece = threadIdx.x - (TEAM - HEAD_DIM / 2);  // of 16 bytes: the last threads, which own no rows
        if (piece >= 0) {
            const float* from = p.head_gains + layer * 2 * HEAD_DIM + piece * 4;
            copy_async_16(base + GAINS_AT + piece * 16, from, true);
        }
        copy_async_commit();
    }

    // Queries, keys and values of the cluster's heads.
    DEVICE void project_qkv(int layer, Keys& keys) {
        MARK(0);
        keys.begin(cache(p.keys, layer, 0), cache(p.values, layer, place.dims * OUT_DIMS), place.part, position);
        const auto await = [&] {
            exchange.await<EX_HIDDEN>();
            MARK(1);
            if (layer == 0) return;  // given back with the layer before, or the head
            rooms.give_back<ROOM_GATED>();
            rooms.give_back<ROOM_DOWN>();
        };
        multiply<ROOM_QKV, QKV_MOST, QKV_TILES / RANKS, HIDDEN_STEPS, IN_LAYER>(
            rooms, qkv().count(), exchange.at<EX_HIDDEN>(), 0, await, true);
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

    DEVICE unsigned turned_at() const { return base + TURNED_AT + warp_index() * 2 * HEAD_DIM * 4; }

    // This rank's share of the attention: its keys, its dimensions of the values.
    DEVICE void attend(int layer, Keys& keys) {
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
            key_squares = HeadLanes::turn(raw + (Q_ROWS + place.kv * HEAD_DIM) * 4, base + GAINS_AT + HEAD_DIM * 4,
                                          angles, turned + HEAD_DIM * 4);
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
    DEVICE void take_newest(int layer, float factor, KeyValue& pair) const {
        const int lane = lane_index();
        HeadLanes key;
        key.load(turned_at() + HEAD_DIM * 4);
#pragma unroll
        for (int i = 0; i < HALF_LANE; i += 2) {
            pair.low.words[i / 2] = pack2(key.low[i] * factor, key.low[i + 1] * factor);
            pair.high.words[i / 2] = pack2(key.high[i] * factor, key.high[i + 1] * factor);
        }
        const unsigned raw =
            exchange.at<EX_QKV>() + (place.voice * QKV_ROWS + Q_ROWS + KV_ROWS + place.kv * HEAD_DIM) * 4;
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
    DEVICE void send_share() {
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
        for (int to = threadIdx.x; to < RECEIVERS; to += 32)
            exchange.send<EX_ATTENDED>(to_share + OUT_DIMS * 4, to, state);
    }

    // The shares of a head together: this warp's part of the attended vectors, which is what its products need.
    DEVICE void merge_shares() const {
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

    // The attended vector's product joins the residual stream. norm: the next one's index in the gains.
    DEVICE void project_attended(int norm) {
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
    DEVICE void gate_and_up(bool last) {
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

    DEVICE void project_gated(int norm, bool last) {
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
    DEVICE void forget_addresses() {
        forget(base);
        forget(rank);
        rooms.base = exchange.base = base;
        rooms.watch.dead = exchange.watch.dead = base + DEAD_AT;
    }

    // A layer, from the exchange of its input to that of the next one's.
    DEVICE void layer(int index) {
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
};
