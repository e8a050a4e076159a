// Exchanges between the ranks of a cluster: every rank stores its part into the shared memory of all, and a barrier there
// counts the bytes. A buffer is used once in a layer, and between two uses every rank has heard from every other one in the
// exchange of the attention's shares, so nobody can be two uses ahead.
#pragma once

#include "persistent_watch.cuh"
#include "persistent_sizes.cuh"

constexpr int RECEIVERS = RANKS;  // that a rank sends to

struct Exchange {
    unsigned base;
    Watch watch;
    unsigned parities = 0;  // bit e: the parity of exchange e's next phase
    bool alive = true;      // no wait has been given up: after one, phases mean nothing

    // All threads of the block, before the cluster's barrier.
    DEVICE void begin() {
        if (threadIdx.x != 0) return;
        for (int e = 0; e < EXCHANGES; ++e) {
            barrier_init(base + exchange_barrier(e), 1);
            barrier_expect(base + exchange_barrier(e), exchange_bytes(e));
        }
    }

    // 16 or 4 bytes at byte `at` of an exchange's buffer in block `receiver`.
    DEVICE void send(int exchange, unsigned at, int receiver, uint4 v) const {
        send_16(address_in(base + exchange_at(exchange) + at, receiver), v,
                address_in(base + exchange_barrier(exchange), receiver));
    }
    DEVICE void send(int exchange, unsigned at, int receiver, float v) const {
        send_4(address_in(base + exchange_at(exchange) + at, receiver), float_to_bits(v),
               address_in(base + exchange_barrier(exchange), receiver));
    }

    // All of an exchange is here. Every warp that computes calls this once for each use, whether it reads or not.
    DEVICE void await(int exchange) {
        const unsigned barrier = base + exchange_barrier(exchange), parity = parities >> exchange & 1u;
        alive = spin_until(watch, 16 + exchange, [=] { return barrier_done(barrier, parity); }) && alive;
        parities ^= 1u << exchange;
        if (threadIdx.x == 0 && alive) barrier_expect(barrier, exchange_bytes(exchange));
    }
    DEVICE unsigned at(int exchange) const { return base + exchange_at(exchange); }
};
