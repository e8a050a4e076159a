// What the warps of the Hopper prefill kernel share: sizes, places in shared memory, and which tile comes when.
#pragma once

#include "attention_params.cuh"
#include "hopper.cuh"

constexpr int BLOCK_M = 64 * CONSUMERS;  // query rows of a tile
constexpr int BLOCK_N = 128;             // keys of a block
constexpr int TOKENS = BLOCK_M / GROUP;  // query tokens of a tile
constexpr int PANELS = HEAD_DIM / PANEL_COLUMNS;
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / 32;
constexpr bool TAKE_TURNS = CONSUMERS > 1;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "wgmma tiles are written for head_dim 64 and 128");
static_assert(BLOCK_M % GROUP == 0, "a tile holds whole tokens");
static_assert(HEAD_DIM % (32 * SPLITS) == 0, "each block of a cluster stores whole 32-column pieces of the output");

constexpr u32 Q_PANEL_BYTES = BLOCK_M * PANEL_ROW_BYTES;
constexpr u32 KV_PANEL_BYTES = BLOCK_N * PANEL_ROW_BYTES;
constexpr u32 Q_BYTES = PANELS * Q_PANEL_BYTES;
constexpr u32 KV_BYTES = PANELS * KV_PANEL_BYTES;

// Shared memory, from a multiple of 1024 bytes: Q, the K ring, the V ring, the barriers.
struct Shared {
    u32 q, k, v, barriers;

    __device__ explicit Shared(u32 base) {
        q = (base + 1023) & ~1023u;
        k = q + Q_BYTES;
        v = k + STAGES * KV_BYTES;
        barriers = v + STAGES * KV_BYTES;
    }
    __device__ u32 q_full() const { return barriers; }
    __device__ u32 q_empty() const { return barriers + 8; }
    __device__ u32 v_landing() const { return barriers + 16; }
    __device__ u32 k_full(int stage) const { return barriers + 24 + 8 * stage; }
    __device__ u32 k_empty(int stage) const { return barriers + 24 + 8 * (STAGES + stage); }
    __device__ u32 v_full(int stage) const { return barriers + 24 + 8 * (2 * STAGES + stage); }
    __device__ u32 v_empty(int stage) const { return barriers + 24 + 8 * (3 * STAGES + stage); }
};

// A place in a ring and the parity to wait for there.
struct Slot {
    int stage = 0;
    u32 parity;

    __device__ explicit Slot(u32 first_parity) : parity(first_parity) {}
    __device__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// One tile of query rows of one sequence and KV head, and the key blocks that it meets.
struct Tile {
    int batch, kv_head;
    int first_token;     // of the tile, in its sequence
    int q_begin, q_len;  // first row of the packed queries (0: dense) and tokens of the sequence
    int k_begin, k_len;  // the same for keys
    int begin, end;      // key blocks of this thread block: those that some row sees, or its share of them
    int unmasked;        // the first so many key blocks of the sequence are seen whole by every row

    __device__ Tile(const AttentionParams& p, int index) {
        const int per_rank = p.num_kv_heads * p.batch;
        const int ranks = (p.seqlen_q + TOKENS - 1) / TOKENS;
        first_token = (ranks - 1 - index / per_rank) * TOKENS;  // the last tokens see the most keys: longest first
        const int sequence_head = index % per_rank;
        batch = sequence_head / p.num_kv_heads;
        kv_head = sequence_head % p.num_kv_heads;
        q_begin = p.cu_seqlens_q ? p.cu_seqlens_q[batch] : 0;
        q_len = p.cu_seqlens_q ? p.cu_seqlens_q[batch + 1] - q_begin : p.seqlen_q;
        k_begin = p.cu_seqlens_k ? p.cu_seqlens_k[batch] : 0;
        k_len = p.cu_seqlens_k ? p.cu_seqlens_k[batch + 1] - k_begin : p.seqlen_k;
        if (p.kv_lengths) k_len = min(k_len, max(p.kv_lengths[batch], 0));
        const int last_token = min(first_token + TOKENS, q_len) - 1;
        const int blocks = last_token < first_token ? 0 : (visible_keys(last_token) + BLOCK_N - 1) / BLOCK_N;
        const int rank = SPLITS == 1 ? 0 : blockIdx.x % SPLITS;
        begin = blocks * rank / SPLITS;
        end = blocks * (rank + 1) / SPLITS;
        unmasked = visible_keys(first_token) / BLOCK_N;
    }
    // Keys that a query token sees, bottom-right aligned: those before this one.
    __device__ int visible_keys(int token) const {
        return CAUSAL ? max(min(k_len - q_len + token + 1, k_len), 0) : k_len;
    }
};

__device__ __forceinline__ int tile_count(const AttentionParams& p) {
    return (p.seqlen_q + TOKENS - 1) / TOKENS * p.num_kv_heads * p.batch;
}

// The tile of a block's n-th turn: rows of gridDim.x tiles, every second row backwards, which evens out the
// falling sizes. With as many blocks as tiles every block has one turn. The SPLITS blocks of a cluster share a tile
// and have one turn.
__device__ __forceinline__ int tile_of_turn(int turn) {
    const int columns = gridDim.x / SPLITS, column = blockIdx.x / SPLITS;
    return turn * columns + (turn & 1 ? columns - 1 - column : column);
}
