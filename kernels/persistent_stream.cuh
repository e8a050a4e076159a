// The weights of a block as one stream through rooms in shared memory, one room for each product of a layer. One warp fills
// a room once it is given back, and has what follows a layer later brought into the second-level cache meanwhile. Block
// (tile, k) of a product lies at tile * depth + k.
//
// What a block hears of others through global memory queues behind the weights that it has asked for: a room of 80 KB is in
// the way for 1,300 cycles. So rooms are given back where nobody waits for such words: those of the MLP when a layer begins,
// those of QKV and O when the MLP does, and those of the output head when the token is known.
#pragma once

#include "persistent_watch.cuh"
#include "persistent_sizes.cuh"

// The reading end, one for each thread that computes.
struct Rooms {
    unsigned base;  // of the shared memory
    Watch watch;
    unsigned parities = 0;  // bit r: of room r's next phase

    template <int ROOM> DEVICE void await() const {
        constexpr unsigned BARRIER = full_barrier(ROOM);
        await_barrier(watch, base + BARRIER, parities >> ROOM & 1u, 1);
    }
    // This warp has read the room, which may be filled again; or once it is given back, where it is kept.
    template <int ROOM> DEVICE void leave(bool keep = false) {
        parities ^= 1u << ROOM;
        if (!keep) give_back<ROOM>();
    }
    template <int ROOM> DEVICE void give_back() const {
        constexpr unsigned BARRIER = empty_barrier(ROOM);
        sync_warp();
        if (lane_index() == 0) barrier_arrive(base + BARRIER);
    }
};

// How many blocks of weights each product of a thread block has.
struct Work {
    int qkv, o, gated, down;
    int head;  // tiles

    DEVICE Work(int rank, int block)
        : qkv(tiles_of(QKV_TILES, rank).count() * HIDDEN_STEPS),
          o(tiles_of(HIDDEN_TILES, rank).count() * ATTENDED_STEPS),
          gated(tiles_of(GATED_TILES, rank).count() * HIDDEN_STEPS),
          down(tiles_of(HIDDEN_TILES, rank).count() * GATED_STEPS),
          head(head_tiles(block).count()) {}

    DEVICE int of_layer(int room) const {
        return room == ROOM_QKV ? qkv : room == ROOM_O ? o : room == ROOM_GATED ? gated : down;
    }
    // Where a room begins: constants, which the compiler would otherwise sum up in a loop.
    DEVICE static unsigned start(int room) {
        constexpr unsigned O_AT = room_at(ROOM_O), GATED_AT = room_at(ROOM_GATED), DOWN_AT = room_at(ROOM_DOWN);
        return room == ROOM_QKV ? 0u : room == ROOM_O ? O_AT : room == ROOM_GATED ? GATED_AT : DOWN_AT;
    }
    DEVICE int of_head(int round, int room) const {
        constexpr int BEFORE_O = head_before(ROOM_O), BEFORE_GATED = head_before(ROOM_GATED);
        constexpr int BEFORE_DOWN = head_before(ROOM_DOWN);
        const int first = room == ROOM_QKV     ? 0
                          : room == ROOM_O     ? BEFORE_O
                          : room == ROOM_GATED ? BEFORE_GATED
                                               : BEFORE_DOWN;
        const int end = room == ROOM_QKV     ? BEFORE_O
                        : room == ROOM_O     ? BEFORE_GATED
                        : room == ROOM_GATED ? BEFORE_DOWN
                                             : HEAD_TOGETHER;
        return min(max(head - (round * HEAD_TOGETHER + first), 0), end - first) * HIDDEN_STEPS;
    }
};

// The writing end: one warp.
struct Streamer {
    unsigned base;
    Watch watch;
    const char* stream;  // of this block
    const Work& work;
    int layers;
    bool with_head;
    const char* next = nullptr;
    int of_layer = 0, of_token = 0;                 // bytes
    unsigned full = 0, empty = (1u << ROOMS) - 1u;  // parities of the next phases: a fresh room is empty
    unsigned used = 0;                              // bit r: room r has been filled

    DEVICE bool stopped() const { return all_lanes(load_flag_shared(base + STOP_AT) != 0 || watch.is_dead()); }

    // The next `blocks` blocks of the stream into a room, once it is empty.
    DEVICE void fill(int room, int blocks) {
        const unsigned barrier = base + empty_barrier(room), parity = empty >> room & 1u, stop = base + STOP_AT;
        spin_until(watch, 2, [=] { return barrier_done(barrier, parity) || load_flag_shared(stop) != 0; }, PATIENT);
        if (stopped()) return;
        const unsigned bytes = blocks * BLOCK_BYTES, arrived = base + full_barrier(room);
        if (lane_index() == 0) barrier_expect(arrived, bytes);
        sync_warp();
        for (unsigned at = lane_index() * PIECE_BYTES; at < bytes; at += 32 * PIECE_BYTES)
            copy_bulk(base + Work::start(room) + at, next + at, min(PIECE_BYTES, bytes - at), arrived);
        for (unsigned at = lane_index() * PIECE_BYTES; at < bytes; at += 32 * PIECE_BYTES) prefetch(at, bytes);
        next += bytes;
        empty ^= 1u << room, full ^= 1u << room, used |= 1u << room;
    }

    // What lies a layer behind byte `at` of the copy under way.
    DEVICE void prefetch(unsigned at, unsigned bytes) const {
        int later = static_cast<int>(next - stream) + static_cast<int>(at) + of_layer;
        if (later >= of_token) later -= of_token;
        const unsigned left = min(static_cast<unsigned>(of_token - later), bytes - at);
        prefetch_bulk(stream + later, min(PIECE_BYTES, left));
    }

    // Copies the stream of one token after the other, until told to stop.
    DEVICE void run() {
        of_layer = (work.qkv + work.o + work.gated + work.down) * BLOCK_BYTES;
        of_token = of_layer * layers + (with_head ? work.head * HIDDEN_STEPS * BLOCK_BYTES : 0);
        while (!stopped()) {
            next = stream;
#pragma unroll 1
            for (int i = 0; i < layers * ROOMS && !stopped(); ++i) fill(i % ROOMS, work.of_layer(i % ROOMS));
#pragma unroll 1
            for (int i = 0; with_head && i < HEAD_ROUNDS * ROOMS && !stopped(); ++i)
                fill(i % ROOMS, work.of_head(i / ROOMS, i % ROOMS));
        }
        drain();
    }

    // Waits until no copy is under way: the block's memory must outlive them. They depend on nobody, so this ends.
    DEVICE void drain() const {
        for (int room = 0; room < ROOMS; ++room) {
            if ((used >> room & 1u) == 0) continue;
            while (!barrier_done(base + full_barrier(room), ~full >> room & 1u)) pause();
        }
    }
};
