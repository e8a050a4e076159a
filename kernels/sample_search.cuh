// The place of a cumulative probability in the order of the scores, most likely first and lower ids first among equals,
// without sorting: a radix descent.
//
// A score's weight 2^((score - top) scale) is a fixed-point number, so sums are exact, associative and the same in any
// order; what is asked for is the first score, in that order, at which the running sum of weights reaches a target.
//
// The order is spelled in digits of 6 bits. First those of the distance from the top score, a linear scale that spreads
// the scores over the bins; then, for scores that fall together, those of (distance in the order of floats, id), which
// are never equal. A level sums weights and counts for each value of the next digit among the scores that share the
// digits before, and goes on in the bin that holds the target. As soon as that has few scores, each of them is compared
// with every other instead. At most 12 levels; two serve the usual logits.
#pragma once

#include "device.cuh"
#include "sample_scores.cuh"
#include "softmax_state.cuh"

typedef unsigned long long Sum;

#if !defined(SEARCH_TOGETHER)
#define SEARCH_TOGETHER 2
#endif
constexpr int TOGETHER = SEARCH_TOGETHER;  // scores that a thread looks at: more where few warps search
constexpr int DIGIT_BITS = 6, BINS = 1 << DIGIT_BITS;
constexpr int COARSE_BITS = 18, COARSE_LEVELS = COARSE_BITS / DIGIT_BITS;
constexpr int ID_BITS = 22, FINE_BITS = 32 + ID_BITS;
constexpr int CANDIDATES = 128;  // scores that are compared one by one, a thread for each
static_assert(THREADS >= CANDIDATES, "a thread for each candidate");

// A weight is high * 2^LIMB_BITS + low. Each bin has a cell for every lane, into which no more than CELL_ITEMS weights
// go, and each limb's sum of them must fit 32 bits.
constexpr int CELL_ITEMS = WARPS * ITEMS;
constexpr int bits_of(int value) { return value == 0 ? 0 : 1 + bits_of(value / 2); }
constexpr int LIMB_BITS = 31 - bits_of(CELL_ITEMS) < 22 ? 31 - bits_of(CELL_ITEMS) : 22;
constexpr int HALF_LIMB = 1 << (LIMB_BITS - 1);
constexpr float LIMB = static_cast<float>(1 << LIMB_BITS);
static_assert(LIMB_BITS >= 12, "weights below 2^-24 of the largest count as nothing");

// Shared memory, in bytes from the search's own start.
constexpr int CELLS_BYTES = BINS * WARP_LANES * 4;  // of one quantity: low limbs, high limbs, counts
constexpr int FIRST_AT = 3 * CELLS_BYTES;           // sums (8 bytes a bin) and counts of the first level, which is kept
constexpr int LEVEL_BYTES = BINS * 12;
constexpr int LATER_AT = FIRST_AT + LEVEL_BYTES;   // of the level under way
constexpr int CHOICE_AT = LATER_AT + LEVEL_BYTES;  // the bin that holds the target: 32 bytes
constexpr int RESULT_AT = CHOICE_AT + 32;          // 16 bytes
constexpr int COUNTER_AT = RESULT_AT + 16;         // a word
constexpr int CANDIDATES_AT = COUNTER_AT + 16;     // 16 bytes each
constexpr int SEARCH_BYTES = CANDIDATES_AT + CANDIDATES * 16;

DEVICE unsigned low_half(Sum value) { return static_cast<unsigned>(value); }
DEVICE unsigned high_half(Sum value) { return static_cast<unsigned>(value >> 32); }
DEVICE Sum join(unsigned low, unsigned high) { return static_cast<Sum>(high) << 32 | low; }

// low: -HALF_LIMB to HALF_LIMB.
struct Weight {
    int high, low;

    DEVICE bool any() const { return high > 0 || low > 0; }
    DEVICE Sum sum() const {
        return (static_cast<Sum>(high) << LIMB_BITS) + static_cast<Sum>(static_cast<long long>(low));
    }
};

// The softmax at a temperature, up to a factor.
struct Softmax {
    float top;                    // the largest score
    unsigned top_order;           // order_of(top)
    float scale_high, scale_low;  // log2(e) / temperature
    float spread;                 // coarse steps in a unit of score

    // Scores whose exponent is this much below the top's weigh nothing.
    static constexpr float LEAST_EXPONENT = 2 * LIMB_BITS + 1;

    DEVICE Softmax(unsigned top_of_all, unsigned least_of_all, float high, float low)
        : top(value_of(top_of_all)), top_order(top_of_all), scale_high(high), scale_low(low) {
        float range = top - value_of(least_of_all);
        const float weighs = LEAST_EXPONENT / scale_high;  // infinite for the largest temperatures
        if (!(range < weighs)) range = weighs;
        constexpr float STEPS = (1 << COARSE_BITS) - 1;
        spread = range > STEPS * 1e-30f ? STEPS / range : 0.0f;
    }

    // Whether a score weighs anything, or nearly so.
    DEVICE bool weighs(float score) const { return (top - score) * scale_high < LEAST_EXPONENT; }

    DEVICE Weight weigh(float score) const {
        const float distance = top - score, exponent = distance * scale_high;
        if (!(exponent < LEAST_EXPONENT)) return {0, 0};
        // 2^-(distance scale_high + distance scale_low), where the first product's rounding error is put right as well
        const float rest = fused_multiply_add(distance, scale_low, fused_multiply_add(distance, scale_high, -exponent));
        float weight = exp2_fast(-exponent);
        weight = fused_multiply_add(weight, rest * -LN_2, weight);
        // Adding 2^23 leaves the nearest integer in the lower bits; 1.5 * 2^23 does for negative ones too.
        constexpr float SHIFT = 8388608.0f, SIGNED_SHIFT = 12582912.0f;
        const float whole = fused_multiply_add(weight, LIMB, SHIFT);
        const float fraction = fused_multiply_add(weight, LIMB, -(whole - SHIFT));
        return {static_cast<int>(float_to_bits(whole) - float_to_bits(SHIFT)),
                static_cast<int>(float_to_bits(fused_multiply_add(fraction, LIMB, SIGNED_SHIFT)) -
                                 float_to_bits(SIGNED_SHIFT))};
    }

    DEVICE unsigned coarse(float score) const {
        constexpr float SHIFT = 8388608.0f;
        const unsigned steps = float_to_bits((top - score) * spread + SHIFT) - float_to_bits(SHIFT);
        constexpr unsigned MOST = (1u << COARSE_BITS) - 1u;
        return steps < MOST ? steps : MOST;
    }
    DEVICE Sum fine(float score, int id) const {
        return static_cast<Sum>(top_order - order_of(score)) << ID_BITS | static_cast<unsigned>(id);
    }
};

// The digits chosen so far.
struct Prefix {
    int level = 0;
    unsigned coarse = 0;
    Sum fine = 0;

    DEVICE void append(unsigned digit) {
        if (level < COARSE_LEVELS)
            coarse = coarse << DIGIT_BITS | digit;
        else
            fine = fine << DIGIT_BITS | digit;
        ++level;
    }
    DEVICE bool holds(const Softmax& softmax, float score, int id) const {
        const unsigned steps = softmax.coarse(score);
        if (level <= COARSE_LEVELS) return level == 0 || steps >> (COARSE_BITS - DIGIT_BITS * level) == coarse;
        return steps == coarse && softmax.fine(score, id) >> (FINE_BITS - DIGIT_BITS * (level - COARSE_LEVELS)) == fine;
    }
    DEVICE unsigned next_digit(const Softmax& softmax, float score, int id) const {
        if (level < COARSE_LEVELS) {
            return softmax.coarse(score) >> (COARSE_BITS - DIGIT_BITS * (level + 1)) & (BINS - 1);
        }
        const int shift = FINE_BITS - DIGIT_BITS * (level - COARSE_LEVELS + 1);
        return static_cast<unsigned>(softmax.fine(score, id) >> shift) & (BINS - 1);
    }
};
constexpr int LEVELS = COARSE_LEVELS + FINE_BITS / DIGIT_BITS;
static_assert(FINE_BITS % DIGIT_BITS == 0 && COARSE_BITS % DIGIT_BITS == 0, "whole digits");

// All threads that search. -D SEARCH_BARRIER: the block has others besides, so they meet at a named barrier.
DEVICE void sync_search() {
#if defined(SEARCH_BARRIER)
    sync_named(SEARCH_BARRIER, THREADS);
#else
    sync_block();
#endif
}

struct Found {
    int id;
    Sum sum;  // of the weights up to it, its own included
};

// All threads of the block call the methods together. A list of scores says which ones a thread looks at: entries
// first(), first() + step(), ... below end(), each with an id; scores that weigh nothing need not be in it.
class Search {
public:
    DEVICE explicit Search(unsigned shared) : smem(shared) {}

    // Before anything else, and before a barrier.
    DEVICE void clear_cells() const {
        for (int i = threadIdx.x; i < 3 * CELLS_BYTES / 16; i += THREADS) {
            store_shared<uint4>(smem + i * 16, make_uint4(0u, 0u, 0u, 0u));
        }
    }

    // The first level, which all searches share.
    template <typename List> DEVICE void begin(const List& scores, const Softmax& softmax) const {
        count(scores, softmax, Prefix(), smem + FIRST_AT);
    }

    // Sum of all weights; in the first warp only.
    DEVICE Sum total() const {
        Sum before, sum;
        pair_sums(smem + FIRST_AT, before, sum);
        return broadcast(before + sum, WARP_LANES - 1);
    }

    // The first score at which the sum reaches `target`, which is between 1 and the sum of all and is looked at in the
    // first warp only.
    template <typename List> DEVICE Found find(const List& scores, const Softmax& softmax, Sum target) const {
        Prefix prefix;
        Sum before = 0;
        unsigned bins = smem + FIRST_AT;
        while (true) {
            if (warp_index() == 0) choose(bins, target - before);
            sync_search();  // the choice is written
            const uint4 bin = load_shared<uint4>(smem + CHOICE_AT), rest = load_shared<uint4>(smem + CHOICE_AT + 16);
            prefix.append(bin.x);
            before += join(bin.z, bin.w);
            if (bin.y <= CANDIDATES || prefix.level == LEVELS) {
                return compare(scores, softmax, prefix, static_cast<int>(bin.y), before, join(rest.x, rest.y));
            }
            bins = smem + LATER_AT;
            count(scores, softmax, prefix, bins);
        }
    }

private:
    unsigned smem;

    DEVICE unsigned cell(unsigned digit) const { return smem + (digit * WARP_LANES + lane_index()) * 4; }

    // use(id, score, weight) for this thread's scores with the prefix that weigh something. TOGETHER at a time, so that
    // they do not wait for each other; the prefix is cheaper than the weight, and few have it at deeper levels.
    template <typename List, typename Use>
    DEVICE static void each(const List& scores, const Softmax& softmax, const Prefix& prefix, Use use) {
        const int end = scores.end(), step = scores.step();
#pragma unroll 1
        for (int first = scores.first(); first < end; first += TOGETHER * step) {
            int ids[TOGETHER];
            float values[TOGETHER];
            bool held[TOGETHER], any = false;
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) ids[i] = scores.id(first + i * step < end ? first + i * step : first);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) values[i] = scores.of(ids[i]);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                held[i] = first + i * step < end && prefix.holds(softmax, values[i], ids[i]);
                any = any || held[i];
            }
            if (!any) continue;
            Weight weights[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) weights[i] = softmax.weigh(values[i]);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                if (held[i] && weights[i].any()) use(ids[i], values[i], weights[i]);
        }
    }

    // Sums and counts of the scores with this prefix, by their next digit, into `bins`. Ends with a barrier.
    template <typename List>
    DEVICE void count(const List& scores, const Softmax& softmax, const Prefix& prefix, unsigned bins) const {
        each(scores, softmax, prefix, [&](int id, float score, const Weight& weight) {
            const unsigned at = cell(prefix.next_digit(softmax, score, id));
            atomic_add_shared(at, static_cast<unsigned>(weight.low + HALF_LIMB));
            atomic_add_shared(at + CELLS_BYTES, static_cast<unsigned>(weight.high));
            atomic_add_shared(at + 2 * CELLS_BYTES, 1u);
        });
        sync_search();  // the cells are complete
        for (int bin = warp_index(); bin < BINS; bin += WARPS) {
            const unsigned at = cell(bin);
            const unsigned low = load_shared<unsigned>(at), high = load_shared<unsigned>(at + CELLS_BYTES);
            const unsigned counted = sum_of_lanes(load_shared<unsigned>(at + 2 * CELLS_BYTES));
#pragma unroll
            for (int i = 0; i < 3; ++i) store_shared<unsigned>(at + i * CELLS_BYTES, 0u);  // for the next level
            const Sum sum =
                (sum_over_lanes(high) << LIMB_BITS) + sum_over_lanes(low) - static_cast<Sum>(counted) * HALF_LIMB;
            if (lane_index() == 0) {
                store_shared<uint2>(bins + bin * 8, make_uint2(low_half(sum), high_half(sum)));
                store_shared<unsigned>(bins + BINS * 8 + bin * 4, counted);
            }
        }
        sync_search();  // the bins are written
    }

    // Of 32-bit numbers, exactly.
    DEVICE static Sum sum_over_lanes(unsigned value) {
        return (static_cast<Sum>(sum_of_lanes(value >> 16)) << 16) + sum_of_lanes(value & 0xffffu);
    }
    DEVICE static Sum broadcast(Sum value, int lane) {
        return join(shuffle(low_half(value), lane), shuffle(high_half(value), lane));
    }

    // Of the two bins of this lane, and of all bins before them. Returns the sum of the first of the two.
    DEVICE static Sum pair_sums(unsigned bins, Sum& before, Sum& sum) {
        const uint4 pair = load_shared<uint4>(bins + lane_index() * 16);
        const Sum first = join(pair.x, pair.y);
        sum = first + join(pair.z, pair.w);
        Sum up_to = sum;
#pragma unroll
        for (int step = 1; step < WARP_LANES; step *= 2) {
            const Sum other = broadcast(up_to, (lane_index() - step) & (WARP_LANES - 1));
            if (lane_index() >= step) up_to += other;
        }
        before = up_to - sum;
        return first;
    }

    // Writes which bin holds the target, how many scores it has, the sum of the bins before it, and what is left of the
    // target; by one warp.
    DEVICE void choose(unsigned bins, Sum target) const {
        Sum before, sum;
        const Sum first = pair_sums(bins, before, sum);
        const unsigned reached = lanes_where(before + sum >= target);
        if (lane_index() != (reached == 0u ? WARP_LANES - 1 : lowest_bit(reached))) return;
        const bool second = before + first < target;
        if (second) before += first;
        const unsigned bin = 2 * lane_index() + (second ? 1 : 0);
        const unsigned counted = load_shared<unsigned>(bins + BINS * 8 + bin * 4);
        store_shared<uint4>(smem + CHOICE_AT, make_uint4(bin, counted, low_half(before), high_half(before)));
        const Sum rest = target - before;
        store_shared<uint4>(smem + CHOICE_AT + 16, make_uint4(low_half(rest), high_half(rest), 0u, 0u));
        store_shared<unsigned>(smem + COUNTER_AT, 0u);
    }

    // Among the `counted` scores with this prefix, the first at which the sum of their weights reaches `target`.
    template <typename List>
    DEVICE Found compare(const List& scores, const Softmax& softmax, const Prefix& prefix, int counted, Sum before,
                         Sum target) const {
        each(scores, softmax, prefix, [&](int id, float score, const Weight& weight) {
            const unsigned at = CANDIDATES_AT + atomic_add_shared(smem + COUNTER_AT, 1u) * 16;
            const Sum place = softmax.fine(score, id), sum = weight.sum();
            store_shared<uint4>(smem + at,
                                make_uint4(low_half(place), high_half(place), low_half(sum), high_half(sum)));
        });
        sync_search();  // the candidates are written, in whatever order
        const int mine = threadIdx.x;
        if (mine < counted) {
            const uint4 candidate = load_shared<uint4>(smem + CANDIDATES_AT + mine * 16);
            const Sum place = join(candidate.x, candidate.y), weight = join(candidate.z, candidate.w);
            Sum sum = 0;
            for (int i = 0; i < counted; ++i) {
                const uint4 other = load_shared<uint4>(smem + CANDIDATES_AT + i * 16);
                if (join(other.x, other.y) <= place) sum += join(other.z, other.w);
            }
            if (sum >= target && sum - weight < target) {
                const unsigned id = candidate.x & ((1u << ID_BITS) - 1u);
                store_shared<uint4>(smem + RESULT_AT,
                                    make_uint4(id, 0u, low_half(before + sum), high_half(before + sum)));
            }
        }
        sync_search();  // the result is written
        const uint4 result = load_shared<uint4>(smem + RESULT_AT);
        return {static_cast<int>(result.x), join(result.z, result.w)};
    }
};
