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
    // Bit e: the parity of exchange e's next phase. GIVEN_UP_BIT: a wait has been given up; phases mean nothing any more.
    unsigned parities = 0;

    static constexpr unsigned GIVEN_UP_BIT = 1u << 31;

    // All threads of the block, before the cluster's barrier.
    DEVICE void begin() {
        if (threadIdx.x != 0) return;
        for (int e = 0; e < EXCHANGES; ++e) {
            barrier_init(base + exchange_barrier(e), 1);
            barrier_expect(base + exchange_barrier(e), exchange_bytes(e));
        }
    }

    // 16 or 4 bytes at byte `at` of an exchange's buffer in block `receiver`.
    template <int EXCHANGE> DEVICE void send(unsigned at, int receiver, uint4 v) const {
        constexpr unsigned BUFFER = exchange_at(EXCHANGE), BARRIER = exchange_barrier(EXCHANGE);
        const unsigned there = address_in(base, receiver);
        send_16(there + BUFFER + at, v, there + BARRIER);
    }
    template <int EXCHANGE> DEVICE void send(unsigned at, int receiver, float v) const {
        constexpr unsigned BUFFER = exchange_at(EXCHANGE), BARRIER = exchange_barrier(EXCHANGE);
        const unsigned there = address_in(base, receiver);
        send_4(there + BUFFER + at, float_to_bits(v), there + BARRIER);
    }

    // All of an exchange is here. Every warp that computes calls this once for each use, whether it reads or not.
    template <int EXCHANGE> DEVICE void await() {
        constexpr unsigned BARRIER = exchange_barrier(EXCHANGE), BYTES = exchange_bytes(EXCHANGE);
        if (!await_barrier(watch, base + BARRIER, parities >> EXCHANGE & 1u, 16 + EXCHANGE)) parities |= GIVEN_UP_BIT;
        parities ^= 1u << EXCHANGE;
        if (threadIdx.x == 0 && (parities & GIVEN_UP_BIT) == 0) barrier_expect(base + BARRIER, BYTES);
    }
    template <int EXCHANGE> DEVICE unsigned at() const {
        constexpr unsigned BUFFER = exchange_at(EXCHANGE);
        return base + BUFFER;
    }
};
