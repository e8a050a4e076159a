// One row of the residual stream, written as the products that follow want it (linear_params.cuh): the row itself, its
// columns times the next norm's gain in 16 bits, and a sum of squares for each 16 columns.
#pragma once

#include "device.cuh"
#include "step_params.cuh"

DEVICE int sum_tiles(int columns) { return (columns + SUM_COLUMNS - 1) / SUM_COLUMNS; }

// Column `column` of a row, by all threads of a block at once (past the end too: the sums need whole warps).
DEVICE void write_residual(float* residual, Element* hidden, float* square_sums, int column, int columns, float value,
                           float gain) {
    const bool exists = column < columns;
    if (exists) {
        store_global<float>(residual + column, value);
        store_global<Element>(hidden + column, from_float(value * gain * NORM_SCALE));
    }
    float square = exists ? value * value : 0.0f;
#pragma unroll
    for (int mask = SUM_COLUMNS / 2; mask > 0; mask /= 2) square += shuffle_xor(square, mask);
    if (exists && column % SUM_COLUMNS == 0) store_global<float>(square_sums + column / SUM_COLUMNS, square);
}

// 1 / rms of a row, from its sums of squares; by each warp for itself.
DEVICE float inverse_rms(const float* square_sums, int columns, float inverse_width, float epsilon) {
    float sum = 0.0f;
    for (int i = lane_index(); i < sum_tiles(columns); i += WARP_LANES) {
        sum += load_global_fresh<float>(square_sums + i);
    }
#pragma unroll
    for (int mask = WARP_LANES / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return inverse_sqrt(fused_multiply_add(sum, inverse_width, epsilon));
}
