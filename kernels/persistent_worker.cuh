// A thread of a launch: its state, what it owns and fetches ahead; what it does for a layer is in the files named below.
#pragma once

#include "persistent_attention.cuh"
#include "persistent_profile.cuh"
#include "persistent_layer_params.cuh"

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

    // ---- the residual stream (persistent_residual.cuh): each of the first warps owns 32 rows of this rank, of one voice ----

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

    static constexpr int UNITS = OWN_PAIRS * VOICES;  // warps that own rows

    // Where the sums of this lane's row meet.
    static constexpr int OF_CLUSTER = VOICES * HIDDEN;
    DEVICE Word* words_of(int which) const {
        return p.words + which * CLUSTERS * OF_CLUSTER + min(own_voice(), VOICES - 1) * HIDDEN + row();
    }

    template <int ROWS, int SUMS> DEVICE void publish_residual(float next_gain);
    DEVICE void add_to_residual(int which, Word* words);

    // ---- what a token and a layer need beside weights ----

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

    // ---- attention (persistent_shares.cuh) ----

    // A layer's keys or values of this rank's head at the first position, from dimension `dim` on.
    DEVICE Element* cache(void* const* all, int layer, int dim) const {
        const int head = LOCAL_HEADS < GROUP ? cluster * LOCAL_HEADS / GROUP : cluster * LOCAL_KV + place.kv;
        return static_cast<Element*>(all[place.voice]) + layer * p.layer_elements + head * HEAD_DIM + dim;
    }

    DEVICE unsigned turned_at() const { return base + TURNED_AT + warp_index() * 2 * HEAD_DIM * 4; }

    DEVICE void attend(int layer, Keys& keys);
    DEVICE void take_newest(int layer, float factor, KeyValue& pair) const;
    DEVICE void send_share();
    DEVICE void merge_shares() const;

    // ---- the stages (persistent_layer.cuh) ----

    DEVICE void project_qkv(int layer, Keys& keys);
    DEVICE void project_attended(int norm);
    DEVICE void gate_and_up(bool last);
    DEVICE void project_gated(int norm, bool last);
    DEVICE void forget_addresses();
    DEVICE void layer(int index);
};
