// How a launch that stays begins and ends.
#pragma once

#include "persistent_layer.cuh"

// Barriers and flags; before the cluster's (or block's) barrier. All threads.
DEVICE void begin_block(Worker& worker) {
    if (threadIdx.x == 0) {
        for (int room = 0; room < ROOMS; ++room) {
            barrier_init(worker.base + full_barrier(room), 1);
            barrier_init(worker.base + empty_barrier(room), TEAM_WARPS);
        }
        store_flag_shared(worker.base + DEAD_AT, 0u);
        store_flag_shared(worker.base + STOP_AT, 0u);
    }
    worker.exchange.begin();
    if (threadIdx.x == 0) barrier_init_fence();
}

// After a wait that was given up, stores of other blocks may still be under way to this one's memory, and copies of its own.
DEVICE void linger(const Watch& watch) {
    if (!watch.is_dead()) return;
    const long long start = clock_cycles();
    while (clock_cycles() - start < 200000) pause();
}
