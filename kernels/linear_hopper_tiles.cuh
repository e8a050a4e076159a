// What the warps of the Hopper linear kernel share: sizes, places in shared memory, and which tile comes when.
#pragma once

#include "linear_params.cuh"
#include "hopper.cuh"
#include "linear_hopper_products.cuh"

constexpr int CONSUMERS = GROUPS * WARPGROUPS;           // warpgroups that compute
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;     // warpgroup 0: two warps copy, two are the norm's
constexpr int WARP_FEATURES = PRODUCTS * TILE_FEATURES;  // neighbours, so that a warp stores long pieces of a row
constexpr int WARPGROUP_FEATURES = 4 * WARP_FEATURES;
constexpr int BLOCK_FEATURES = WARPGROUPS * WARPGROUP_FEATURES;  // of a tile
constexpr int PACKED_TILES = BLOCK_FEATURES / TILE_FEATURES;
constexpr int END_ROWS = TILE_ROWS / SPLITS;  // that a block of a cluster brings to their end
constexpr int END_ACCUMULATORS = ACCUMULATORS / SPLITS;
constexpr int GROUP_WARPS = WARPGROUPS * WARPGROUP / 32;
constexpr int STEP_PRODUCTS = DEPTH_STEP / 16;  // a stage of the ring is DEPTH_STEP deep
constexpr int AHEAD = 2;                        // products whose weights are in registers before it is their turn

constexpr u32 PACKED_BYTES = TILE_FEATURES * 16 * 2;             // 16 x 16 weights
constexpr u32 PACKED_STEP_BYTES = STEP_PRODUCTS * PACKED_BYTES;  // contiguous, in memory and in a stage
constexpr u32 WEIGHT_BYTES = PACKED_TILES * PACKED_STEP_BYTES;   // of a stage
constexpr u32 INPUT_BYTES = TILE_ROWS * PANEL_ROW_BYTES;
constexpr u32 STAGING_BYTES = 10240;  // of a warpgroup, for its way from accumulators to rows of the output
constexpr int FACTOR_SLOTS = 2;
constexpr int COPY_WARPS = 2;
constexpr int NORM_THREADS = WARPGROUP - 32 * COPY_WARPS;
static_assert(SPLITS == 1 || GROUPS == 1, "a cluster has one tile");
// What a block of a cluster sends to each other one, and gets from all.
constexpr u32 PART_BYTES = PRODUCTS * END_ACCUMULATORS * CONSUMERS * WARPGROUP * 4;
constexpr u32 LANDING_BYTES = (SPLITS - 1) * PART_BYTES;

// Shared memory, from a multiple of 1024 bytes: the rings, the staging areas, the other blocks' sums, the norm's factors,
// the barriers.
struct Shared {
    u32 input, weights, staging, landing, factors, barriers, landed;

    __device__ constexpr explicit Shared(u32 base)
        : input(0), weights(0), staging(0), landing(0), factors(0), barriers(0), landed(0) {
        input = (base + 1023) & ~1023u;
        weights = input + STAGES * INPUT_BYTES;
        staging = weights + STAGES * WEIGHT_BYTES;
        landing = staging + CONSUMERS * STAGING_BYTES;
        factors = landing + LANDING_BYTES;
        barriers = factors + FACTOR_SLOTS * TILE_ROWS * 4;
        landed = barriers + 8 * (2 * STAGES + 2 * FACTOR_SLOTS);
    }
    __device__ u32 full(int stage) const { return barriers + 8 * stage; }
    __device__ u32 empty(int stage) const { return barriers + 8 * (STAGES + stage); }
    __device__ u32 factors_full(int slot) const { return barriers + 8 * (2 * STAGES + slot); }
    __device__ u32 factors_empty(int slot) const { return barriers + 8 * (2 * STAGES + FACTOR_SLOTS + slot); }
    __device__ u32 factor(int slot, int row) const { return factors + 4 * (slot * TILE_ROWS + row); }
};

// A place in the ring and its parity: the phase that the copies complete there. Places are taken in the order of the
// block's tiles and, in a tile, of its depth.
struct Slot {
    int stage;
    u32 parity;

    __device__ explicit Slot(int position) : stage(position % STAGES), parity(position / STAGES & 1) {}
    template <int PLACES = 1> __device__ void advance() {
        static_assert(PLACES <= STAGES, "one round at most");
        stage += PLACES;
        if (stage >= STAGES) {
            stage -= STAGES;
            parity ^= 1;
        }
    }
};

// The block's tiles: features run fastest, so that blocks at work together share rows of the input and all weights. The
// blocks of a cluster have the same tile and a part of the depth each.
struct Schedule {
    int feature_blocks, tiles;
    int first_step, steps;  // of the depth

    __device__ explicit Schedule(const LinearParams& p) {
        feature_blocks = (p.features + BLOCK_FEATURES - 1) / BLOCK_FEATURES;
        tiles = feature_blocks * ((p.rows + TILE_ROWS - 1) / TILE_ROWS);
        const int all = p.depth / DEPTH_STEP, part = SPLITS == 1 ? 0 : blockIdx.x % SPLITS;
        first_step = all * part / SPLITS;
        steps = all * (part + 1) / SPLITS - first_step;
    }
    __device__ int tile(int turn) const { return blockIdx.x / SPLITS + turn * (gridDim.x / SPLITS); }
    __device__ int first_feature(int tile) const { return tile % feature_blocks * BLOCK_FEATURES; }
    __device__ int first_row(int tile) const { return tile / feature_blocks * TILE_ROWS; }
};
