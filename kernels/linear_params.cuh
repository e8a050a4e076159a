// The one argument of every linear kernel, by value: y = x Wᵀ and a fused end. soprano_cupy/gpu/linear.py packs it.
//
// Rows are tokens or frames, `features` are the outputs of a row, `depth` is what is summed over.
//
// Weights are packed once, at load, in the order in which a warp's matrix instruction (m16n8k16) holds its left operand:
// uint4 packed[features / 16][depth / 16][32], features padded to 16 and depth to 64 with zeros. With g = lane / 4 and
// t = lane % 4, a lane's four words are W[g][2t, 2t+1], W[g + 8][2t, 2t+1], W[g][2t + 8, 2t + 9] and
// W[g + 8][2t + 8, 2t + 9] of its 16 x 16 tile, the lower index in the lower half. So any kernel, in any tile shape,
// reads whole 512-byte runs, and the same copy serves one voice and a thousand.
//
// The RMS norm before a product is not a pass of its own. Whoever writes the residual stream also writes
// input = residual * gain * NORM_SCALE in 16 bits and, for each 16 columns, the sum of squares of the residual; the
// product of the input is then multiplied by 1 / (NORM_SCALE * rms) of its row.
#pragma once

constexpr int TILE_FEATURES = 16;  // of one packed tile, and columns of one partial sum of squares
constexpr int DEPTH_STEP = 64;     // depth is padded to a multiple of this

// What happens to a product p[row][feature] (after the norm's factor and the bias, where there are such).
constexpr int END_STORE = 0;     // output (float) = p
constexpr int END_SWIGLU = 1;    // output (Element, features / 2 columns) = silu(gate) * up; of each 16 packed features
                                 // the first 8 are gate channels 8n..8n+7, the last 8 the same channels of up
constexpr int END_RESIDUAL = 2;  // s = residual + p; residual = s; output (Element) = s * next_gain * NORM_SCALE;
                                 // next_square_sums[row][feature / 16] = sum of s * s over the 16 features
constexpr int END_GELU = 3;      // output (Element) = exact (erf) GELU of p
constexpr int END_ADD = 4;       // output (float) = residual + p; the two may be the same array

struct LinearParams {
    const void* weights;       // packed, see above
    const void* input;         // (rows, depth) Element, row stride input_stride; columns beyond the true depth are 0
    const float* bias;         // (features,) or null
    const float* square_sums;  // (rows, sum_tiles) of the norm before this product, or null: no norm
    float* residual;           // (rows, features) float, row stride residual_stride; END_RESIDUAL and END_ADD
    const float* next_gain;    // (features,) of the norm after this product; END_RESIDUAL
    float* next_square_sums;   // (rows, ceil(features / 16)); END_RESIDUAL
    void* output;              // row stride output_stride

    int rows;
    int features;  // true count; of END_SWIGLU gate and up together
    int depth;     // padded to DEPTH_STEP
    int sum_tiles;
    int input_stride, residual_stride, output_stride;  // elements
    float inverse_width;                               // 1 / columns of the norm before, the true count
    float epsilon;                                     // of that norm
    int reserved;
};
