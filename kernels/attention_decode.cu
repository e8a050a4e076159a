// Decode attention (flash-decoding, Dao et al. 2023): few query tokens a sequence, 1 to 16, against its cached keys.
//
//   out = softmax(scale Q K^T) V, causal among the query tokens when CAUSAL (aligned bottom right)
//
// One thread block serves TILE_ROWS query rows of one key-value head: all its GROUP query heads, times the query
// tokens. K and V are read once for all of them.
//
// A sequence's keys are cut into splits whose size depends on the sequence's own length alone (struct Splits). A split
// is reduced from a fresh state, block by block, and the states of the splits are merged in order. Whether one
// thread block takes all the splits of a sequence or several share them (params.splits) changes who does that
// arithmetic and nothing else, so the result of a sequence has the same bits in any batch, on any slot, in any grid.
// Where several blocks share, each leaves its splits' states in the workspace and the last to finish merges them.
//
// Compile-time: HEAD_DIM 32, 64 or 128; GROUP; CAUSAL; DTYPE_*; TILE_ROWS (8, 16 or 32 on tensor cores, else 4 or 8);
// STAGES, 1 or 2: the blocks of keys and values in shared memory. Neither of these two changes a bit of the result.
// Launch (soprano_cupy/attention/decode.py): grid (row groups x params.splits, num_kv_heads, batch), HEAD_DIM threads.
// q, k, v and out are aligned to 16 bytes, and so are their strides.
#include "attention_params.cuh"
#include "device.cuh"
#include "softmax_state.cuh"
#include "decode_tile.cuh"
#if HAS_MMA
#include "decode_mma.cuh"
#else
#include "decode_simt.cuh"
#endif
#include "decode_state.cuh"

// Shared memory, in bytes; soprano_cupy/attention/decode.py counts the same.
constexpr int SCORE_BYTES = MATRIX_ROWS * SCORE_STRIDE * 4;
constexpr int VALUES_AT = WARPS * WARP_TILE_BYTES;  // behind the keys
constexpr int STAGE_BYTES = VALUES_AT + WARPS * WARP_TILE_BYTES;
constexpr int SCORES_AT = STAGES * STAGE_BYTES;  // two buffers
constexpr int STATES_AT = SCORES_AT + 2 * SCORE_BYTES;
constexpr int ARRIVAL_AT = STATES_AT + ROW_STATE_BYTES;  // a word
constexpr int QUERIES_AT = ARRIVAL_AT + 16;
constexpr int TOTAL_AT = QUERIES_AT + TILE_ROWS * QUERY_STRIDE;  // STATE_BYTES

// Warps whose registers a multiprocessor should hold. Sixteen have 112 KB of loads under way between them, four times
// what the latency of the memory asks for.
#if HAS_MMA
constexpr int WARPS_PER_MULTIPROCESSOR = TILE_ROWS == 8 ? 16 : TILE_ROWS == 16 ? 12 : 8;
#else
constexpr int WARPS_PER_MULTIPROCESSOR = 8;
#endif

// Where a sequence's queries and keys are.
struct Sequence {
    int first_query;  // row of its first query, counted over all sequences
    int queries, keys;
    long long k_offset, v_offset;  // elements before its first key, in k and v

    DEVICE Sequence(const AttentionParams& params, int sequence) {
        first_query = sequence * params.seqlen_q;
        queries = params.seqlen_q;
        if (params.cu_seqlens_q) {
            first_query = load_global<int>(params.cu_seqlens_q + sequence);
            queries = load_global<int>(params.cu_seqlens_q + sequence + 1) - first_query;
        }
        if (params.cu_seqlens_k) {
            const int first_key = load_global<int>(params.cu_seqlens_k + sequence);
            keys = load_global<int>(params.cu_seqlens_k + sequence + 1) - first_key;
            k_offset = first_key * params.k_token_stride;
            v_offset = first_key * params.v_token_stride;
        } else {
            keys = params.kv_lengths ? load_global<int>(params.kv_lengths + sequence) : params.seqlen_k;
            k_offset = sequence * params.k_batch_stride;
            v_offset = sequence * params.v_batch_stride;
        }
    }
};

// Elements before row (token, head) of q or out, which start at a sequence's place in the batch or among packed rows.
DEVICE long long row_offset(const AttentionParams& params, int first_query, int token, int head, long long batch_stride,
                            long long token_stride, long long head_stride) {
    const long long start = params.cu_seqlens_q ? first_query * token_stride : blockIdx.z * batch_stride;
    return start + token * token_stride + (static_cast<long long>(blockIdx.y) * GROUP + head) * head_stride;
}

// This thread's part of the query rows first_row and on, on their way from memory to shared memory; rows that do not
// exist are zeros.
struct Queries {
    static constexpr int ROW_CHUNKS = HEAD_DIM / CHUNK, CHUNKS = TILE_ROWS * ROW_CHUNKS;
    static constexpr int HELD = (CHUNKS + THREADS - 1) / THREADS;

    uint4 held[HELD];

    DEVICE Queries(const AttentionParams& params, const Sequence& sequence, int first_row) {
#pragma unroll
        for (int n = 0; n < HELD; ++n) {
            const int i = n * THREADS + threadIdx.x, chunk = i % ROW_CHUNKS;
            const int token = (first_row + i / ROW_CHUNKS) / GROUP, head = (first_row + i / ROW_CHUNKS) % GROUP;
            held[n] = make_uint4(0u, 0u, 0u, 0u);
            if (i >= CHUNKS || token >= sequence.queries) continue;
            const long long offset = row_offset(params, sequence.first_query, token, head, params.q_batch_stride,
                                                params.q_token_stride, params.q_head_stride);
            held[n] = load_global<uint4>(static_cast<const Element*>(params.q) + offset + chunk * CHUNK);
        }
    }
    DEVICE void store(unsigned queries_smem) const {
#pragma unroll
        for (int n = 0; n < HELD; ++n) {
            const int i = n * THREADS + threadIdx.x;
            if (CHUNKS % THREADS == 0 || i < CHUNKS) {
                store_query_chunk(queries_smem, i / ROW_CHUNKS, i % ROW_CHUNKS, held[n]);
            }
        }
    }
};

// out = acc / sum of the rows that exist, and their log-sum-exp.
DEVICE void store_rows(const AttentionParams& params, const Sequence& sequence, int first_row,
                       const RowState (&state)[HELD_ROWS]) {
#pragma unroll
    for (int i = 0; i < HELD_ROWS; ++i) {
        const int token = (first_row + held_row(i)) / GROUP, head = (first_row + held_row(i)) % GROUP;
        if (token >= sequence.queries) continue;
        const long long offset = row_offset(params, sequence.first_query, token, head, params.out_batch_stride,
                                            params.out_token_stride, params.out_head_stride);
        store_output(static_cast<Element*>(params.out) + offset + warp_index() * WARP_DIMS, state[i].acc,
                     state[i].softmax.inverse_sum());
        if (params.lse != nullptr && threadIdx.x < WARP_LANES && writes_lse()) {
            const long long row = static_cast<long long>(blockIdx.y * GROUP + head) * params.total_q;
            store_global(params.lse + row + sequence.first_query + token, state[i].softmax.log_sum_exp());
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, WARPS_PER_MULTIPROCESSOR / WARPS)
    attention_decode(const __grid_constant__ AttentionParams params) {
    const bool one_row_group = params.seqlen_q * GROUP <= TILE_ROWS;
    const int row_group = one_row_group ? 0 : blockIdx.x / params.splits;
    const int share = blockIdx.x - row_group * params.splits;  // takes the splits share, share + shares, ...
    const int first_row = row_group * TILE_ROWS;
    const Sequence sequence(params, blockIdx.z);
    if (first_row >= sequence.queries * GROUP) return;
    const Splits splits(sequence.keys);
    const int shares = splits.shares(params.splits);
    if (share >= shares) return;

    const unsigned smem = shared_base(), first_stage = smem + warp_index() * WARP_TILE_BYTES;
    const Element* k = static_cast<const Element*>(params.k) + sequence.k_offset + blockIdx.y * params.k_head_stride;
    const Element* v = static_cast<const Element*>(params.v) + sequence.v_offset + blockIdx.y * params.v_head_stride;
    const int begin = share << splits.shift;
    const Queries queries(params, sequence, first_row);  // asked for first, so that they do not come behind the keys
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
        const unsigned keys_smem = first_stage + stage * STAGE_BYTES;
        const int block = stage == 0 ? begin : splits.after(begin, shares);  // the first exists, or reads nothing
        if (stage == 0 || block < splits.blocks) {
            load_keys(keys_smem, k, params.k_token_stride, block * BLOCK_KEYS, sequence.keys);
        }
        copy_async_commit();  // also of nothing, so that as many groups are always behind a block's
        if (stage == 0 || block < splits.blocks) {
            load_values(keys_smem + VALUES_AT, v, params.v_token_stride, block * BLOCK_KEYS, sequence.keys);
        }
        copy_async_commit();
    }
    queries.store(smem + QUERIES_AT);
    sync_block();  // the queries are written

    const Visibility visibility{sequence.keys, sequence.queries, first_row};
    const Workspace workspace(params, row_group, sequence.queries * GROUP - first_row);
    const Total total{smem + TOTAL_AT};
    RowState state[HELD_ROWS];  // of the split under way
    clear(state);

    unsigned keys_smem = first_stage, scores_smem = smem + SCORES_AT;
    int next;
    for (int block = begin; block < splits.blocks; block = next) {
        next = splits.after(block, shares);
        const int ahead = STAGES == 1 ? next : splits.after(next, shares);  // the block to ask for
        const unsigned values_smem = keys_smem + VALUES_AT;
        copy_async_wait<2 * STAGES - 1>();  // the keys are there; the values may still be on their way
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            write_scores(tile, keys_smem, smem + QUERIES_AT, scores_smem, params.scale_log2, block * BLOCK_KEYS,
                         visibility);
            if (tile == ROW_TILES - 1) {
                if (ahead < splits.blocks) {
                    load_keys(keys_smem, k, params.k_token_stride, ahead * BLOCK_KEYS, sequence.keys);
                }
                copy_async_commit();
            }
            if (tile == 0) copy_async_wait<2 * STAGES - (ROW_TILES == 1 ? 1 : 2)>();  // the values
            sync_block();  // scores and values are there; the other buffer's readers were done before they came here

            merge_values(values_smem, scores_smem, smem + STATES_AT, state + tile * TILE_HELD);
            scores_smem = scores_smem == smem + SCORES_AT ? smem + SCORES_AT + SCORE_BYTES : smem + SCORES_AT;
        }
        sync_warp();  // this warp's lanes have read the values
        if (ahead < splits.blocks) {
            load_values(values_smem, v, params.v_token_stride, ahead * BLOCK_KEYS, sequence.keys);
        }
        copy_async_commit();
        keys_smem = STAGES == 2 && keys_smem == first_stage ? first_stage + STAGE_BYTES : first_stage;

        if (!splits.ends(block)) continue;
        if (shares == 1 && splits.shift == 0) continue;  // alone, blocks are splits and merged already
        const int split = block >> splits.shift;
        if (shares > 1)
            workspace.store(split, state);
        else if (split == 0)
            total.store(state);
        else
            total.merge(state);
        clear(state);
    }
    if (shares > 1) {
        if (!workspace.last_to_arrive(shares, smem + ARRIVAL_AT)) return;
        workspace.merge(splits.count, state);
    } else if (splits.shift > 0) {
        total.load(state);
    }
    store_rows(params, sequence, first_row, state);
}
