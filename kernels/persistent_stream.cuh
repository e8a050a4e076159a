// The weights of a block as one stream through a ring in shared memory. One warp copies it in chunks, as far ahead of the
// arithmetic as the ring is long; every product begins at a chunk and, inside it, block (k, tile) lies at k * tiles + tile,
// so that a warp's share of the depth is one run.
#pragma once

#include "persistent_watch.cuh"
#include "persistent_sizes.cuh"

// A chunk's place in the ring and the parity of its arrival.
struct Chunk {
    int slot = 0;
    unsigned parity = 0;

    DEVICE void advance(int chunks) {  // at most RING_SLOTS
        slot += chunks;
        if (slot >= RING_SLOTS) {
            slot -= RING_SLOTS;
            parity ^= 1u;
        }
    }
};

// The reading end, one for each thread that computes.
struct Ring {
    unsigned base;  // of the shared memory
    Watch watch;
    Chunk first;            // of the product that comes next
    unsigned products = 0;  // that this warp has read

    // Waits for the chunks that hold blocks [begin, end) of the product.
    DEVICE void await(unsigned begin, unsigned end) const {
#if defined(ABLATE_STREAM)
        return;
#endif
        if (begin >= end) return;
        Chunk chunk = first;
        chunk.advance(begin / CHUNK_BLOCKS);
#pragma unroll 1
        for (unsigned left = (end - 1) / CHUNK_BLOCKS - begin / CHUNK_BLOCKS + 1; left > 0; --left) {
            await_barrier(watch, base + full_barrier(chunk.slot), chunk.parity, 1);
            chunk.advance(1);
        }
    }

    // This lane's words of a block of the product.
    DEVICE uint4 block(unsigned index) const {
        unsigned at = first.slot * CHUNK_BYTES + index * BLOCK_BYTES;
        if (at >= RING_SLOTS * CHUNK_BYTES) at -= RING_SLOTS * CHUNK_BYTES;
        return load_shared<uint4>(base + RING_AT + at + lane_index() * 16);
    }

    // This warp has read its part of a product of `blocks` blocks.
    DEVICE void done(int blocks) {
        sync_warp();
        ++products;
        if (lane_index() == 0) store_flag_shared(base + CONSUMED_AT + warp_index() * 4, products);
        first.advance(chunks_of(blocks));
    }
};

// How many blocks each product of a thread block has, in the order of its stream.
struct Blocks {
    Tiles qkv, hidden, gated, head;

    DEVICE Blocks(int rank, int block)
        : qkv(tiles_of(QKV_TILES, rank)),
          hidden(tiles_of(HIDDEN_TILES, rank)),
          gated(tiles_of(GATED_TILES, rank)),
          head(head_tiles(block)) {}

    static constexpr int OF_LAYER = 3 + GATED_PASSES;  // QKV, O, the passes of gate and up, down
    DEVICE int of_layer(int product) const {
        if (product == 0) return qkv.count() * HIDDEN_STEPS;
        if (product == 1) return hidden.count() * ATTENDED_STEPS;
        if (product == OF_LAYER - 1) return hidden.count() * GATED_STEPS;
        return tiles_of_pass<GATED_PASSES>(gated, product - 2).count() * HIDDEN_STEPS;
    }
    DEVICE int of_head(int pass) const { return tiles_of_pass<HEAD_PASSES>(head, pass).count() * HIDDEN_STEPS; }
};

// The writing end: one warp.
struct Streamer {
    unsigned base;
    Watch watch;
    const char* stream;  // of this block, whole chunks
    const Blocks& blocks;
    int layers;
    bool with_head;
    Chunk next;  // place of the copy that comes next
    int room = RING_SLOTS;
    int copies = 0;
    unsigned products = 0;  // whose room has been taken back

    DEVICE void copy(int chunk) {
        if (lane_index() == 0) {
            const unsigned barrier = base + full_barrier(next.slot);
            barrier_expect(barrier, CHUNK_BYTES);
            copy_bulk(base + RING_AT + next.slot * CHUNK_BYTES, stream + static_cast<long long>(chunk) * CHUNK_BYTES,
                      CHUNK_BYTES, barrier);
        }
        next.advance(1);
        --room;
        copies = min(copies + 1, RING_SLOTS);
    }

    // Waits until all warps have read the product that comes next in the order of consumption, or `stop` is set.
    DEVICE void await_consumption(int chunks) {
        const unsigned counter = base + CONSUMED_AT + lane_index() % TEAM_WARPS * 4, before = products;
        const unsigned stop = base + STOP_AT;
        const auto ready = [=] {
            return static_cast<int>(load_flag_shared(counter) - before) > 0 || load_flag_shared(stop) != 0;
        };
        spin_until(watch, 2, ready, PATIENT);
        ++products;
        room += chunks;
    }
    DEVICE bool stopped() const { return all_lanes(load_flag_shared(base + STOP_AT) != 0 || watch.is_dead()); }

    // Copies the stream of one token after the other, until told to stop.
    DEVICE void run() {
#if defined(ABLATE_STREAM)
        return;
#endif
        int of_token = 0, layer = 0, product = 0;
        for (int i = 0; i < Blocks::OF_LAYER; ++i) of_token += chunks_of(blocks.of_layer(i));
        of_token *= layers;
        for (int i = 0; with_head && i < HEAD_PASSES; ++i) of_token += chunks_of(blocks.of_head(i));
        for (int chunk = 0; !stopped(); chunk = chunk + 1 == of_token ? 0 : chunk + 1) {
            while (room == 0 && !stopped()) {
                await_consumption(chunks_of(layer < layers ? blocks.of_layer(product) : blocks.of_head(product)));
                if (++product == (layer < layers ? Blocks::OF_LAYER : HEAD_PASSES)) product = 0, ++layer;
                if (layer == layers + (with_head ? 1 : 0)) layer = 0;
            }
            if (!stopped()) copy(chunk);  // a wait that ended for that reason made no room
        }
        drain();
    }

    // Waits until no copy is under way: the block's memory must outlive them. They depend on nobody, so this ends.
    DEVICE void drain() const {
        Chunk chunk = next;
        chunk.advance(RING_SLOTS - copies);
        chunk.parity ^= 1u;  // one round before
        for (int i = 0; i < copies; ++i) {
            while (!barrier_done(base + full_barrier(chunk.slot), chunk.parity)) pause();
            chunk.advance(1);
        }
    }
};
