// Layer norm (Ba, Kiros and Hinton, 2016) of ROWS rows at a time, by a thread block that holds them in registers: a thread
// has four neighbouring channels of every row. Sums run in an order that does not depend on ROWS: a row's result has the
// same bits wherever it stands and whatever stands beside it.
#pragma once

#include "device.cuh"

constexpr int VECTORS = DIM / 4;  // of four channels
constexpr int WARPS = (VECTORS + WARP_LANES - 1) / WARP_LANES;
constexpr int THREADS = WARPS * WARP_LANES;
constexpr int SUM_BYTES = WARPS * ROWS * 4;  // of one exchange between warps; a layer norm has two
constexpr int NORM_SHARED_BYTES = 2 * SUM_BYTES;

DEVICE float4 zero4() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
DEVICE float sum4(float4 a) { return (a.x + a.y) + (a.z + a.w); }
DEVICE float4 fma4(float4 a, float4 b, float4 c) {
    return make_float4(fused_multiply_add(a.x, b.x, c.x), fused_multiply_add(a.y, b.y, c.y),
                       fused_multiply_add(a.z, b.z, c.z), fused_multiply_add(a.w, b.w, c.w));
}
DEVICE float4 scale4(float4 a, float b) { return make_float4(a.x * b, a.y * b, a.z * b, a.w * b); }

// The last threads of a row that is no multiple of 128 channels hold nothing.
DEVICE bool holds_channels() { return VECTORS == THREADS || static_cast<int>(threadIdx.x) < VECTORS; }
// Thread blocks of few rows are alone on their multiprocessor: there the loads go ahead of what they wait for.
DEVICE float4 load_constant(const float* row) {
    if (!holds_channels()) return zero4();
    if (ROWS > 2) return load_global<float4>(row + 4 * threadIdx.x);
    const uint4 v = load_global_once(row + 4 * threadIdx.x);
    return make_float4(bits_to_float(static_cast<int>(v.x)), bits_to_float(static_cast<int>(v.y)),
                       bits_to_float(static_cast<int>(v.z)), bits_to_float(static_cast<int>(v.w)));
}
DEVICE float4 load_channels(const float* row) {
    return holds_channels() ? load_global_fresh<float4>(row + 4 * threadIdx.x) : zero4();
}
DEVICE void store_channels(float* row, float4 value) {
    if (holds_channels()) store_global(row + 4 * threadIdx.x, value);
}
DEVICE void store_channels(Element* row, float4 value) {
    if (holds_channels())
        store_global(row + 4 * threadIdx.x, make_uint2(pack2(value.x, value.y), pack2(value.z, value.w)));
}

// Sums over the threads of a warp, of ROWS values at once: each step halves what a lane still has to add up, so that eight
// rows take 9 exchanges and not 40. Lane l ends up with the sum of row l / (32 / ROWS).
DEVICE float warp_sums(float (&values)[ROWS]) {
    const int lane = lane_index();
    int mask = WARP_LANES / 2;
#pragma unroll
    for (int half = ROWS / 2; half >= 1; half /= 2) {
        const bool upper = lane & mask;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float kept = upper ? values[i + half] : values[i];
            values[i] = kept + shuffle_xor(upper ? values[i] : values[i + half], mask);
        }
        mask /= 2;
    }
#pragma unroll
    for (mask = WARP_LANES / 2 / ROWS; mask >= 1; mask /= 2) values[0] += shuffle_xor(values[0], mask);
    return values[0];
}

// Replaces each thread's part of ROWS sums by the whole block's.
DEVICE void block_sums(float (&values)[ROWS], unsigned smem) {
    constexpr int LANES_OF_A_ROW = WARP_LANES / ROWS;
    const int lane = lane_index();
    const float own = warp_sums(values);
    if (lane % LANES_OF_A_ROW == 0) {
        store_shared<float>(smem + (warp_index() * ROWS + lane / LANES_OF_A_ROW) * 4, own);
    }
    sync_block();  // the sums of all warps are written
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += load_shared<float>(smem + (warp * ROWS + lane % ROWS) * 4);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) values[row] = shuffle(total, row);
}

// x = (x - mean) / sqrt(variance + epsilon) * gain + shift, row by row. Called once in a kernel.
DEVICE void layer_norm(float4 (&x)[ROWS], float4 gain, float4 shift, float epsilon) {
    constexpr float SHARE = 1.0f / DIM;
    float sums[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row) sums[row] = sum4(x[row]);
    block_sums(sums, shared_base());
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        const float mean = sums[row] * SHARE;
        x[row] = make_float4(x[row].x - mean, x[row].y - mean, x[row].z - mean, x[row].w - mean);
        const float squares = fused_multiply_add(x[row].x, x[row].x, x[row].y * x[row].y) +
                              fused_multiply_add(x[row].z, x[row].z, x[row].w * x[row].w);
        sums[row] = holds_channels() ? squares : 0.0f;
    }
    block_sums(sums, shared_base() + SUM_BYTES);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        x[row] = fma4(scale4(x[row], inverse_sqrt(fused_multiply_add(sums[row], SHARE, epsilon))), gain, shift);
    }
}
