// What becomes of the products of a linear kernel: the norm's factor, the bias, and one of the ends of linear_params.cuh.
//
// The unit of all of it is a row of one 16-feature tile, which four neighbouring lanes share: lane t = lane % 4 has
// features 2t, 2t + 1 and 2t + 8, 2t + 9 (struct Share). So lie the accumulators of a matrix instruction that has rows
// on its long side, a gate and its channel of up meet in one lane, a sum of squares is two exchanges, and eight rows of
// a warp touch whole 32-byte sectors.
//
// The lanes of a warp call these functions together (finish_row, norm_factor: they exchange); `live` says whether a
// lane's row exists, and where it does not, nothing is read or written.
//
// Compile-time: END; NORM, whether there is a norm before the product; RAGGED, 0 where all columns come in whole fours:
// the features (of SwiGLU the channels) and the strides of output and residual are multiples of 4.
#pragma once

#include "device.cuh"
#include "linear_params.cuh"

#ifndef RAGGED
#define RAGGED 1
#endif

constexpr bool NEEDS_RESIDUAL = END == END_RESIDUAL || END == END_ADD;

struct Share {
    float2 low, high;
};

// ---------------------------------------------------------------------------------------------------------------
// Pairs of neighbours: one access where both exist and the address is aligned, which without RAGGED they always do and
// it always is, else one each. Arrays begin at multiples of 16 bytes. `left` counts the columns from the first of the
// pair to the end of the row; of none nothing is touched.

DEVICE bool is_whole(int count, long long offset, int left) {
    return !RAGGED || (left >= count && (offset & (count - 1)) == 0);
}

// Asked for where the call stands: FRESH is data of other kernels, else constants.
template <bool FRESH> DEVICE float2 load_pair(const float* array, long long offset, int left) {
    if (left <= 0) return make_float2(0.0f, 0.0f);
    if (is_whole(2, offset, left)) {
        return FRESH ? load_global_fresh<float2>(array + offset) : load_global<float2>(array + offset);
    }
    const float first = FRESH ? load_global_fresh<float>(array + offset) : load_global<float>(array + offset);
    if (left < 2) return make_float2(first, 0.0f);
    return make_float2(first,
                       FRESH ? load_global_fresh<float>(array + offset + 1) : load_global<float>(array + offset + 1));
}

DEVICE void store_pair(float* array, long long offset, int left, float2 value) {
    if (left <= 0) return;
    if (is_whole(2, offset, left)) {
        store_global<float2>(array + offset, value);
    } else {
        store_global<float>(array + offset, value.x);
        if (left >= 2) store_global<float>(array + offset + 1, value.y);
    }
}

DEVICE void store_pair(Element* array, long long offset, int left, unsigned word) {
    if (left <= 0) return;
    if (is_whole(2, offset, left)) {
        store_global<unsigned>(array + offset, word);
    } else {
        store_global<Element>(array + offset, static_cast<Element>(word & 0xffffu));
        if (left >= 2) store_global<Element>(array + offset + 1, static_cast<Element>(word >> 16));
    }
}

// 16 columns of a row, of which lane t has 2t, 2t + 1 (low) and 2t + 8, 2t + 9 (high). WIDE: neighbouring lanes first
// exchange words so that each has four columns in a row and a warp's one store fills sectors; costs an exchange.
template <bool WIDE>
DEVICE void store_columns(Element* array, long long row_offset, int column, int columns, bool live, unsigned low,
                          unsigned high) {
    const int t = lane_index() & 3;
    if (WIDE) {
        const bool odd = t & 1;
        const unsigned received = shuffle(odd ? low : high, lane_index() ^ 1);
        const int first = column + (odd ? 8 + 2 * (t - 1) : 2 * t);
        const uint2 words = odd ? make_uint2(received, high) : make_uint2(low, received);
        if (!live || first >= columns) return;
        if (is_whole(4, row_offset + first, columns - first)) {
            store_global<uint2>(array + row_offset + first, words);
        } else {
            store_pair(array, row_offset + first, columns - first, words.x);
            store_pair(array, row_offset + first + 2, columns - first - 2, words.y);
        }
    } else if (live) {
        const int first = column + 2 * t;
        store_pair(array, row_offset + first, columns - first, low);
        store_pair(array, row_offset + first + 8, columns - first - 8, high);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The norm before the product.

// Partial sums 4i to 4i + 3 of a row, zero where there are none.
DEVICE float4 load_square_sums(const LinearParams& params, int row, bool live, int i) {
    float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (!live || 4 * i >= params.sum_tiles) return sums;
    const float* first = params.square_sums + static_cast<long long>(row) * params.sum_tiles + 4 * i;
    if (params.sum_tiles % 4 == 0) return load_global_fresh<float4>(first);
    sums.x = load_global_fresh<float>(first);
    if (4 * i + 1 < params.sum_tiles) sums.y = load_global_fresh<float>(first + 1);
    if (4 * i + 2 < params.sum_tiles) sums.z = load_global_fresh<float>(first + 2);
    if (4 * i + 3 < params.sum_tiles) sums.w = load_global_fresh<float>(first + 3);
    return sums;
}

DEVICE float sum4(float4 v) { return (v.x + v.y) + (v.z + v.w); }

// Adds what the four lanes of a row have; all of them get the same bits.
DEVICE float sum_of_four_lanes(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}

// 1 / (NORM_SCALE * rms) from this lane's part of the row's sum of squares: lane t adds the fours t, t + 4, t + 8, ...
// in that order. All kernels add so, and a row's factor is the same in each.
DEVICE float factor_of_sum(const LinearParams& params, float partial) {
    const float mean = sum_of_four_lanes(partial) * params.inverse_width;
    return inverse_sqrt(mean + params.epsilon) * (1.0f / NORM_SCALE);
}

DEVICE float norm_factor(const LinearParams& params, int row, bool live) {
    float partial = 0.0f;
#pragma unroll 2
    for (int i = lane_index() & 3; 4 * i < params.sum_tiles; i += 4) {
        partial += sum4(load_square_sums(params, row, live, i));
    }
    return factor_of_sum(params, partial);
}

// ---------------------------------------------------------------------------------------------------------------
// The end.

// Constants of a lane's features; may be loaded before grid_dependency_wait.
struct Constants {
    Share bias, gain;

    DEVICE void load(const LinearParams& params, int tile) {
        const int feature = tile * TILE_FEATURES + 2 * (lane_index() & 3), left = params.features - feature;
        bias.low = bias.high = make_float2(0.0f, 0.0f);
        if (END != END_SWIGLU && params.bias != nullptr) {
            bias.low = load_pair<false>(params.bias, feature, left);
            bias.high = load_pair<false>(params.bias, feature + 8, left - 8);
        }
        if (END == END_RESIDUAL) {
            gain.low = load_pair<false>(params.next_gain, feature, left);
            gain.high = load_pair<false>(params.next_gain, feature + 8, left - 8);
        }
    }
};

// The residual stream of a lane's features, before this product; after grid_dependency_wait.
DEVICE Share load_residual(const LinearParams& params, int row, bool live, int tile) {
    const int feature = tile * TILE_FEATURES + 2 * (lane_index() & 3);
    const int left = live ? params.features - feature : 0;
    const long long offset = static_cast<long long>(row) * params.residual_stride + feature;
    return {load_pair<true>(params.residual, offset, left), load_pair<true>(params.residual, offset + 8, left - 8)};
}

DEVICE float2 scale_add(float2 value, float factor, float2 addend) {
    return make_float2(fused_multiply_add(value.x, factor, addend.x), fused_multiply_add(value.y, factor, addend.y));
}

DEVICE float silu(float x) { return x / (1.0f + exp2_fast(-1.4426950408889634f * x)); }

DEVICE float gelu(float x) { return 0.5f * x * (1.0f + error_function(0.70710678118654752f * x)); }

DEVICE float sum_of_squares(float2 v) { return fused_multiply_add(v.x, v.x, v.y * v.y); }

DEVICE unsigned pack_gained(float2 value, float2 gain) {
    return pack2(value.x * gain.x * NORM_SCALE, value.y * gain.y * NORM_SCALE);
}

// One row of TILES neighbouring tiles, from tile `first_tile` on. factor: 1 where there is no norm; residual: of
// load_residual, where the end needs one. WIDE: for kernels of many rows, see store_columns; TILES is even for
// END_SWIGLU then.
template <int TILES, bool WIDE>
DEVICE void finish_row(const LinearParams& params, int row, bool live, int first_tile, const Share (&product)[TILES],
                       float factor, const Constants (&constants)[TILES], const Share (&residual)[TILES]) {
    const int t = lane_index() & 3;
    const long long row_offset = static_cast<long long>(row) * params.output_stride;
    Element* elements = static_cast<Element*>(params.output);

    if constexpr (END == END_SWIGLU) {
        unsigned words[TILES];
        const int channels = params.features / 2;
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const float2 gate = product[i].low, up = product[i].high;
            words[i] = pack2(silu(gate.x * factor) * (up.x * factor), silu(gate.y * factor) * (up.y * factor));
        }
        if constexpr (WIDE) {
            static_assert(TILES % 2 == 0, "two tiles of gate and up fill a sector");
#pragma unroll
            for (int i = 0; i < TILES; i += 2) {
                store_columns<true>(elements, row_offset, (first_tile + i) * 8, channels, live, words[i], words[i + 1]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                const int channel = (first_tile + i) * 8 + 2 * t;
                if (live) store_pair(elements, row_offset + channel, channels - channel, words[i]);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const int column = (first_tile + i) * TILE_FEATURES, feature = column + 2 * t;
            float2 low = scale_add(product[i].low, factor, constants[i].bias.low);
            float2 high = scale_add(product[i].high, factor, constants[i].bias.high);
            if constexpr (NEEDS_RESIDUAL) {
                low = scale_add(low, 1.0f, residual[i].low);
                high = scale_add(high, 1.0f, residual[i].high);
            }
            if constexpr (END == END_STORE || END == END_ADD) {
                const int left = live ? params.features - feature : 0;
                store_pair(static_cast<float*>(params.output), row_offset + feature, left, low);
                store_pair(static_cast<float*>(params.output), row_offset + feature + 8, left - 8, high);
            }
            if constexpr (END == END_GELU) {
                store_columns<WIDE>(elements, row_offset, column, params.features, live, pack2(gelu(low.x), gelu(low.y)),
                                    pack2(gelu(high.x), gelu(high.y)));
            }
            if constexpr (END == END_RESIDUAL) {
                const long long offset = static_cast<long long>(row) * params.residual_stride + feature;
                const int left = live ? params.features - feature : 0;
                store_pair(params.residual, offset, left, low);
                store_pair(params.residual, offset + 8, left - 8, high);
                store_columns<WIDE>(elements, row_offset, column, params.features, live,
                                    pack_gained(low, constants[i].gain.low), pack_gained(high, constants[i].gain.high));
                const float sum = sum_of_four_lanes(sum_of_squares(low) + sum_of_squares(high));
                const int tiles = (params.features + TILE_FEATURES - 1) / TILE_FEATURES;
                if (live && t == 0 && first_tile + i < tiles) {
                    store_global<float>(params.next_square_sums + static_cast<long long>(row) * tiles + first_tile + i, sum);
                }
            }
        }
    }
}
