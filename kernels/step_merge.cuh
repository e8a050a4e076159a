// How the thread blocks of one sequence put their splits together in a decode step.
//
// With CLUSTER > 1 (Hopper and newer) they are a cluster, and each sends the states of its splits into the shared
// memory of the first, which merges them in the order of the splits. A barrier there counts the bytes that have come:
// no fence and no barrier of all blocks stands between. Otherwise the workspace of decode_state.cuh serves.
#pragma once

#include "decode_state.cuh"
#include "step_newest.cuh"

// The states of the splits in the first block's shared memory: 128-bit vectors, those of one warp's rows side by side.
constexpr int SPLIT_BYTES = RowState::VECTORS * WARPS * LIVE_ROWS * 4 * 16;

#if CLUSTER > 1
struct SplitStates {
    unsigned smem;     // SPLIT_BYTES for each split
    unsigned barrier;  // 8 bytes

    DEVICE SplitStates(unsigned transfer_smem, unsigned states_smem) : smem(states_smem), barrier(transfer_smem) {}

    // In the first block, by one thread, before the cluster's barrier.
    DEVICE void prepare() const { transfer_init(barrier); }
    DEVICE void expect(int splits) const { transfer_expect(barrier, splits * SPLIT_BYTES); }

    DEVICE static int offset(int held, int vector) {
        return (((vector * WARPS + warp_index()) * LIVE_ROWS + held_row(held)) * 4 + lane_index() % 4) * 16;
    }
    DEVICE void send(int split, const RowState (&state)[HELD_ROWS]) const {
#pragma unroll
        for (int i = 0; i < HELD_ROWS; ++i) {
            if (held_row(i) >= LIVE_ROWS) continue;
#pragma unroll
            for (int v = 0; v < RowState::VECTORS; ++v) {
                transfer_store(smem + split * SPLIT_BYTES + offset(i, v), barrier, 0, state[i].vector(v));
            }
        }
    }
    // In the first block.
    DEVICE void merge(int splits, RowState (&total)[HELD_ROWS]) const {
        transfer_wait(barrier);
#pragma unroll 4
        for (int split = 0; split < splits; ++split) {
#pragma unroll
            for (int i = 0; i < HELD_ROWS; ++i) {
                if (held_row(i) >= LIVE_ROWS) continue;
                RowState next;
                next.clear();
#pragma unroll
                for (int v = 0; v < RowState::VECTORS; ++v) {
                    next.set_vector(v, load_shared<float4>(smem + split * SPLIT_BYTES + offset(i, v)));
                }
                total[i].merge(next);
            }
        }
    }
};
#endif
