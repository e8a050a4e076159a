// Spins that end. Nothing here traps: a wait that takes too long leaves a code in the error word, every wait of every block
// then returns at once, and the launch ends by itself with wrong numbers that nobody reads.
#pragma once

#include "persistent_device.cuh"

#ifndef SPIN_LIMIT_CYCLES
#define SPIN_LIMIT_CYCLES 200000000  // about 0.1 s: a thousand times what a whole token takes
#endif

// Where a spin that gives up leaves its mark.
struct Watch {
    unsigned* error;  // global word of the launch, 0 while all is well
    unsigned dead;    // shared word of the block: 1 once a wait of the launch has given up

    DEVICE bool is_dead() const { return load_flag_shared(dead) != 0; }

    // One thread's part of giving up.
    DEVICE void mark(unsigned code) const {
        launch_given_up();
        store_flag_shared(dead, 1u);
        if (load_flag(error) == 0) store_flag(error, code);
    }
};

// Warps that wait for others' progress are more patient than those, so that the error names what was first.
constexpr long long PATIENT = 2LL * SPIN_LIMIT_CYCLES;
constexpr unsigned TURNS = 32;  // of a spin between two looks at the clock
constexpr long long GIVEN_UP = -1;

// A look at the clock by a thread that waits since `start` (0: this is its first look): when it began, or GIVEN_UP. A
// function of its own, because the spins are many and the machine code of a layer should stay small.
DEVICE_CALL long long look_at_clock(unsigned* error, unsigned dead, long long start, unsigned code, long long limit) {
    const Watch watch{error, dead};
    const long long now = clock_cycles();
    if (start == 0) start = now;
    if (!watch.is_dead() && now - start <= limit && load_flag(error) == 0) return start;
    watch.mark(code);
    return GIVEN_UP;
}

// Waits until ready() holds in every lane of the warp: true. Or the launch is given up: false. `code` names the wait.
template <typename Ready>
DEVICE bool spin_until(const Watch& watch, unsigned code, Ready ready, long long limit = SPIN_LIMIT_CYCLES) {
    long long start = 0;
    for (unsigned turn = 1; !all_lanes(ready()); ++turn) {
        pause();
        if (turn % TURNS != 0) continue;
        start = look_at_clock(watch.error, watch.dead, start, code, limit);
        if (!all_lanes(start != GIVEN_UP)) return false;
    }
    return true;
}

// The rest of a wait for a barrier that was not there at the first look; each thread by itself.
DEVICE_CALL bool spin_at_barrier(unsigned* error, unsigned dead, unsigned barrier, unsigned parity, unsigned code) {
    long long start = 0;
    for (unsigned turn = 1; !barrier_done(barrier, parity); ++turn) {
        pause();
        if (turn % TURNS != 0) continue;
        start = look_at_clock(error, dead, start, code, SPIN_LIMIT_CYCLES);
        if (start == GIVEN_UP) return false;
    }
    return true;
}

// Waits for the end of a barrier's phase: true. Or the launch is given up: false.
DEVICE bool await_barrier(const Watch& watch, unsigned barrier, unsigned parity, unsigned code) {
    if (barrier_done(barrier, parity)) return true;
    return spin_at_barrier(watch.error, watch.dead, barrier, parity, code);
}
