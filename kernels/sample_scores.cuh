// The scores of one row of logits: the repetition penalty (Keskar et al., 2019) is in them. They are looked at once in
// registers, and after that in shared memory; a vocabulary too large for that is read again for every look.
#pragma once

#include "device.cuh"

constexpr int WARPS = THREADS / WARP_LANES;
constexpr int VECTOR = VOCAB % 4 == 0 ? 4 : 1;  // ids side by side that one thread holds
constexpr int ITEMS = (VOCAB + THREADS * VECTOR - 1) / (THREADS * VECTOR) * VECTOR;  // scores of a thread
constexpr int MOST_HELD = 8192;
constexpr bool HELD = VOCAB <= MOST_HELD;
constexpr int SCORES_BYTES = HELD ? (VOCAB + 3) / 4 * 16 : 0;  // of shared memory
constexpr int SEEN_WORDS = (VOCAB + 31) / 32;

static_assert(THREADS % WARP_LANES == 0 && THREADS <= 1024, "whole warps");
static_assert(VOCAB <= 1 << 22, "an id has 22 bits");

// A number's order as an unsigned integer: the larger, the larger; -0 is 0; NaN comes above everything.
DEVICE unsigned order_of(float value) {
    if (value != value) return 0xffffffffu;
    const unsigned bits = value == 0.0f ? 0u : float_to_bits(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
constexpr unsigned ORDER_OF_INFINITY = 0xff800000u, ORDER_OF_MINUS_INFINITY = 0x007fffffu;

// The inverse, for numbers that are no NaN.
DEVICE float value_of(unsigned order) {
    return bits_to_float(static_cast<int>(order & 0x80000000u ? order & 0x7fffffffu : ~order));
}

struct Scores {
    const float* logits;   // (VOCAB,)
    const unsigned* seen;  // (SEEN_WORDS,)
    float penalty;
    unsigned smem;  // SCORES_BYTES
    float held[HELD ? ITEMS : 1];

    // Logits only; the penalty is put in by `penalise`, whose inputs come later.
    DEVICE Scores(const float* row, unsigned shared) : logits(row), seen(nullptr), penalty(1.0f), smem(shared) {
        if constexpr (HELD) {
#pragma unroll
            for (int j = 0; j < ITEMS; j += VECTOR) load_held(j);
        }
    }

    DEVICE void penalise(const unsigned* slot_seen, float slot_penalty) {
        seen = slot_seen;
        penalty = slot_penalty;
        if constexpr (HELD) {
#pragma unroll
            for (int j = 0; j < ITEMS; j += VECTOR) penalise_held(j);
        }
    }

    // Id of this thread's own score j, ascending; VOCAB or more: there is none.
    DEVICE static int own_id(int j) {
        return (j / VECTOR * THREADS + static_cast<int>(threadIdx.x)) * VECTOR + j % VECTOR;
    }
    // As a list that the threads share: every id.
    DEVICE static int first() { return threadIdx.x; }
    DEVICE static int end() { return VOCAB; }
    DEVICE static int step() { return THREADS; }
    DEVICE static int id(int entry) { return entry; }

    // This thread's score j.
    DEVICE float own(int j) const {
        if constexpr (HELD)
            return held[j];
        else
            return own_id(j) < VOCAB ? read(own_id(j)) : -infinity();
    }
    // Any id's, behind a barrier after `penalise`.
    DEVICE float of(int id) const {
        if constexpr (HELD)
            return load_shared<float>(smem + id * 4);
        else
            return read(id);
    }

private:
    // The scores j, j + 1, ... of one vector.
    DEVICE void load_held(int j) {
        if constexpr (VECTOR == 4) {
            float4 v = make_float4(-infinity(), -infinity(), -infinity(), -infinity());
            if (own_id(j) < VOCAB) v = load_global_fresh<float4>(logits + own_id(j));
            held[j] = v.x, held[j + 1] = v.y, held[j + 2] = v.z, held[j + 3] = v.w;
        } else {
            held[j] = own_id(j) < VOCAB ? load_global_fresh<float>(logits + own_id(j)) : -infinity();
        }
    }
    DEVICE void penalise_held(int j) {
        const int id = own_id(j);
        if (id >= VOCAB) return;
        const unsigned word = load_global_fresh<unsigned>(seen + id / 32) >> (id % 32);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            if (word >> i & 1u) held[j + i] = penalised(held[j + i]);
        }
        if constexpr (VECTOR == 4)
            store_shared<float4>(smem + id * 4, make_float4(held[j], held[j + 1], held[j + 2], held[j + 3]));
        else
            store_shared<float>(smem + id * 4, held[j]);
    }
    DEVICE float read(int id) const {
        const float logit = load_global_fresh<float>(logits + id);
        return load_global_fresh<unsigned>(seen + id / 32) >> (id % 32) & 1u ? penalised(logit) : logit;
    }
    DEVICE float penalised(float logit) const { return logit > 0.0f ? logit / penalty : logit * penalty; }
};
