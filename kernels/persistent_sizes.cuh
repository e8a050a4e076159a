// Sizes of a model that stays on the GPU for many tokens, and who computes what.
//
// CLUSTERS clusters of RANKS blocks. A cluster holds HEADS / CLUSTERS query heads with their keys and values, and as many
// of the MLP's channels; its ranks share the features of each product, whole tiles of 16, and each rank's eight warps share
// the depth. Inside a cluster results travel through shared memory; the residual stream alone is summed over clusters.
//
// VOICES sequences go through it together, one in each column of the instruction's eight; a rank attends for one of them.
//
// -D: VOICES (1 to 8), HIDDEN, HEADS, KV_HEADS, HEAD_DIM, CHANNELS (padded to 16 CLUSTERS), VOCAB, CLUSTERS, RANKS, DIM_PARTS and the
// dtype. soprano_cupy/gpu/persistent_schedule.py does the same arithmetic.
#pragma once

constexpr int TEAM_WARPS = 8;  // that compute
constexpr int TEAM = TEAM_WARPS * 32;
constexpr int STREAM_WARP = TEAM_WARPS;     // copies weights
constexpr int CLERK_WARP = TEAM_WARPS + 1;  // tells the host
constexpr int BLOCK_THREADS = TEAM + 64;
constexpr int TILE = 16;
constexpr int BLOCK_BYTES = 512;        // 16 x 16 weights in the order of linear_params.cuh
constexpr unsigned PIECE_BYTES = 8192;  // of one copy

constexpr int LOCAL_HEADS = HEADS / CLUSTERS;
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int LOCAL_KV = LOCAL_HEADS < GROUP ? 1 : LOCAL_HEADS / GROUP;
constexpr int Q_ROWS = LOCAL_HEADS * HEAD_DIM;
constexpr int KV_ROWS = LOCAL_KV * HEAD_DIM;
constexpr int QKV_ROWS = Q_ROWS + 2 * KV_ROWS;
constexpr int LOCAL_CHANNELS = CHANNELS / CLUSTERS;

// Tiles of 16 features that a cluster's ranks share, and k-steps of 16 that a product sums over.
constexpr int HIDDEN_TILES = HIDDEN / TILE;
constexpr int QKV_TILES = QKV_ROWS / TILE;
constexpr int GATED_TILES = LOCAL_CHANNELS / 8;  // 8 gate and 8 up channels each
constexpr int HIDDEN_STEPS = HIDDEN / TILE;
constexpr int ATTENDED_STEPS = Q_ROWS / TILE;
constexpr int GATED_STEPS = LOCAL_CHANNELS / TILE;

constexpr int BLOCKS = CLUSTERS * RANKS;
constexpr int HEAD_TILES = (VOCAB + TILE - 1) / TILE;  // that all blocks share
constexpr int HEAD_MOST = (HEAD_TILES + BLOCKS - 1) / BLOCKS;

constexpr int most_of_rank(int tiles) { return (tiles + RANKS - 1) / RANKS; }
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int QKV_MOST = most_of_rank(QKV_TILES), HIDDEN_MOST = most_of_rank(HIDDEN_TILES);
constexpr int GATED_MOST = most_of_rank(GATED_TILES);
constexpr int MOST_TILES = larger(larger(GATED_MOST, HEAD_MOST), larger(QKV_MOST, HIDDEN_MOST));

// Weights wait in rooms of the shared memory, one for each product of a layer; a room is filled for the next layer as soon
// as the product has read it. The output head's tiles go through the same rooms, in as many rounds as that takes.
constexpr int ROOM_QKV = 0, ROOM_O = 1, ROOM_GATED = 2, ROOM_DOWN = 3, ROOMS = 4;
constexpr int room_blocks(int room) {
    return room == ROOM_QKV     ? QKV_MOST * HIDDEN_STEPS
           : room == ROOM_O     ? HIDDEN_MOST * ATTENDED_STEPS
           : room == ROOM_GATED ? GATED_MOST * HIDDEN_STEPS
                                : HIDDEN_MOST * GATED_STEPS;
}
constexpr int blocks_before(int room) {
    int blocks = 0;
    for (int i = 0; i < room; ++i) blocks += room_blocks(i);
    return blocks;
}
constexpr int head_in(int room) { return room_blocks(room) / HIDDEN_STEPS; }  // tiles of the head
constexpr int head_before(int room) {
    int tiles = 0;
    for (int i = 0; i < room; ++i) tiles += head_in(i);
    return tiles;
}
constexpr int HEAD_TOGETHER = head_before(ROOMS);  // tiles of a round
constexpr int head_in_one_round(int room) {        // where that is all
    return HEAD_MOST - head_before(room) < head_in(room) ? HEAD_MOST - head_before(room) : head_in(room);
}
constexpr int HEAD_ROUNDS = (HEAD_MOST + HEAD_TOGETHER - 1) / HEAD_TOGETHER;

// Attention: the ranks of a head are VOICES sequences times PARTS shares of the keys times DIM_PARTS shares of the values'
// dimensions.
constexpr int RANKS_OF_HEAD = RANKS / LOCAL_HEADS;
constexpr int RANKS_OF_VOICE = RANKS_OF_HEAD / VOICES;
constexpr int PARTS = RANKS_OF_VOICE / DIM_PARTS;
constexpr int OUT_DIMS = HEAD_DIM / DIM_PARTS;
constexpr int OUT_STRIDE = OUT_DIMS + 4;  // floats: the output of a share, its maximum and its sum

static_assert(HEADS % CLUSTERS == 0 && (LOCAL_HEADS % GROUP == 0 || GROUP % LOCAL_HEADS == 0), "heads of a cluster");
static_assert(RANKS % LOCAL_HEADS == 0 && RANKS_OF_HEAD % (DIM_PARTS * VOICES) == 0 && PARTS >= 1, "ranks of a head");
static_assert(VOICES >= 1 && VOICES <= 8, "a column each");
static_assert(HIDDEN % 16 == 0 && HEAD_DIM % 32 == 0 && CHANNELS % (16 * CLUSTERS) == 0, "whole tiles");
static_assert(OUT_DIMS % 32 == 0, "each lane ends with whole dimensions");
static_assert(GATED_TILES >= RANKS, "every rank has channels: what keeps a fast rank from running a layer ahead");

// A rank's tiles of a product: [begin, end).
struct Tiles {
    int begin, end;
    DEVICE int count() const { return end - begin; }
};
DEVICE Tiles tiles_of(unsigned tiles, unsigned rank) {
    return {static_cast<int>(tiles * rank / RANKS), static_cast<int>(tiles * (rank + 1) / RANKS)};
}
DEVICE Tiles head_tiles(unsigned block) {
    return {static_cast<int>(HEAD_TILES * block / BLOCKS), static_cast<int>(HEAD_TILES * (block + 1) / BLOCKS)};
}
// ---- shared memory, bytes from its base ----

constexpr int EX_QKV = 0, EX_ATTENDED = 1, EX_HIDDEN = 2, EX_AFTER = 3, EX_GATED = 4, EX_SUMS = 5, EX_SUMS_AFTER = 6;
constexpr int EXCHANGES = 7;

constexpr unsigned aligned_16(unsigned bytes) { return (bytes + 15) / 16 * 16; }

// From one voice's vector to the next one's: their columns lie in different banks.
constexpr unsigned vector_stride(int elements) { return elements * 2 + 16; }
constexpr unsigned HIDDEN_STRIDE = vector_stride(HIDDEN), GATED_STRIDE = vector_stride(LOCAL_CHANNELS);
constexpr unsigned ATTENDED_STRIDE = vector_stride(Q_ROWS);
constexpr unsigned SUMS_STRIDE = aligned_16(HIDDEN_TILES * 4);

// What an exchange brings, and what its buffer takes.
constexpr unsigned exchange_bytes(int exchange) {
    return exchange == EX_QKV        ? VOICES * QKV_ROWS * 4
           : exchange == EX_ATTENDED ? RANKS * OUT_STRIDE * 4
           : exchange == EX_GATED    ? VOICES * LOCAL_CHANNELS * 2
           : exchange < EX_GATED     ? VOICES * HIDDEN * 2
                                     : VOICES * HIDDEN_TILES * 4;
}
constexpr unsigned buffer_bytes(int exchange) {
    return exchange == EX_GATED                               ? VOICES * GATED_STRIDE
           : exchange == EX_HIDDEN || exchange == EX_AFTER    ? VOICES * HIDDEN_STRIDE
           : exchange == EX_SUMS || exchange == EX_SUMS_AFTER ? VOICES * SUMS_STRIDE
                                                              : aligned_16(exchange_bytes(exchange));
}
constexpr unsigned room_at(int room) { return blocks_before(room) * BLOCK_BYTES; }
constexpr unsigned exchange_at(int exchange) {
    unsigned at = room_at(ROOMS);
    for (int i = 0; i < exchange; ++i) at += buffer_bytes(i);
    return at;
}
constexpr unsigned PARTIAL_AT = exchange_at(EXCHANGES);  // (TEAM_WARPS, VOICES, MOST_TILES * 16) float
constexpr unsigned SHARE_AT =
    PARTIAL_AT + TEAM_WARPS * VOICES * MOST_TILES * TILE * 4;             // (TEAM_WARPS, OUT_STRIDE) float
constexpr unsigned ATTENDED_AT = SHARE_AT + TEAM_WARPS * OUT_STRIDE * 4;  // (VOICES, Q_ROWS) Element
constexpr unsigned GAINS_AT = ATTENDED_AT + VOICES * ATTENDED_STRIDE;     // (2, HEAD_DIM) float of the layer
constexpr unsigned ANGLES_AT = GAINS_AT + 2 * HEAD_DIM * 4;               // (2, HEAD_DIM / 2) float: cosines, sines
constexpr unsigned TURNED_AT = ANGLES_AT + HEAD_DIM * 4;  // (TEAM_WARPS, 2, HEAD_DIM) float: query, newest key
constexpr unsigned BARRIERS_AT = TURNED_AT + 2 * TEAM_WARPS * HEAD_DIM * 4;
constexpr unsigned DEAD_AT = BARRIERS_AT + 8 * (2 * ROOMS + EXCHANGES);
constexpr unsigned STOP_AT = DEAD_AT + 4;  // 1: no more weights are wanted
constexpr unsigned SHARED_END = DEAD_AT + 16;

constexpr unsigned full_barrier(int room) { return BARRIERS_AT + 8 * room; }
constexpr unsigned empty_barrier(int room) { return BARRIERS_AT + 8 * (ROOMS + room); }
constexpr unsigned exchange_barrier(int exchange) { return BARRIERS_AT + 8 * (2 * ROOMS + exchange); }
