// Part of device.cuh: warp exchanges, over all 32 lanes.
#pragma once

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE float shuffle(float value, int source_lane) { return __shfl_sync(0xffffffffu, value, source_lane); }
DEVICE unsigned shuffle(unsigned value, int source_lane) { return __shfl_sync(0xffffffffu, value, source_lane); }
DEVICE unsigned shuffle_xor(unsigned value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE bool any_lane(bool predicate) { return __any_sync(0xffffffffu, predicate); }
// Bit l: the predicate of lane l.
DEVICE unsigned lanes_where(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// Over all lanes, for all lanes.
#if __CUDA_ARCH__ >= 800
DEVICE unsigned max_of_lanes(unsigned value) { return __reduce_max_sync(0xffffffffu, value); }
DEVICE unsigned min_of_lanes(unsigned value) { return __reduce_min_sync(0xffffffffu, value); }
DEVICE unsigned sum_of_lanes(unsigned value) { return __reduce_add_sync(0xffffffffu, value); }
#else
DEVICE unsigned max_of_lanes(unsigned value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value = max(value, shuffle_xor(value, mask));
    return value;
}
DEVICE unsigned min_of_lanes(unsigned value) { return ~max_of_lanes(~value); }
DEVICE unsigned sum_of_lanes(unsigned value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}
#endif
