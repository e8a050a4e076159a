// Spins that end. Nothing here traps: a wait that takes too long leaves a code in the error word, every wait of every block
// then returns at once, and the launch ends by itself with wrong numbers that nobody reads.
#pragma once

#include "persistent_device.cuh"

#ifndef SPIN_LIMIT_CYCLES
#define SPIN_LIMIT_CYCLES 200000000  // about 0.1 s: a thousand times what a whole token takes
#endif

// Where a spin that gives up leaves its mark.
struct Watch {
    unsigned* error;      // global word of the launch, 0 while all is well
    unsigned dead;        // shared word of the block: 1 once a wait of the launch has given up

    DEVICE bool is_dead() const { return load_flag_shared(dead) != 0; }

    // One thread's part of giving up.
    DEVICE void mark(unsigned code) const {
        launch_given_up();
        store_flag_shared(dead, 1u);
        if (load_flag(error) == 0) store_flag(error, code);
    }
    DEVICE void give_up(unsigned code) const {
        if (lane_index() == 0) mark(code);
        sync_warp();
    }
};

// Warps that wait for others' progress are more patient than those, so that the error names what was first.
constexpr long long PATIENT = 2LL * SPIN_LIMIT_CYCLES;

// Waits until ready() holds in every lane of the warp: true. Or the launch is given up: false. `code` names the wait.
template <typename Ready>
DEVICE bool spin_until(const Watch& watch, unsigned code, Ready ready, long long limit = SPIN_LIMIT_CYCLES) {
    if (all_lanes(ready())) return true;
    if (all_lanes(watch.is_dead())) return false;
    const long long start = clock_cycles();
    for (unsigned turn = 1;; ++turn) {
        pause();
        if (all_lanes(ready())) return true;
        if (turn % 64 != 0) continue;
        const bool over = watch.is_dead() || clock_cycles() - start > limit || load_flag(watch.error) != 0;
        if (all_lanes(!over)) continue;
        watch.give_up(code);
        return false;
    }
}
