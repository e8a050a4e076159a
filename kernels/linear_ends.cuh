// What becomes of the products of a linear kernel: the norm's factor, the bias, and one of the ends of linear_params.cuh.
//
// The unit of all of it is a row of one 16-feature tile, which four neighbouring lanes share: lane t = lane % 4 has
// features 2t, 2t + 1 and 2t + 8, 2t + 9 (struct Share). So lie the accumulators of a matrix instruction that has rows
// on its long side, a gate and its channel of up meet in one lane, a sum of squares is two exchanges, and eight rows of
// a warp touch whole 32-byte sectors.
//
// The lanes of a warp call these functions together (finish_row, norm_factor: they exchange); `live` says whether a
// lane's row exists, and where it does not, nothing is read or written. Arrays begin at multiples of 16 bytes.
//
// Compile-time: END; NORM, whether there is a norm before the product; RAGGED, 0 where all columns come in whole fours:
// the features (of SwiGLU the channels) and the strides of output and residual are multiples of 4, and the norm is that
// of the whole padded depth.
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
// it always is, else one each. `left` counts the columns from the first of the pair to the end of the row; of none
// nothing is touched.

DEVICE bool is_whole(const void* address, int bytes, int left, int count) {
    return !RAGGED || (left >= count && (reinterpret_cast<unsigned long long>(address) & (bytes - 1)) == 0);
}

// Asked for where the call stands.
DEVICE float2 load_pair(const float* pair, int left) {
    if (left <= 0) return make_float2(0.0f, 0.0f);
    if (is_whole(pair, 8, left, 2)) return load_global_in_place<float2>(pair);
    const float first = load_global_in_place<float>(pair);
    return make_float2(first, left < 2 ? 0.0f : load_global_in_place<float>(pair + 1));
}

DEVICE void store_pair(float* pair, int left, float2 value) {
    if (left <= 0) return;
    if (is_whole(pair, 8, left, 2)) {
        store_global<float2>(pair, value);
    } else {
        store_global<float>(pair, value.x);
        if (left >= 2) store_global<float>(pair + 1, value.y);
    }
}

DEVICE void store_pair(Element* pair, int left, unsigned word) {
    if (left <= 0) return;
    if (is_whole(pair, 4, left, 2)) {
        store_global<unsigned>(pair, word);
    } else {
        store_global<Element>(pair, static_cast<Element>(word & 0xffffu));
        if (left >= 2) store_global<Element>(pair + 1, static_cast<Element>(word >> 16));
    }
}

// 16 columns of a row, of which lane t has 2t, 2t + 1 (low, at `pair`) and 2t + 8, 2t + 9 (high). WIDE: neighbouring
// lanes first exchange words so that each has four columns in a row and a warp's one store fills sectors.
template <bool WIDE> DEVICE void store_columns(Element* pair, int left, unsigned low, unsigned high) {
    if (WIDE) {
        const bool odd = lane_index() & 1;
        const unsigned received = shuffle(odd ? low : high, lane_index() ^ 1);
        const uint2 words = odd ? make_uint2(received, high) : make_uint2(low, received);
        if (odd) {  // columns 8 + 2 (t - 1) to 11 + 2 (t - 1)
            pair += 6;
            left -= 6;
        }
        if (left <= 0) return;
        if (is_whole(pair, 8, left, 4)) {
            store_global<uint2>(pair, words);
        } else {
            store_pair(pair, left, words.x);
            store_pair(pair + 2, left - 2, words.y);
        }
    } else {
        store_pair(pair, left, low);
        store_pair(pair + 8, left - 8, high);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The norm before the product.

// A row's partial sums.
DEVICE const float* square_sums_of(const LinearParams& params, int row) {
    return params.square_sums + static_cast<long long>(row) * params.sum_tiles;
}

// Four of them, of which `left` are the row's, the others zero. Without RAGGED all four are, or none.
DEVICE float4 load_square_sums(const float* sums, int left) {
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (left <= 0) return four;
    if (!RAGGED) return load_global_in_place<float4>(sums);
    four.x = load_global_in_place<float>(sums);
    if (left > 1) four.y = load_global_in_place<float>(sums + 1);
    if (left > 2) four.z = load_global_in_place<float>(sums + 2);
    if (left > 3) four.w = load_global_in_place<float>(sums + 3);
    return four;
}

// Those 4i to 4i + 3 of a row.
DEVICE float4 load_square_sums(const LinearParams& params, int row, bool live, int i) {
    return load_square_sums(square_sums_of(params, row) + 4 * i, live ? params.sum_tiles - 4 * i : 0);
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

// Where a lane's share of a row of a tile, and of the tiles after it, lies in the arrays of the end.
struct EndPlace {
    static constexpr int TILE_COLUMNS = END == END_SWIGLU ? TILE_FEATURES / 2 : TILE_FEATURES;  // of the output

    Element* elements;  // the output, whichever type it has
    float* floats;
    float* residual;
    float* next_sum;
    int left;   // columns of the output from the lane's first one on; none where the row does not exist
    int tiles;  // from the first one on; none where the row does not exist or another lane stores their sums

    DEVICE EndPlace(const LinearParams& params, int row, bool live, int tile) {
        const int t = lane_index() & 3, column = tile * TILE_COLUMNS + 2 * t;
        const int columns = END == END_SWIGLU ? params.features / 2 : params.features;
        const long long output = static_cast<long long>(row) * params.output_stride + column;
        elements = static_cast<Element*>(params.output) + output;
        floats = static_cast<float*>(params.output) + output;
        left = live ? columns - column : 0;
        if constexpr (NEEDS_RESIDUAL) {
            residual = params.residual + static_cast<long long>(row) * params.residual_stride + column;
        }
        if constexpr (END == END_RESIDUAL) {
            const int all = (params.features + TILE_FEATURES - 1) / TILE_FEATURES;
            next_sum = params.next_square_sums + static_cast<long long>(row) * all + tile;
            tiles = live && t == 0 ? all - tile : 0;
        }
    }

    // The residual stream before this product, of the tile `i` further on; after grid_dependency_wait.
    DEVICE Share load_residual(int i) const {
        const int here = i * TILE_FEATURES;
        return {load_pair(residual + here, left - here), load_pair(residual + here + 8, left - here - 8)};
    }
};

// Constants of a lane's features; may be loaded before grid_dependency_wait.
struct Constants {
    Share bias, gain;

    DEVICE void load(const LinearParams& params, int tile) {
        const int feature = tile * TILE_FEATURES + 2 * (lane_index() & 3), left = params.features - feature;
        bias.low = bias.high = make_float2(0.0f, 0.0f);
        if (END != END_SWIGLU && params.bias != nullptr) {
            bias.low = load_pair(params.bias + feature, left);
            bias.high = load_pair(params.bias + feature + 8, left - 8);
        }
        if (END == END_RESIDUAL) {
            gain.low = load_pair(params.next_gain + feature, left);
            gain.high = load_pair(params.next_gain + feature + 8, left - 8);
        }
    }
};

DEVICE float2 add2(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }

DEVICE float2 scale_add(float2 value, float factor, float2 addend) {
    return make_float2(fused_multiply_add(value.x, factor, addend.x), fused_multiply_add(value.y, factor, addend.y));
}

DEVICE float silu(float x) { return x * reciprocal_fast(1.0f + exp2_fast(-1.4426950408889634f * x)); }

DEVICE float gelu(float x) { return 0.5f * x * (1.0f + error_function(0.70710678118654752f * x)); }

DEVICE float sum_of_squares(float2 v) { return fused_multiply_add(v.x, v.x, v.y * v.y); }

DEVICE unsigned pack_gained(float2 value, float2 gain) {
    return pack2(value.x * gain.x * NORM_SCALE, value.y * gain.y * NORM_SCALE);
}

// TILES neighbouring tiles of gate and up.
template <int TILES, bool WIDE>
DEVICE void finish_gated(const EndPlace& place, const Share (&product)[TILES], float factor) {
    unsigned words[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const float2 gate = product[i].low, up = product[i].high;
        words[i] = pack2(silu(gate.x * factor) * (up.x * factor), silu(gate.y * factor) * (up.y * factor));
    }
    static_assert(!WIDE || TILES % 2 == 0, "two tiles of gate and up fill a sector");
#pragma unroll
    for (int i = 0; i < TILES; i += WIDE ? 2 : 1) {
        const int here = i * EndPlace::TILE_COLUMNS;
        if constexpr (WIDE) {
            store_columns<true>(place.elements + here, place.left - here, words[i], words[i + 1]);
        } else {
            store_pair(place.elements + here, place.left - here, words[i]);
        }
    }
}

// One row of TILES neighbouring tiles, from that of `place` on. factor: 1 where there is no norm; residual: of
// EndPlace::load_residual, where the end needs one. WIDE: for kernels of many rows, see store_columns; costs an exchange.
template <int TILES, bool WIDE>
DEVICE void finish_row(const EndPlace& place, const Share (&product)[TILES], float factor,
                       const Constants (&constants)[TILES], const Share (&residual)[TILES]) {
    if constexpr (END == END_SWIGLU) {
        finish_gated<TILES, WIDE>(place, product, factor);
    } else {
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const int here = i * TILE_FEATURES, left = place.left - here;
            float2 low = scale_add(product[i].low, factor, constants[i].bias.low);
            float2 high = scale_add(product[i].high, factor, constants[i].bias.high);
            if constexpr (NEEDS_RESIDUAL) {
                low = add2(low, residual[i].low);
                high = add2(high, residual[i].high);
            }
            if constexpr (END == END_STORE || END == END_ADD) {
                store_pair(place.floats + here, left, low);
                store_pair(place.floats + here + 8, left - 8, high);
            }
            if constexpr (END == END_GELU) {
                store_columns<WIDE>(place.elements + here, left, pack2(gelu(low.x), gelu(low.y)),
                                    pack2(gelu(high.x), gelu(high.y)));
            }
            if constexpr (END == END_RESIDUAL) {
                store_pair(place.residual + here, left, low);
                store_pair(place.residual + here + 8, left - 8, high);
                store_columns<WIDE>(place.elements + here, left, pack_gained(low, constants[i].gain.low),
                                    pack_gained(high, constants[i].gain.high));
                const float sum = sum_of_four_lanes(sum_of_squares(low) + sum_of_squares(high));
                if (i < place.tiles) store_global<float>(place.next_sum + i, sum);
            }
        }
    }
}
