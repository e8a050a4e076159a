// Which rows a prefill block works on. The queries of one sequence that share a KV head form a matrix of
// queries * GROUP rows: row r is token r / GROUP, query head kv_head * GROUP + r % GROUP. A tile is ROWS of them, so one
// pass over K and V serves every head of the group and nothing is repeated in memory.
#pragma once

#include "attention_params.cuh"
#include "device.cuh"

// Causal masks align bottom right: token t of a sequence sees the keys j <= keys - queries + t.
struct RowTile {
    int queries, keys;         // of the sequence; keys in use only
    int first_row, num_rows;   // of this tile in the sequence's matrix; num_rows <= 0: nothing to do
    long long first_query;     // where the sequence begins along lse's token axis
    const Element *q, *k, *v;  // at the sequence's first token and this KV head (q: its first query head)
    Element* out;
    float* lse;  // at the KV head's first query head and the sequence's first token; null: not wanted

    DEVICE static int token(int row) { return static_cast<unsigned>(row) / GROUP; }
    DEVICE static int head(int row) { return static_cast<unsigned>(row) % GROUP; }

    // How many keys, counted from the first, a row sees.
    DEVICE int visible_keys(int row) const {
        if (!CAUSAL) return keys;
        const int seen = token(row) + keys - queries + 1;
        return seen < 0 ? 0 : (seen < keys ? seen : keys);
    }

    DEVICE const Element* q_row(const AttentionParams& params, int row) const {
        return q + token(row) * params.q_token_stride + head(row) * params.q_head_stride;
    }
    DEVICE Element* out_row(const AttentionParams& params, int row) const {
        return out + token(row) * params.out_token_stride + head(row) * params.out_head_stride;
    }
    DEVICE void store_lse(const AttentionParams& params, int row, float value) const {
        if (lse != nullptr)
            store_global<float>(lse + head(row) * static_cast<long long>(params.total_q) + token(row), value);
    }
};

// The tile of this block. blockIdx.x counts pairs (sequence, KV head) fastest and tiles slowest, last tiles first: under
// a causal mask those see the most keys, and long work must start early. blockIdx.y counts further sets of pairs.
template <int ROWS> DEVICE RowTile select_tile(const AttentionParams& params) {
    const unsigned tiles = (static_cast<unsigned>(params.seqlen_q) * GROUP + ROWS - 1) / ROWS;
    const unsigned pairs = gridDim.x / tiles;
    // Opaque: a kernel that selects its tile again, after its loop, keeps nothing of it in registers meanwhile.
    const unsigned block = opaque(blockIdx.x);
    const unsigned pair = blockIdx.y * pairs + block % pairs;
    const int batch = pair / params.num_kv_heads, kv_head = pair % params.num_kv_heads;
    RowTile tile;
    tile.num_rows = 0;
    if (batch >= params.batch) return tile;

    long long q_start, out_start, k_start, v_start;
    if (params.cu_seqlens_q != nullptr) {
        tile.first_query = params.cu_seqlens_q[batch];
        tile.queries = params.cu_seqlens_q[batch + 1] - params.cu_seqlens_q[batch];
        q_start = tile.first_query * params.q_token_stride;
        out_start = tile.first_query * params.out_token_stride;
    } else {
        tile.first_query = static_cast<long long>(batch) * params.seqlen_q;
        tile.queries = params.seqlen_q;
        q_start = batch * params.q_batch_stride;
        out_start = batch * params.out_batch_stride;
    }
    if (params.cu_seqlens_k != nullptr) {
        const long long start = params.cu_seqlens_k[batch];
        tile.keys = params.cu_seqlens_k[batch + 1] - params.cu_seqlens_k[batch];
        k_start = start * params.k_token_stride;
        v_start = start * params.v_token_stride;
    } else {
        tile.keys = params.seqlen_k;
        k_start = batch * params.k_batch_stride;
        v_start = batch * params.v_batch_stride;
    }
    if (params.kv_lengths != nullptr && params.kv_lengths[batch] < tile.keys) tile.keys = params.kv_lengths[batch];

    tile.q = static_cast<const Element*>(params.q) + q_start + kv_head * GROUP * params.q_head_stride;
    tile.k = static_cast<const Element*>(params.k) + k_start + kv_head * params.k_head_stride;
    tile.v = static_cast<const Element*>(params.v) + v_start + kv_head * params.v_head_stride;
    tile.out = static_cast<Element*>(params.out) + out_start + kv_head * GROUP * params.out_head_stride;
    tile.lse = params.lse == nullptr
                   ? nullptr
                   : params.lse + kv_head * GROUP * static_cast<long long>(params.total_q) + tile.first_query;
    tile.first_row = static_cast<int>(tiles - 1 - block / pairs) * ROWS;
    const int rest = tile.queries * GROUP - tile.first_row;
    tile.num_rows = rest < ROWS ? rest : ROWS;
    return tile;
}
