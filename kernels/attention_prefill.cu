// Prefill attention on tensor cores: FlashAttention-2 (Dao 2023), fp16 from Turing on and bf16 from Ampere on.
//
//   S = Q K^T (fp32),  P = 2^(S * scale_log2 - m),  O = O * 2^(m_old - m) + P V,  out = O / sum P
//
// A block owns ROWS rows of one (sequence, KV head) and walks over its keys, BLOCK_KEYS at a time. WARPS_M warps share
// the rows, 16 * ROW_TILES each; WARPS_N warps share the keys of a block and are merged at the end, so that short
// prompts fill the GPU and finish early. S, P and O stay in registers.
//
// Compile-time constants: HEAD_DIM 32, 64 or 128; GROUP query heads to a KV head; CAUSAL; DTYPE_FP16 or DTYPE_BF16;
// the tile WARPS_M, ROW_TILES, WARPS_N, BLOCK_KEYS; STAGES of K and V in shared memory; Q_IN_REGISTERS; MIN_BLOCKS on
// one multiprocessor. soprano_cupy/attention/prefill.py holds the table.
#include "attention_params.cuh"
#include "device.cuh"
#include "softmax_state.cuh"
#include "attention_rows.cuh"
#include "shared_tile.cuh"

constexpr int WARPS = WARPS_M * WARPS_N;
constexpr int THREADS = WARPS * WARP_LANES;
constexpr int WARP_ROWS = 16 * ROW_TILES;
constexpr int ROWS = WARPS_M * WARP_ROWS;
constexpr int WARP_KEYS = BLOCK_KEYS / WARPS_N;
constexpr int DEPTH_STEPS = HEAD_DIM / 16;  // tensor-core products along a row of Q and K
// Q in registers is indexed by the step; else a full unrolling would only gather more operands than registers.
constexpr int DEPTH_UNROLL = Q_IN_REGISTERS ? DEPTH_STEPS : 2;
constexpr unsigned TILE_BYTES = BLOCK_KEYS * ROW_BYTES;
constexpr unsigned STAGE_BYTES = 2 * TILE_BYTES;  // K, then V

// Scores may exceed the softmax's reference by this much (in log2 units) before O is rescaled: weights stay below
// 2^8, harmless in fp32 and fp16 alike, and most blocks skip the pass over O.
constexpr float RESCALE_SLACK = 8.0f;

// What one warp carries from block to block: fragments as mma_16x8x16 lays them out. Lane l holds rows l / 4 (half 0)
// and l / 4 + 8 (half 1) of each row tile and columns 2 (l % 4), 2 (l % 4) + 1 of each 8.
struct WarpTile {
    float o_rmem[ROW_TILES][HEAD_DIM / 8][4];
    SoftmaxState state[ROW_TILES][2];  // `sum` covers this lane's columns until the end
    int first_row;                     // in the sequence's matrix of rows
    int full_keys, any_keys;           // keys that its first row sees; that its last row sees
};

typedef unsigned QueryFragments[ROW_TILES][DEPTH_STEPS][4];
typedef float Scores[ROW_TILES][WARP_KEYS / 8][4];

DEVICE void copy_queries_async(const AttentionParams& params, const RowTile& tile, unsigned q_smem) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const bool valid = row < tile.num_rows;
        const Element* source = tile.q_row(params, tile.first_row + (valid ? row : 0)) + chunk * CHUNK;
        copy_async_16(q_smem + tile_offset(row, chunk), source, valid);
    }
}

// S = Q K^T for this warp's rows and keys.
DEVICE void multiply_qk(Scores& s_rmem, const QueryFragments& q_rmem, unsigned q_warp_smem, unsigned k_warp_smem) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < WARP_KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s_rmem[m][n][i] = 0.0f;
    const unsigned q_lane_smem = opaque(q_warp_smem + lane_offset_rows_first(lane_index()));
    const unsigned k_lane_smem = opaque(k_warp_smem + lane_offset_columns_first(lane_index()));
#pragma unroll DEPTH_UNROLL
    for (int d = 0; d < DEPTH_STEPS; ++d) {
        unsigned a_rmem[ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
            if (!Q_IN_REGISTERS) load_matrix_x4(a_rmem[m], step_columns(q_lane_smem, d) + m * 16 * ROW_BYTES);
#pragma unroll
            for (int i = 0; i < 4 && Q_IN_REGISTERS; ++i) a_rmem[m][i] = q_rmem[m][d][i];
        }
#pragma unroll
        for (int n = 0; n < WARP_KEYS / 16; ++n) {
            unsigned b_rmem[4];
            load_matrix_x4(b_rmem, step_columns(k_lane_smem, d) + n * 16 * ROW_BYTES);
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                mma_16x8x16(s_rmem[m][2 * n], a_rmem[m], b_rmem[0], b_rmem[1]);
                mma_16x8x16(s_rmem[m][2 * n + 1], a_rmem[m], b_rmem[2], b_rmem[3]);
            }
        }
    }
}

// Hides the keys that a row does not see: those after it (causal) and those past the sequence's end.
DEVICE void mask_scores(Scores& s_rmem, const RowTile& tile, int warp_first_row, int first_key) {
    const int lane = lane_index();
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_first_row + 16 * m + 8 * half + lane / 4;
            const int seen =
                tile.visible_keys(row) - first_key - lane % 4 * 2;  // counted from this lane's first column
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (8 * n + i >= seen) s_rmem[m][n][2 * half + i] = -infinity();
        }
}

// The largest score of each row of this lane over the keys of the block, in log2 units.
DEVICE void row_maxima(float (&maxima)[ROW_TILES][2], const Scores& s_rmem, float scale_log2) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = fmaxf(s_rmem[m][0][2 * half], s_rmem[m][0][2 * half + 1]);
#pragma unroll
            for (int n = 1; n < WARP_KEYS / 8; ++n)
                largest = fmaxf(largest, fmaxf(s_rmem[m][n][2 * half], s_rmem[m][n][2 * half + 1]));
            largest = fmaxf(largest, shuffle_xor(largest, 1));
            largest = fmaxf(largest, shuffle_xor(largest, 2));
            maxima[m][half] = largest * scale_log2;
        }
}

// Moves the softmax's references up where the block's scores ask for it, and O and the sums with them.
DEVICE void raise_references(WarpTile& warp, const float (&maxima)[ROW_TILES][2]) {
    bool raise = false;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) raise |= maxima[m][half] > warp.state[m][half].max + RESCALE_SLACK;
    if (!any_lane(raise)) return;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float factor = warp.state[m][half].raise_max(maxima[m][half]);
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                warp.o_rmem[m][n][2 * half] *= factor;
                warp.o_rmem[m][n][2 * half + 1] *= factor;
            }
        }
}

// O += P V for this warp's rows and keys, 16 keys at a time. P = 2^(S - reference) is rounded to the A operand: the
// accumulators of two neighbouring 8-column products hold the very elements that the lane needs there, so P never
// leaves its registers, and the exponentials of the next keys overlap the products of these.
DEVICE void multiply_pv(WarpTile& warp, const Scores& s_rmem, float scale_log2, unsigned v_warp_smem) {
    const unsigned v_lane_smem = opaque(v_warp_smem + lane_offset_rows_first(lane_index()));
#pragma unroll
    for (int k = 0; k < WARP_KEYS / 16; ++k) {
        unsigned p_rmem[ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i % 2;
                const float reference = warp.state[m][half].reference();
                const float* s_pair_rmem = &s_rmem[m][2 * k + i / 2][2 * half];
                const float low = softmax_exp2(fused_multiply_add(s_pair_rmem[0], scale_log2, -reference));
                const float high = softmax_exp2(fused_multiply_add(s_pair_rmem[1], scale_log2, -reference));
                warp.state[m][half].sum += low + high;
                p_rmem[m][i] = pack2(low, high);
            }
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 16; ++n) {
            unsigned b_rmem[4];
            load_matrix_x4_trans(b_rmem, step_columns(v_lane_smem, n) + k * 16 * ROW_BYTES);
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                mma_16x8x16(warp.o_rmem[m][2 * n], p_rmem[m], b_rmem[0], b_rmem[1]);
                mma_16x8x16(warp.o_rmem[m][2 * n + 1], p_rmem[m], b_rmem[2], b_rmem[3]);
            }
        }
    }
}

// Adds up the four lanes' shares of each row's sum.
DEVICE void complete_sums(WarpTile& warp) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float& sum = warp.state[m][half].sum;
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
        }
}

#if WARPS_N == 1

// Normalises O and writes it, through this warp's own rows of the Q tile, in stores of 16 bytes.
DEVICE void store_output(const AttentionParams& params, const RowTile& tile, const WarpTile& warp, unsigned q_smem) {
    const int lane = lane_index(), tile_row = warp.first_row - tile.first_row;
    sync_warp();  // every lane is done with the warp's Q rows
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * m + 8 * half + lane / 4;
            const float inverse = warp.state[m][half].inverse_sum();
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n)
                store_shared<unsigned>(
                    q_smem + tile_offset(tile_row + row, n) + lane % 4 * 4,
                    pack2(warp.o_rmem[m][n][2 * half] * inverse, warp.o_rmem[m][n][2 * half + 1] * inverse));
            if (lane % 4 == 0 && tile_row + row < tile.num_rows)
                tile.store_lse(params, warp.first_row + row, warp.state[m][half].log_sum_exp());
        }
    sync_warp();  // the warp's rows are complete
#pragma unroll
    for (int i = lane; i < WARP_ROWS * CHUNKS; i += WARP_LANES) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        if (tile_row + row >= tile.num_rows) continue;
        const uint4 value = load_shared<uint4>(q_smem + tile_offset(tile_row + row, chunk));
        store_global<uint4>(tile.out_row(params, warp.first_row + row) + chunk * CHUNK, value);
    }
}

#else

// fp32 rows of the partial outputs; the padding keeps the eight rows of a fragment in different banks.
constexpr unsigned PARTIAL_STRIDE = (HEAD_DIM + 8) * 4;
constexpr unsigned STATES_BYTES = WARPS_N * ROWS * 8;

// Merges the warps that took different keys of the same rows, always in the order of the keys, and writes the output.
// The memory of K and V is used again: (max, sum) of each warp and row, then the weighted partial outputs.
DEVICE void merge_and_store(const AttentionParams& params, const RowTile& tile, WarpTile& warp, int warp_n,
                            unsigned merge_smem) {
    const int lane = lane_index(), tile_row = warp.first_row - tile.first_row;
    const unsigned partial_smem = merge_smem + STATES_BYTES;
    sync_block();  // every warp is done with K and V
    if (lane % 4 == 0)
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = tile_row + 16 * m + 8 * half + lane / 4;
                const SoftmaxState& state = warp.state[m][half];
                store_shared<float2>(merge_smem + (warp_n * ROWS + row) * 8, make_float2(state.max, state.sum));
            }
    sync_block();  // the states of all warps are there
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile_row + 16 * m + 8 * half + lane / 4;
            SoftmaxState total = SoftmaxState::empty();
#pragma unroll
            for (int n = 0; n < WARPS_N; ++n) {
                const float2 part = load_shared<float2>(merge_smem + (n * ROWS + row) * 8);
                float own, theirs;
                total.merge({part.x, part.y}, own, theirs);
            }
            const float weight = total.weight(warp.state[m][half].max) * total.inverse_sum();
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n)
                store_shared<float2>(
                    partial_smem + (warp_n * ROWS + row) * PARTIAL_STRIDE + (8 * n + lane % 4 * 2) * 4,
                    make_float2(warp.o_rmem[m][n][2 * half] * weight, warp.o_rmem[m][n][2 * half + 1] * weight));
            if (warp_n == 0 && lane % 4 == 0 && row < tile.num_rows)
                tile.store_lse(params, tile.first_row + row, total.log_sum_exp());
        }
    sync_block();  // the partial outputs of all warps are there
    for (int i = threadIdx.x; i < tile.num_rows * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        float sum[CHUNK] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < WARPS_N; ++n)
#pragma unroll
            for (int j = 0; j < CHUNK; j += 4) {
                const unsigned address = partial_smem + (n * ROWS + row) * PARTIAL_STRIDE + (chunk * CHUNK + j) * 4;
                const float4 part = load_shared<float4>(address);
                sum[j] += part.x, sum[j + 1] += part.y, sum[j + 2] += part.z, sum[j + 3] += part.w;
            }
        const uint4 value =
            make_uint4(pack2(sum[0], sum[1]), pack2(sum[2], sum[3]), pack2(sum[4], sum[5]), pack2(sum[6], sum[7]));
        store_global<uint4>(tile.out_row(params, tile.first_row + row) + chunk * CHUNK, value);
    }
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention_prefill(const __grid_constant__ AttentionParams params) {
    const RowTile tile = select_tile<ROWS>(params);
    if (tile.num_rows <= 0) return;
    const unsigned q_smem = shared_base(), kv_smem = q_smem + ROWS * ROW_BYTES;
    const int warp_m = warp_index() % WARPS_M, warp_n = warp_index() / WARPS_M;

    const int num_keys = tile.visible_keys(tile.first_row + tile.num_rows - 1);  // that any row of the tile sees
    const int num_blocks = (num_keys + BLOCK_KEYS - 1) / BLOCK_KEYS;
    // Copies of one block of K or V; keys past the sequence's end are zeros.
    auto copy_k = [&](int block, unsigned smem) {
        const int first_key = block * BLOCK_KEYS;
        copy_tile_async<BLOCK_KEYS, THREADS>(smem, tile.k + first_key * params.k_token_stride, params.k_token_stride,
                                             tile.keys - first_key);
    };
    auto copy_v = [&](int block, unsigned smem) {
        const int first_key = block * BLOCK_KEYS;
        copy_tile_async<BLOCK_KEYS, THREADS>(smem, tile.v + first_key * params.v_token_stride, params.v_token_stride,
                                             tile.keys - first_key);
    };

    copy_queries_async(params, tile, q_smem);
    copy_async_commit();
    if (num_blocks > 0) {
        copy_k(0, kv_smem);
        if (STAGES == 2) copy_v(0, kv_smem + TILE_BYTES);
    }
    copy_async_commit();

    WarpTile warp;
    warp.first_row = tile.first_row + warp_m * WARP_ROWS;
    warp.full_keys = tile.visible_keys(warp.first_row);
    warp.any_keys = tile.visible_keys(warp.first_row + WARP_ROWS - 1);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        warp.state[m][0] = warp.state[m][1] = SoftmaxState::empty();
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) warp.o_rmem[m][n][i] = 0.0f;
    }

    // Where Q is read from shared memory in the loop, the loop's first barrier is soon enough.
    if (Q_IN_REGISTERS || num_blocks == 0) {
        copy_async_wait<1>();
        sync_block();  // Q is there
    }
    const unsigned q_warp_smem = q_smem + warp_m * WARP_ROWS * ROW_BYTES;
    QueryFragments q_rmem;
#pragma unroll
    for (int m = 0; m < ROW_TILES && Q_IN_REGISTERS; ++m)
#pragma unroll
        for (int d = 0; d < DEPTH_STEPS; ++d)
            load_matrix_x4(q_rmem[m][d],
                           step_columns(q_warp_smem + lane_offset_rows_first(lane_index()), d) + m * 16 * ROW_BYTES);

    const unsigned warp_smem = warp_n * WARP_KEYS * ROW_BYTES;  // this warp's keys within a tile of K or V
    for (int block = 0; block < num_blocks; ++block) {
        const unsigned k_smem = kv_smem + (STAGES == 2 ? block % 2 * STAGE_BYTES : 0), v_smem = k_smem + TILE_BYTES;
        const int first_key = block * BLOCK_KEYS + warp_n * WARP_KEYS;
        const bool sees_keys = first_key < warp.any_keys;

        copy_async_wait<0>();
        sync_block();  // this block's K (with two stages, V too) is there; the memory copied to next is no longer read
#if STAGES == 2
        if (block + 1 < num_blocks) {
            const unsigned next_smem = kv_smem + (block + 1) % 2 * STAGE_BYTES;
            copy_k(block + 1, next_smem);
            copy_v(block + 1, next_smem + TILE_BYTES);
        }
#else
        copy_v(block, v_smem);
#endif
        copy_async_commit();

        Scores s_rmem;
        if (sees_keys) {
            multiply_qk(s_rmem, q_rmem, q_warp_smem, k_smem + warp_smem);
            if (first_key + WARP_KEYS > warp.full_keys) mask_scores(s_rmem, tile, warp.first_row, first_key);
            float maxima[ROW_TILES][2];
            row_maxima(maxima, s_rmem, params.scale_log2);
            raise_references(warp, maxima);
        }
#if STAGES == 1
        copy_async_wait<0>();
        sync_block();  // this block's V is there; K is no longer read
        if (block + 1 < num_blocks) copy_k(block + 1, k_smem);
        copy_async_commit();
#endif
        if (sees_keys) multiply_pv(warp, s_rmem, params.scale_log2, v_smem + warp_smem);
    }

    complete_sums(warp);
    // Selected again rather than kept: its pointers would hold registers throughout the loop.
    const RowTile output = select_tile<ROWS>(params);
#if WARPS_N == 1
    store_output(params, output, warp, q_smem);
#else
    merge_and_store(params, output, warp, warp_n, kv_smem);
#endif
}
