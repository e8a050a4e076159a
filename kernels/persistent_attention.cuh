// Attention of one new token inside a cluster. Position p of the sequence belongs to share p % PARTS, there to group
// (p / PARTS) % GROUPS of eight lanes: the group that stores a key and value is the one that reads them ever after, so they
// need no fence. Keys of the layer are loaded into registers before the queries are known.
#pragma once

#include "persistent_products.cuh"

constexpr int GROUPS = TEAM_WARPS * 4;    // of eight lanes
constexpr int HALF_LANE = HEAD_DIM / 16;  // dimensions of a lane in each half of a head: the rotation stays in the lane
constexpr int LANE_DIMS = 2 * HALF_LANE;
constexpr int VALUE_DIMS = OUT_DIMS / 8;   // dimensions of the values of a lane
constexpr int LAST_DIMS = VALUE_DIMS / 4;  // that a lane ends with
constexpr float NO_SCORE = -3.0e38f;       // below every score, and finite: differences stay numbers

// N elements in 32-bit words, loaded 4, 8 or 16 bytes at a time.
template <int N> struct Elements {
    unsigned words[N / 2];

    DEVICE void load(const Element* from) {
        if constexpr (N % 8 == 0) {
#pragma unroll
            for (int i = 0; i < N / 8; ++i) {
                const uint4 v = load_global_fresh<uint4>(from + 8 * i);
                words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
            }
        } else if constexpr (N == 4) {
            const uint2 v = load_global_fresh<uint2>(from);
            words[0] = v.x, words[1] = v.y;
        } else {
            words[0] = load_global_fresh<unsigned>(from);
        }
    }
    DEVICE void store(Element* to) const {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) store_global<unsigned>(to + 2 * i, words[i]);
    }
    DEVICE float operator[](int i) const { return i % 2 == 0 ? unpack_low(words[i / 2]) : unpack_high(words[i / 2]); }
};

// N neighbouring floats of shared memory.
template <int N> DEVICE void load_floats(unsigned at, float* to) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const float4 v = load_shared<float4>(at + 4 * i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    } else if constexpr (N == 2) {
        const float2 v = load_shared<float2>(at);
        to[0] = v.x, to[1] = v.y;
    } else {
        to[0] = load_shared<float>(at);
    }
}

// Over the eight lanes of a group, in all of them.
DEVICE float sum_of_group(float sum) {
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
    return sum;
}

// A head of a query or key in the eight lanes of a group: elements j HALF_LANE + i and, behind them, their partners.
struct HeadLanes {
    float low[HALF_LANE], high[HALF_LANE];

    // How a warp passes a head on to its groups: PIECE elements of one lane after those of the next, so that lanes that load
    // together find them in different banks.
    static constexpr int PIECE = HALF_LANE < 4 ? HALF_LANE : 4;
    static constexpr int LANE_PAIRS = HEAD_DIM < 64 ? 1 : HEAD_DIM / 64;  // pairs of elements that a lane turns
    DEVICE static unsigned place_of(unsigned scratch, int element) {      // of a half
        const int lane = element / HALF_LANE, piece = element % HALF_LANE / PIECE;
        return scratch + ((piece * 8 + lane) * PIECE + element % PIECE) * 4;
    }

    // By a whole warp: a head (HEAD_DIM floats at `raw`) times its gain and rotated by the angles (cosines, then sines), into
    // HEAD_DIM floats of scratch that are the warp's own; a barrier of the warp follows. All in shared memory. Returns this
    // lane's part of the sum of squares: the norm is left to do, as its factor is the same for all elements.
    DEVICE static float turn(unsigned raw, unsigned gain_at, unsigned angles_at, unsigned scratch) {
        constexpr unsigned HALF_BYTES = HEAD_DIM * 2;
        const int first = lane_index() * LANE_PAIRS;
        float sum = 0.0f;
        if (first < HEAD_DIM / 2) {
            float l[LANE_PAIRS], h[LANE_PAIRS], gain_l[LANE_PAIRS], gain_h[LANE_PAIRS], cosine[LANE_PAIRS],
                sine[LANE_PAIRS];
            load_floats<LANE_PAIRS>(raw + first * 4, l);
            load_floats<LANE_PAIRS>(raw + HALF_BYTES + first * 4, h);
            load_floats<LANE_PAIRS>(gain_at + first * 4, gain_l);
            load_floats<LANE_PAIRS>(gain_at + HALF_BYTES + first * 4, gain_h);
            load_floats<LANE_PAIRS>(angles_at + first * 4, cosine);
            load_floats<LANE_PAIRS>(angles_at + HALF_BYTES + first * 4, sine);
#pragma unroll
            for (int i = 0; i < LANE_PAIRS; ++i) {
                sum += l[i] * l[i] + h[i] * h[i];
                const float gained_l = l[i] * gain_l[i], gained_h = h[i] * gain_h[i];
                const unsigned at = place_of(scratch, first + i);
                store_shared<float>(at, gained_l * cosine[i] - gained_h * sine[i]);
                store_shared<float>(at + HALF_BYTES, gained_h * cosine[i] + gained_l * sine[i]);
            }
        }
        return sum;
    }

    // What `turn` has put into the scratch, into the lanes of every group.
    DEVICE void load(unsigned scratch) {
        const unsigned at = scratch + lane_index() % 8 * PIECE * 4;
#pragma unroll
        for (int i = 0; i < HALF_LANE; i += PIECE) {
            load_floats<PIECE>(at + i * 8 * 4, low + i);
            load_floats<PIECE>(at + HEAD_DIM * 2 + i * 8 * 4, high + i);
        }
    }
};

// The factor of the RMS norm of a head, from the lanes' parts of its sum of squares.
DEVICE float head_factor(float sum, float epsilon) { return inverse_sqrt(sum * (1.0f / HEAD_DIM) + epsilon); }

// One key with its value, as a group holds them.
struct KeyValue {
    Elements<HALF_LANE> low, high;
    Elements<VALUE_DIMS> value;

    DEVICE void load(const Element* key, const Element* values) {
        low.load(key + lane_index() % 8 * HALF_LANE);
        high.load(key + HEAD_DIM / 2 + lane_index() % 8 * HALF_LANE);
        value.load(values + lane_index() % 8 * VALUE_DIMS);
    }
    // The score in all eight lanes.
    DEVICE float score(const HeadLanes& query) const {
        float sum = 0.0f, other = 0.0f;
#pragma unroll
        for (int i = 0; i < HALF_LANE; ++i) sum += query.low[i] * low[i], other += query.high[i] * high[i];
        return sum_of_group(sum + other);
    }
};

// The online softmax of a group: maximum and sum (of powers of 2) and the weighted values, VALUE_DIMS of each lane.
struct Share {
    float maximum = NO_SCORE, sum = 0.0f;
    float values[VALUE_DIMS] = {};

    DEVICE void add(float score, const Elements<VALUE_DIMS>& value) {
        const float larger = fmaxf(maximum, score);
        const float kept = exp2_fast(maximum - larger), weight = exp2_fast(score - larger);
        maximum = larger;
        sum = sum * kept + weight;
#pragma unroll
        for (int i = 0; i < VALUE_DIMS; ++i) values[i] = values[i] * kept + weight * value[i];
    }

    // Adds up the warp's four groups: maximum and sum in every lane, of the values LAST_DIMS from first_dim() on in values[0...].
    DEVICE void merge_groups() {
        const int lane = lane_index();
        float all = fmaxf(maximum, shuffle_xor(maximum, 8));
        all = fmaxf(all, shuffle_xor(all, 16));
        const float weight = exp2_fast(maximum - all);
        maximum = all;
        sum *= weight;
        sum += shuffle_xor(sum, 8);
        sum += shuffle_xor(sum, 16);
        const bool upper_8 = lane & 8, upper_16 = lane & 16;
        float half[VALUE_DIMS / 2];
#pragma unroll
        for (int i = 0; i < VALUE_DIMS / 2; ++i) {
            const float mine = (upper_8 ? values[i + VALUE_DIMS / 2] : values[i]) * weight;
            const float theirs = (upper_8 ? values[i] : values[i + VALUE_DIMS / 2]) * weight;
            half[i] = mine + shuffle_xor(theirs, 8);
        }
#pragma unroll
        for (int i = 0; i < LAST_DIMS; ++i) {
            const float mine = upper_16 ? half[i + LAST_DIMS] : half[i];
            const float theirs = upper_16 ? half[i] : half[i + LAST_DIMS];
            values[i] = mine + shuffle_xor(theirs, 16);
        }
    }
    DEVICE static int first_dim() {
        const int lane = lane_index();
        return lane % 8 * VALUE_DIMS + (lane & 8 ? VALUE_DIMS / 2 : 0) + (lane & 16 ? LAST_DIMS : 0);
    }
};

// Where a rank stands in the attention of its cluster.
struct Place {
    int head, kv, voice;  // of the cluster's heads, of its key-value heads, of the voices
    int part, dims;       // share of the keys, share of the dimensions

    DEVICE explicit Place(unsigned rank)
        : head(rank / RANKS_OF_HEAD),
          kv(LOCAL_HEADS < GROUP ? 0 : rank / RANKS_OF_HEAD / GROUP),
          voice(rank % RANKS_OF_HEAD / RANKS_OF_VOICE),
          part(rank % RANKS_OF_VOICE / DIM_PARTS),
          dims(rank % DIM_PARTS) {}
};

// The keys of this layer that a group reads; the next one is on its way.
struct Keys {
    const Element *keys, *values;  // (capacity, KV_HEADS, HEAD_DIM) of the slot, at this rank's head (and dimensions)
    int position, count;           // this group's next position; positions in the cache, -1: nothing to attend to
    KeyValue next;

    static constexpr int STRIDE = GROUPS * PARTS;
    static constexpr int TOKEN = KV_HEADS * HEAD_DIM;

    DEVICE void begin(const Element* keys_, const Element* values_, int part, int count_) {
        keys = keys_, values = values_, count = count_;
        position = (warp_index() * 4 + lane_index() / 8) * PARTS + part;
        load();
    }
    DEVICE void load() {
        if (position < count) next.load(keys + position * TOKEN, values + position * TOKEN);
    }
    // Whether this warp's first group has a position left, the newest one's (`count`) included. The same in all lanes.
    DEVICE bool more() const { return position - lane_index() / 8 * PARTS <= count; }
};
