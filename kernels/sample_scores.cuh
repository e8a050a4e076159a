// The scores of one row of logits, in the registers of a thread block: the repetition penalty (Keskar et al., 2019) is in
// them. A vocabulary too large for that is read again whenever a score is asked for.
#pragma once

#include "device.cuh"

constexpr int WARPS = THREADS / WARP_LANES;
constexpr int VECTOR = VOCAB % 4 == 0 ? 4 : 1;  // ids side by side that one thread holds
constexpr int ITEMS = (VOCAB + THREADS * VECTOR - 1) / (THREADS * VECTOR) * VECTOR;  // scores of a thread
constexpr bool HELD = ITEMS <= 16;
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
    float held[HELD ? ITEMS : 1];

    // Id of this thread's score j; VOCAB or more: there is none.
    DEVICE static int id(int j) { return (j / VECTOR * THREADS + static_cast<int>(threadIdx.x)) * VECTOR + j % VECTOR; }

    // Logits only; the penalty is put in by `penalise`, whose inputs come later.
    DEVICE explicit Scores(const float* row) : logits(row), seen(nullptr), penalty(1.0f) {
        if (!HELD) return;
#pragma unroll
        for (int j = 0; j < (HELD ? ITEMS : 0); j += VECTOR) {
            if (VECTOR == 4) {
                float4 v = make_float4(-infinity(), -infinity(), -infinity(), -infinity());
                if (id(j) < VOCAB) v = load_global_fresh<float4>(logits + id(j));
                held[j] = v.x;
                held[j + (VECTOR == 4 ? 1 : 0)] = v.y;
                held[j + (VECTOR == 4 ? 2 : 0)] = v.z;
                held[j + (VECTOR == 4 ? 3 : 0)] = v.w;
            } else {
                held[j] = id(j) < VOCAB ? load_global_fresh<float>(logits + id(j)) : -infinity();
            }
        }
    }

    DEVICE void penalise(const unsigned* slot_seen, float slot_penalty) {
        seen = slot_seen;
        penalty = slot_penalty;
        if (!HELD) return;
#pragma unroll
        for (int j = 0; j < (HELD ? ITEMS : 0); j += VECTOR) {
            if (id(j) >= VOCAB) continue;
            const unsigned word = load_global_fresh<unsigned>(seen + id(j) / 32) >> (id(j) % 32);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                if (word >> i & 1u) held[j + i] = penalised(held[j + i]);
            }
        }
    }

    // Score j; -inf where there is none.
    DEVICE float at(int j) const {
        if (HELD) return held[HELD ? j : 0];
        if (id(j) >= VOCAB) return -infinity();
        const float logit = load_global_fresh<float>(logits + id(j));
        return load_global_fresh<unsigned>(seen + id(j) / 32) >> (id(j) % 32) & 1u ? penalised(logit) : logit;
    }

private:
    DEVICE float penalised(float logit) const { return logit > 0.0f ? logit / penalty : logit * penalty; }
};
