// One head of a query, key or value in the registers of a warp, on its way from a raw product to what attention reads:
// the head's own RMS norm (queries and keys), then the rotary embedding (Su et al., 2021), then 16 bits.
//
// The rotation pairs element i with i + HEAD_DIM / 2. Lane l holds the elements 2 l, 2 l + 1 and their partners; with a
// small head the last lanes hold nothing.
#pragma once

#include "device.cuh"

constexpr int HEAD_LANES = HEAD_DIM / 4;             // lanes that hold something
constexpr int HALF_WORDS = HEAD_DIM / 4;             // 32-bit words of half a head in 16 bits
constexpr float INVERSE_HEAD_DIM = 1.0f / HEAD_DIM;  // a power of two

struct HeadPairs {
    float2 low, high;

    DEVICE static bool holds() { return HEAD_LANES == WARP_LANES || lane_index() < HEAD_LANES; }
    DEVICE void clear() { low = high = make_float2(0.0f, 0.0f); }

    // From the address of the lane's first pair, in a head that another kernel has written.
    DEVICE void load_fresh(const float* pair) {
        low = load_global_fresh<float2>(pair);
        high = load_global_fresh<float2>(pair + HEAD_DIM / 2);
    }
    // A head of constants.
    DEVICE void load(const float* head) {
        clear();
        if (!holds()) return;
        low = load_global<float2>(head + 2 * lane_index());
        high = load_global<float2>(head + HEAD_DIM / 2 + 2 * lane_index());
    }

    // One or the other; without this the compiler would keep both in memory to choose between their addresses.
    DEVICE static HeadPairs select(bool first, const HeadPairs& a, const HeadPairs& b) {
        return {make_float2(first ? a.low.x : b.low.x, first ? a.low.y : b.low.y),
                make_float2(first ? a.high.x : b.high.x, first ? a.high.y : b.high.y)};
    }

    // x / sqrt(mean(x^2) + epsilon) * gain
    DEVICE void normalise(const HeadPairs& gain, float epsilon) {
        float sum = low.x * low.x;
        sum = fused_multiply_add(low.y, low.y, sum);
        sum = fused_multiply_add(high.x, high.x, sum);
        sum = fused_multiply_add(high.y, high.y, sum);
#pragma unroll
        for (int mask = WARP_LANES / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        const float factor = inverse_sqrt(fused_multiply_add(sum, INVERSE_HEAD_DIM, epsilon));
        low = make_float2(low.x * factor * gain.low.x, low.y * factor * gain.low.y);
        high = make_float2(high.x * factor * gain.high.x, high.y * factor * gain.high.y);
    }

    // angles: (cos, sin) of pair 2 l and of the next. Fused in the same places in every kernel, for equal bits.
    DEVICE void rotate(float4 angles) {
        const float2 l = low, h = high;
        low.x = fused_multiply_add(l.x, angles.x, -(h.x * angles.y));
        high.x = fused_multiply_add(h.x, angles.x, l.x * angles.y);
        low.y = fused_multiply_add(l.y, angles.z, -(h.y * angles.w));
        high.y = fused_multiply_add(h.y, angles.z, l.y * angles.w);
    }

    DEVICE unsigned low_word() const { return pack2(low.x, low.y); }
    DEVICE unsigned high_word() const { return pack2(high.x, high.y); }

    DEVICE void store(Element* head) const {
        if (!holds()) return;
        store_global<unsigned>(head + 2 * lane_index(), low_word());
        store_global<unsigned>(head + HEAD_DIM / 2 + 2 * lane_index(), high_word());
    }
};

// The lane's row of the table of angles, for a position.
DEVICE float4 load_angles(const float2* rope, int position) {
    if (!HeadPairs::holds()) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    return load_global<float4>(rope + static_cast<long long>(position) * (HEAD_DIM / 2) + 2 * lane_index());
}
