// What a drawn token does to its sequence's record, and how one is drawn: shared by the kernels that sample.
#pragma once

#include "philox.cuh"
#include "sample_scores.cuh"
#include "sample_search.cuh"
#include "step_params.cuh"

// A slot's record as it lies in memory.
struct SlotWords {
    uint4 words[4];

    DEVICE static SlotWords load(const SlotState* slot) {
        const char* at = reinterpret_cast<const char*>(slot);
        return {load_global_fresh<uint4>(at), load_global_fresh<uint4>(at + 16), load_global_fresh<uint4>(at + 32),
                load_global_fresh<uint4>(at + 48)};
    }
    DEVICE void keep(unsigned smem) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared<uint4>(smem + i * 16, words[i]);
    }
    DEVICE static SlotWords kept(unsigned smem) {
        return {load_shared<uint4>(smem), load_shared<uint4>(smem + 16), load_shared<uint4>(smem + 32),
                load_shared<uint4>(smem + 48)};
    }
    DEVICE SlotState state() const {
        const uint4 &a = words[0], &b = words[1], &c = words[2], &d = words[3];
        SlotState s;
        s.seed = join(a.x, a.y), s.stream = join(a.z, a.w);
        s.top_p = bits_to_double(join(b.x, b.y));
        s.scale_high = bits_to_float(static_cast<int>(b.z)), s.scale_low = bits_to_float(static_cast<int>(b.w));
        s.penalty = bits_to_float(static_cast<int>(c.x)), s.options = static_cast<int>(c.y);
        s.limit = static_cast<int>(c.z), s.count = static_cast<int>(c.w);
        s.position = static_cast<int>(d.x), s.status = static_cast<int>(d.y);
        s.repeats = static_cast<int>(d.z), s.stuck = static_cast<int>(d.w);
        return s;
    }
};

DEVICE void store_slot(SlotState* slot, const SlotState& s) {
    char* at = reinterpret_cast<char*>(slot);
    store_global<int>(&slot->count, s.count);
    store_global<uint4>(at + 48, make_uint4(static_cast<unsigned>(s.position), static_cast<unsigned>(s.status),
                                            static_cast<unsigned>(s.repeats), static_cast<unsigned>(s.stuck)));
}

// What the whole block knows of the scores.
struct Extremes {
    unsigned best;   // order_of the largest score; ORDER_OF_INFINITY or more where one is NaN or infinite
    unsigned id;     // the lowest id that has it
    unsigned least;  // order_of the smallest finite score
    float distance;  // sum of what each thread gave
};

// The least sum that is not below share * all, and at least 1.
DEVICE Sum share_reached(Sum all, double share) {
    const double wanted = share * static_cast<double>(all);
    Sum target = static_cast<Sum>(wanted);
    if (static_cast<double>(target) < wanted || target == 0) ++target;
    return target < all ? target : all;
}

// The least sum above number / 2^24 * kept; number < 2^24.
DEVICE Sum share_passed(Sum kept, unsigned number) {
    return (kept >> 24) * number + ((kept & 0xffffffu) * number >> 24) + 1;
}

// A token from softmax(scores / temperature), among the most likely whose probability reaches top_p. slot_smem: where the
// slot's record is kept; what is needed once is read from there.
template <typename List>
DEVICE int draw(const List& scores, const Extremes& extremes, unsigned slot_smem, const Search& search) {
    const SlotState slot = SlotWords::kept(slot_smem).state();
    const Softmax softmax(extremes.best, extremes.least, slot.scale_high, slot.scale_low);
    search.begin(scores, softmax);
    Found found{0, warp_index() == 0 ? search.total() : 0};
#pragma unroll 1
    for (int pass = slot.top_p < 1.0 ? 0 : 1; pass < 2; ++pass) {
        // First where the sum reaches top_p of all, then where it goes over the random share of what was kept.
        Sum target = 0;
        if (warp_index() == 0) {
            const SlotState s = SlotWords::kept(slot_smem).state();
            target = pass == 0 ? share_reached(found.sum, s.top_p)
                               : share_passed(found.sum, random_24_bits(s.seed, s.stream, s.count));
        }
        found = search.find(scores, softmax, target);
    }
    return found.id;
}

// The loop check and the end of the sequence, by `token` and how far the state moved. Params: a kernel's, with the end token
// and the limits of the loop check.
template <typename Params> DEVICE void advance(SlotState& slot, const Params& params, int token, float distance) {
    const bool stop = token == params.end_token;
    if (slot.count > 0 && !stop) {
        slot.repeats = distance < params.loop_distance ? slot.repeats + 1 : slot.repeats > 0 ? slot.repeats - 1 : 0;
        if (slot.repeats > params.loop_length) slot.stuck = 1;
    }
    ++slot.count;
    ++slot.position;
    if (stop)
        slot.status = STATUS_STOP;
    else if (slot.stuck != 0 && (slot.options & OPTION_GIVE_UP) != 0)
        slot.status = STATUS_STUCK;
    else if (slot.count >= slot.limit)
        slot.status = STATUS_LENGTH;
}

DEVICE unsigned long long progress_word(const SlotState& slot, int token) {
    const unsigned upper = static_cast<unsigned>(slot.status) | (slot.stuck != 0 ? 1u << 7 : 0u);
    return join(static_cast<unsigned>(slot.count), upper | static_cast<unsigned>(token) << 8);
}
