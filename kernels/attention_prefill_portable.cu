// Prefill attention without tensor cores: fp32 on any GPU, fp16 and bf16 where a GPU has no matrix products for them.
// The algorithm is that of attention_prefill.cu in fp32 FMAs; 16-bit inputs are widened on their way to shared memory.
//
// Exactness comes first. Sums are formed in two levels (16 products at a time along a row of Q and K; one block of keys
// at a time for O), which keeps rounding errors near those of a blocked matrix product, and fp32 inputs take the
// exponential to the last place.
//
// A block of 128 threads owns ROWS rows. Thread (ty, tx) = (warp * 4 + lane / 8, lane % 8) computes the scores of
// rows ty + 16 i and keys tx + 8 j, and the outputs of the same rows and columns 4 tx + 32 c. With rows padded by four
// floats, every 16-byte access of a warp is free of bank conflicts.
//
// Compile-time constants: HEAD_DIM 32, 64 or 128; GROUP; CAUSAL; DTYPE_FP32, DTYPE_FP16 or DTYPE_BF16.
#include "attention_params.cuh"
#include "device.cuh"
#include "softmax_state.cuh"
#include "attention_rows.cuh"

constexpr int THREADS = 128;
constexpr int MIN_BLOCKS = 2;  // on one multiprocessor: at most 255 registers
constexpr int ROWS = 64;
constexpr int BLOCK_KEYS = 32;
constexpr int THREAD_ROWS = 4;                  // rows ty + 16 i of one thread
constexpr int THREAD_KEYS = 4;                  // keys tx + 8 j of one thread
constexpr int THREAD_COLUMNS = HEAD_DIM / 32;   // groups of four output columns of one thread
constexpr int ROW_STRIDE = (HEAD_DIM + 4) * 4;  // bytes from row to row of Q, K and V in shared memory
constexpr int P_STRIDE = (BLOCK_KEYS + 4) * 4;  // and of P

constexpr int VECTOR = 16 / sizeof(Element);  // elements in one 16-byte load
constexpr int ROW_VECTORS = HEAD_DIM / VECTOR;

typedef float Scores[THREAD_ROWS][THREAD_KEYS];

// Widens 16 bytes of a row and stores them as floats.
DEVICE void store_widened(unsigned address, uint4 bits) {
#if defined(DTYPE_FP32)
    store_shared<uint4>(address, bits);
#else
    store_shared<float4>(address,
                         make_float4(unpack_low(bits.x), unpack_high(bits.x), unpack_low(bits.y), unpack_high(bits.y)));
    store_shared<float4>(address + 16,
                         make_float4(unpack_low(bits.z), unpack_high(bits.z), unpack_low(bits.w), unpack_high(bits.w)));
#endif
}

// One block of K or V on its way from global to shared memory: loaded early, stored once the tile there is free.
struct BlockInFlight {
    static constexpr int COUNT = BLOCK_KEYS * ROW_VECTORS / THREADS;
    uint4 bits_rmem[COUNT];

    // Rows from valid_rows on are not read and become zeros: padding of any content stays out of the arithmetic.
    DEVICE void load(const Element* first_row, long long stride, int valid_rows) {
        const int thread = opaque(threadIdx.x);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int index = thread + i * THREADS, row = index / ROW_VECTORS;
            bits_rmem[i] = make_uint4(0u, 0u, 0u, 0u);
            if (row < valid_rows)
                bits_rmem[i] = load_global<uint4>(first_row + row * stride + index % ROW_VECTORS * VECTOR);
        }
    }

    DEVICE void store(unsigned tile_smem) const {
        const int thread = opaque(threadIdx.x);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int index = thread + i * THREADS;
            store_widened(tile_smem + index / ROW_VECTORS * ROW_STRIDE + index % ROW_VECTORS * VECTOR * 4,
                          bits_rmem[i]);
        }
    }
};

DEVICE void load_queries(const AttentionParams& params, const RowTile& tile, unsigned q_smem) {
    for (int i = threadIdx.x; i < ROWS * ROW_VECTORS; i += THREADS) {
        const int row = i / ROW_VECTORS, column = i % ROW_VECTORS * VECTOR;
        uint4 bits = make_uint4(0u, 0u, 0u, 0u);
        if (row < tile.num_rows) bits = load_global<uint4>(tile.q_row(params, tile.first_row + row) + column);
        store_widened(q_smem + row * ROW_STRIDE + column * 4, bits);
    }
}

DEVICE float dot4(float4 a, float4 b, float sum) {
    sum = fused_multiply_add(a.x, b.x, sum);
    sum = fused_multiply_add(a.y, b.y, sum);
    sum = fused_multiply_add(a.z, b.z, sum);
    return fused_multiply_add(a.w, b.w, sum);
}

DEVICE float4 scale_add4(float factor, float4 a, float4 sum) {
    return make_float4(fused_multiply_add(factor, a.x, sum.x), fused_multiply_add(factor, a.y, sum.y),
                       fused_multiply_add(factor, a.z, sum.z), fused_multiply_add(factor, a.w, sum.w));
}

// S = Q K^T. q_smem: row ty; k_smem: key tx.
DEVICE void multiply_qk(Scores& s_rmem, unsigned q_smem, unsigned k_smem) {
#pragma unroll
    for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
        for (int j = 0; j < THREAD_KEYS; ++j) s_rmem[i][j] = 0.0f;
#pragma unroll 2
    for (int d = 0; d < HEAD_DIM; d += 16) {
        Scores part_rmem = {};
#pragma unroll
        for (int e = d; e < d + 16; e += 4) {
            float4 q_rmem[THREAD_ROWS];
#pragma unroll
            for (int i = 0; i < THREAD_ROWS; ++i) q_rmem[i] = load_shared<float4>(q_smem + 16 * i * ROW_STRIDE + e * 4);
#pragma unroll
            for (int j = 0; j < THREAD_KEYS; ++j) {
                const float4 k_rmem = load_shared<float4>(k_smem + 8 * j * ROW_STRIDE + e * 4);
#pragma unroll
                for (int i = 0; i < THREAD_ROWS; ++i) part_rmem[i][j] = dot4(q_rmem[i], k_rmem, part_rmem[i][j]);
            }
        }
#pragma unroll
        for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
            for (int j = 0; j < THREAD_KEYS; ++j) s_rmem[i][j] += part_rmem[i][j];
    }
}

// O = O * factor + P V. p_smem: row ty; v_smem: column 4 tx.
DEVICE void multiply_pv(float4 (&o_rmem)[THREAD_ROWS][THREAD_COLUMNS], const float (&factors)[THREAD_ROWS],
                        unsigned p_smem, unsigned v_smem) {
#pragma unroll
    for (int c = 0; c < THREAD_COLUMNS; ++c) {
        float4 part_rmem[THREAD_ROWS] = {};
#pragma unroll 2
        for (int key = 0; key < BLOCK_KEYS; key += 4) {
            float4 p_rmem[THREAD_ROWS], v_rmem[4];
#pragma unroll
            for (int i = 0; i < THREAD_ROWS; ++i) p_rmem[i] = load_shared<float4>(p_smem + 16 * i * P_STRIDE + key * 4);
#pragma unroll
            for (int k = 0; k < 4; ++k) v_rmem[k] = load_shared<float4>(v_smem + (key + k) * ROW_STRIDE + c * 128);
#pragma unroll
            for (int i = 0; i < THREAD_ROWS; ++i) {
                part_rmem[i] = scale_add4(p_rmem[i].x, v_rmem[0], part_rmem[i]);
                part_rmem[i] = scale_add4(p_rmem[i].y, v_rmem[1], part_rmem[i]);
                part_rmem[i] = scale_add4(p_rmem[i].z, v_rmem[2], part_rmem[i]);
                part_rmem[i] = scale_add4(p_rmem[i].w, v_rmem[3], part_rmem[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < THREAD_ROWS; ++i) o_rmem[i][c] = scale_add4(factors[i], o_rmem[i][c], part_rmem[i]);
    }
}

// Over the eight lanes that share a row.
DEVICE float row_max(float value) {
    value = fmaxf(value, shuffle_xor(value, 1));
    value = fmaxf(value, shuffle_xor(value, 2));
    return fmaxf(value, shuffle_xor(value, 4));
}
DEVICE float row_sum(float value) {
    value += shuffle_xor(value, 1);
    value += shuffle_xor(value, 2);
    return value + shuffle_xor(value, 4);
}

// Scores to weights: hides the keys from `visible` on (counted from tx), moves the row's state on, and writes P.
// s_rmem: one row; p_smem: this row, key tx. Returns the factor for O.
DEVICE float softmax_row(SoftmaxState& state, const float (&s_rmem)[THREAD_KEYS], int visible, float scale_log2,
                         unsigned p_smem) {
    float scores[THREAD_KEYS], largest = -infinity();
#pragma unroll
    for (int j = 0; j < THREAD_KEYS; ++j) {
        scores[j] = 8 * j < visible ? s_rmem[j] * scale_log2 : -infinity();
        largest = fmaxf(largest, scores[j]);
    }
    const float factor = state.raise_max(row_max(largest));
#pragma unroll
    for (int j = 0; j < THREAD_KEYS; ++j) {
        const float weight = state.weight(scores[j]);
        state.sum += weight;
        store_shared<float>(p_smem + 8 * j * 4, weight);
    }
    return factor;
}

DEVICE void store_four(Element* target, float4 value, float factor) {
#if defined(DTYPE_FP32)
    store_global<float4>(target, make_float4(value.x * factor, value.y * factor, value.z * factor, value.w * factor));
#else
    store_global<uint2>(
        target, make_uint2(pack2(value.x * factor, value.y * factor), pack2(value.z * factor, value.w * factor)));
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention_prefill_portable(const __grid_constant__ AttentionParams params) {
    const RowTile tile = select_tile<ROWS>(params);
    if (tile.num_rows <= 0) return;
    const unsigned q_smem = shared_base(), kv_smem = q_smem + ROWS * ROW_STRIDE,
                   p_smem = kv_smem + BLOCK_KEYS * ROW_STRIDE;
    const int ty = warp_index() * 4 + lane_index() / 8, tx = lane_index() % 8;

    const int num_keys = tile.visible_keys(tile.first_row + tile.num_rows - 1);  // that any row of the tile sees
    const int num_blocks = (num_keys + BLOCK_KEYS - 1) / BLOCK_KEYS;

    SoftmaxState state[THREAD_ROWS];  // `sum` covers this lane's keys until the end
    float4 o_rmem[THREAD_ROWS][THREAD_COLUMNS];
#pragma unroll
    for (int i = 0; i < THREAD_ROWS; ++i) {
        state[i] = SoftmaxState::empty();
#pragma unroll
        for (int c = 0; c < THREAD_COLUMNS; ++c) o_rmem[i][c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }

    BlockInFlight in_flight;
    load_queries(params, tile, q_smem);
    in_flight.load(tile.k, params.k_token_stride, tile.keys);
    for (int block = 0; block < num_blocks; ++block) {
        const int first_key = block * BLOCK_KEYS;
        sync_block();  // all are done with the V of the block before, whose memory K takes
        in_flight.store(kv_smem);
        in_flight.load(tile.v + first_key * params.v_token_stride, params.v_token_stride, tile.keys - first_key);
        sync_block();  // K (and, the first time, Q) is there

        Scores s_rmem;
        multiply_qk(s_rmem, q_smem + ty * ROW_STRIDE, kv_smem + tx * ROW_STRIDE);
        float factors[THREAD_ROWS];
#pragma unroll
        for (int i = 0; i < THREAD_ROWS; ++i) {
            const int row = ty + 16 * i, visible = tile.visible_keys(tile.first_row + row) - first_key - tx;
            factors[i] = softmax_row(state[i], s_rmem[i], visible, params.scale_log2, p_smem + row * P_STRIDE + tx * 4);
        }

        sync_block();  // all are done with K, whose memory V takes
        in_flight.store(kv_smem);
        const int next_key = first_key + BLOCK_KEYS;
        in_flight.load(tile.k + next_key * params.k_token_stride, params.k_token_stride, tile.keys - next_key);
        sync_block();  // V and P are there
        multiply_pv(o_rmem, factors, p_smem + ty * P_STRIDE, kv_smem + tx * 16);
    }

#pragma unroll
    for (int i = 0; i < THREAD_ROWS; ++i) {
        const int row = ty + 16 * i;
        state[i].sum = row_sum(state[i].sum);
        if (row >= tile.num_rows) continue;
        const float inverse = state[i].inverse_sum();
        Element* out = tile.out_row(params, tile.first_row + row) + 4 * tx;
#pragma unroll
        for (int c = 0; c < THREAD_COLUMNS; ++c) store_four(out + 32 * c, o_rmem[i][c], inverse);
        if (tx == 0) tile.store_lse(params, tile.first_row + row, state[i].log_sum_exp());
    }
}
