// The ends of the Hopper linear kernel: from accumulators, whose lanes hold features of many rows, to rows of features.
//
// Accumulators of lane 4 g + t, for the n-th 16-feature tile of its warp: d[n][4 j + 2 i + e] is feature g + 8 i of row
// 8 j + 2 t + e. Float outputs pass through shared memory a warp at a time, 16-bit ones a warpgroup at a time.
#pragma once

#include "device.cuh"
#include "linear_params.cuh"
#include "linear_ends.cuh"
#include "linear_hopper_products.cuh"
#include "linear_hopper_tiles.cuh"

constexpr bool FLOAT_STAGING = END == END_STORE || END == END_ADD || END == END_RESIDUAL;

// Where a warp's and a warpgroup's part of a tile begins.
struct Place {
    int warp_feature, warpgroup_feature, row;
};

__device__ __forceinline__ float value_at(const float* values, int index, int count) {
    return values && index < count ? load_global<float>(values + index) : 0.0f;
}

__device__ __forceinline__ void load_four(float (&out)[4], const float* values, int index, int count) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out[e] = value_at(values, index + e, count);
}

// ---- float rows: STORE, ADD, RESIDUAL ----
//
// Through a warp's own CHUNK_ROWS rows of 16 floats and 4 of padding: writing, lanes of one t meet the banks 8 t + g (+ 16 i); reading
// 16 bytes a lane, eight lanes take rows r and r + 4, whose banks lie 16 apart. So neither meets a conflict.

constexpr int CHUNK_ROWS = END_ROWS < 32 ? END_ROWS : 32;
constexpr int CHUNK_EIGHTS = CHUNK_ROWS / 8;
constexpr int CHUNKS = END_ROWS / CHUNK_ROWS;
constexpr int STAGED_ROW_BYTES = 80;
constexpr u32 WARP_STAGING_BYTES = CHUNK_ROWS * STAGED_ROW_BYTES;
constexpr int PARTS = PRODUCTS * CHUNKS;  // a part: 16 features of CHUNK_ROWS rows
// Parts of the residual requested before the main loop, or else at its end, and how many at once: what registers allow.
constexpr bool AHEAD_OF_PRODUCTS = PRODUCTS * ACCUMULATORS <= 64;
constexpr bool WHOLE_AHEAD = AHEAD_OF_PRODUCTS && PRODUCTS == 1 && CONSUMERS < 3;
constexpr int PARTS_AHEAD = WHOLE_AHEAD ? PARTS : !AHEAD_OF_PRODUCTS || CONSUMERS > 2 ? 1 : 2;
constexpr int EIGHTS_AT_ONCE = AHEAD_OF_PRODUCTS || CHUNK_EIGHTS < 2 ? CHUNK_EIGHTS : 2;
static_assert(4 * WARP_STAGING_BYTES <= STAGING_BYTES, "four warps share a staging area");

struct FloatEnd {
    float bias[PRODUCTS][4];
    float gain[PRODUCTS][4];
    float4 residual[PARTS_AHEAD][CHUNK_EIGHTS];
    int read_row, column;  // of a lane in 8 rows of 16 features

    __device__ __forceinline__ FloatEnd(const LinearParams& p, const Place& place) {
        const int lane = threadIdx.x % 32;
        read_row = lane / 8 + 4 * (lane / 4 % 2);
        column = 4 * (lane % 4);
        if constexpr (AHEAD_OF_PRODUCTS) {
#pragma unroll
            for (int n = 0; n < PRODUCTS; ++n) load_vectors(p, place, n);
            request_first(p, place);
        }
    }

    __device__ __forceinline__ void load_vectors(const LinearParams& p, const Place& place, int n) {
        const int feature = place.warp_feature + n * TILE_FEATURES + column;
        load_four(bias[n], p.bias, feature, p.features);
        if (END == END_RESIDUAL) load_four(gain[n], p.next_gain, feature, p.features);
    }

    // The residual of a part; lanes outside the array read some row inside it.
    __device__ __forceinline__ void request(const LinearParams& p, const Place& place, int part) {
        if (!NEEDS_RESIDUAL) return;
        const int feature = place.warp_feature + part % PRODUCTS * TILE_FEATURES + column;
        const float* source = p.residual + (feature < p.features ? feature : 0);
        const int first_row = opaque(place.row + part / PRODUCTS * CHUNK_ROWS + read_row);  // not kept for write_row
#pragma unroll
        for (int k = 0; k < CHUNK_EIGHTS; ++k) {
            const int row = min(first_row + 8 * k, p.rows - 1);
            residual[part % PARTS_AHEAD][k] = load_ahead(source + static_cast<long long>(row) * p.residual_stride);
        }
    }
    __device__ __forceinline__ void request_first(const LinearParams& p, const Place& place) {
#pragma unroll
        for (int part = 0; part < PARTS_AHEAD; ++part) request(p, place, part);
    }

    __device__ __forceinline__ void finish(const LinearParams& p, const Place& place, u32 staging, u32 factors, int,
                                           const float (&d)[PRODUCTS][END_ACCUMULATORS]) {
        const int lane = threadIdx.x % 32;
        const u32 area = staging + threadIdx.x % WARPGROUP / 32 * WARP_STAGING_BYTES;
        const u32 write = area + 2 * (lane % 4) * STAGED_ROW_BYTES + lane / 4 * 4;
        const u32 read = area + read_row * STAGED_ROW_BYTES + column * 4;
        if (!AHEAD_OF_PRODUCTS) request_first(p, place);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int n = part % PRODUCTS, chunk = part / PRODUCTS;
            if (!AHEAD_OF_PRODUCTS && chunk == 0) load_vectors(p, place, n);
            __syncwarp();  // the part before is read
#pragma unroll
            for (int j = 0; j < CHUNK_EIGHTS; ++j)
#pragma unroll
                for (int v = 0; v < 4; ++v)
                    store_shared<float>(write + (8 * j + v % 2) * STAGED_ROW_BYTES + v / 2 * 32,
                                        d[n][4 * (CHUNK_EIGHTS * chunk + j) + v]);
            __syncwarp();
            // EIGHTS_AT_ONCE rows of a lane at every stage of the way, so that one's latency hides the others'.
#pragma unroll
            for (int first = 0; first < CHUNK_EIGHTS; first += EIGHTS_AT_ONCE) {
                const int chunk_row = 8 * first + read_row;
                float value[EIGHTS_AT_ONCE][4];
#pragma unroll
                for (int k = 0; k < EIGHTS_AT_ONCE; ++k) {
                    const float4 sums = load_shared<float4>(read + 8 * (first + k) * STAGED_ROW_BYTES);
                    const u32 of_row = factors + 4 * (chunk * CHUNK_ROWS + chunk_row + 8 * k);
                    const float factor = NORM ? load_shared<float>(of_row) : 1.0f;
                    const float4 before =
                        NEEDS_RESIDUAL ? residual[part % PARTS_AHEAD][first + k] : make_float4(0, 0, 0, 0);
                    value[k][0] = fmaf(sums.x, factor, bias[n][0]) + before.x;
                    value[k][1] = fmaf(sums.y, factor, bias[n][1]) + before.y;
                    value[k][2] = fmaf(sums.z, factor, bias[n][2]) + before.z;
                    value[k][3] = fmaf(sums.w, factor, bias[n][3]) + before.w;
                }
                if (first + EIGHTS_AT_ONCE == CHUNK_EIGHTS && part + PARTS_AHEAD < PARTS)
                    request(p, place, part + PARTS_AHEAD);
                write_rows(p, opaque(place.row + chunk * CHUNK_ROWS + chunk_row),
                           opaque(place.warp_feature + n * TILE_FEATURES + column), gain[n], value);
            }
        }
    }

    // Four features of the rows `first_row` + 8 k; the four lanes of a quad hold 16 neighbours.
    __device__ __forceinline__ void write_rows(const LinearParams& p, int first_row, int feature,
                                               const float (&next_gain)[4], float (&value)[EIGHTS_AT_ONCE][4]) const {
        const int left = feature >= p.features ? 0 : RAGGED ? p.features - feature : 4;
        if (END == END_RESIDUAL) {
            float squares[EIGHTS_AT_ONCE];
#pragma unroll
            for (int k = 0; k < EIGHTS_AT_ONCE; ++k) {
                squares[k] = 0.0f;
#pragma unroll
                for (int e = 0; e < 4; ++e) {  // what lies behind the features is not of this stream
                    if (e >= left || first_row + 8 * k >= p.rows) value[k][e] = 0.0f;
                    squares[k] = fmaf(value[k][e], value[k][e], squares[k]);
                }
            }
#pragma unroll
            for (int k = 0; k < EIGHTS_AT_ONCE; ++k) squares[k] += shuffle_xor(squares[k], 1);
#pragma unroll
            for (int k = 0; k < EIGHTS_AT_ONCE; ++k) squares[k] += shuffle_xor(squares[k], 2);
            const int tiles = (p.features + TILE_FEATURES - 1) / TILE_FEATURES;
            const long long first = first_row;
            float* sums = p.next_square_sums + first * tiles + feature / TILE_FEATURES;
            Element* out = static_cast<Element*>(p.output) + first * p.output_stride + feature;
            float* stream = p.residual + first * p.residual_stride + feature;
#pragma unroll
            for (int k = 0; k < EIGHTS_AT_ONCE; ++k) {
                if (left <= 0 || first_row + 8 * k >= p.rows) return;
                if (threadIdx.x % 4 == 0) store_global<float>(sums, squares[k]);
                float scaled[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) scaled[e] = value[k][e] * next_gain[e] * NORM_SCALE;
                store_elements(out, scaled, left);
                store_floats(stream, value[k], left, 4);
                sums += 8 * tiles;
                out += 8 * p.output_stride;
                stream += 8 * p.residual_stride;
            }
        } else {
            const int alignment = !RAGGED || p.output_stride % 4 == 0 ? 4 : p.output_stride % 2 == 0 ? 2 : 1;
            float* out = static_cast<float*>(p.output) + static_cast<long long>(first_row) * p.output_stride + feature;
#pragma unroll
            for (int k = 0; k < EIGHTS_AT_ONCE; ++k) {
                if (left <= 0 || first_row + 8 * k >= p.rows) return;
                store_floats(out, value[k], left, alignment);
                out += 8 * p.output_stride;
            }
        }
    }

    __device__ __forceinline__ static void store_elements(Element* out, const float (&value)[4], int count) {
        if (count >= 4) {
            store_global<uint2>(out, make_uint2(pack2(value[0], value[1]), pack2(value[2], value[3])));
        } else {
#pragma unroll
            for (int e = 0; e < 3; ++e)
                if (e < count) out[e] = from_float(value[e]);
        }
    }

    // `alignment`: how many floats the address is a multiple of.
    __device__ __forceinline__ static void store_floats(float* out, const float (&value)[4], int count, int alignment) {
        if (count >= 4 && alignment == 4) {
            store_global<float4>(out, make_float4(value[0], value[1], value[2], value[3]));
        } else if (count >= 4 && alignment == 2) {
            store_global<float2>(out, make_float2(value[0], value[1]));
            store_global<float2>(out + 2, make_float2(value[2], value[3]));
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (e < count) out[e] = value[e];
        }
    }
};

// ---- 16-bit rows: GELU, SWIGLU ----
//
// Through a warpgroup's rows of COLUMNS elements, transposed on the way in by stmatrix. 16-byte chunks are permuted so that
// the 8 rows of a matrix lie in different banks, and so do the neighbouring chunks that 8 lanes read.

constexpr int COLUMNS = WARPGROUP_FEATURES / (END == END_SWIGLU ? 2 : 1);
constexpr int CHUNKS_A_ROW = COLUMNS / 8;
constexpr int STAGED_ROWS = (8192 / (2 * COLUMNS) < END_ROWS) ? 8192 / (2 * COLUMNS) : END_ROWS;
constexpr int ROUNDS = (END_ROWS + STAGED_ROWS - 1) / STAGED_ROWS;
constexpr int MATRICES_ROWS = END == END_SWIGLU ? 32 : 16;  // rows that one stmatrix of four matrices covers
static_assert(FLOAT_STAGING || (STAGED_ROWS % MATRICES_ROWS == 0 && END_ROWS % MATRICES_ROWS == 0),
              "whole matrices in every round");

__device__ __forceinline__ constexpr u32 staged_chunk(int row, int chunk) {
    if (CHUNKS_A_ROW == 4) return row / 2 * 128 + ((row % 2 * 4 + (chunk ^ (row / 2 & 3))) << 4);
    return row * CHUNKS_A_ROW * 16 + ((chunk ^ (row & 7)) << 4);
}

// x Phi(x) = max(x, 0) - |x| Q(|x|), where Q(x) = erfc(x / sqrt 2) / 2 = (b1 t + ... + b5 t^5) exp(-x^2 / 2) with
// t = 1 / (1 + c x), to 7.5e-8 (Abramowitz and Stegun, 26.2.17); |x| Q stays small where the result is. No branches.
__device__ __forceinline__ float gelu_fast(float x) {
    const float size = fabsf(x), t = reciprocal(fmaf(0.2316419f, size, 1.0f));
    float sum = 1.330274429f;
    sum = fmaf(sum, t, -1.821255978f);
    sum = fmaf(sum, t, 1.781477937f);
    sum = fmaf(sum, t, -0.356563782f);
    sum = fmaf(sum, t, 0.319381530f);
    // exp(-x^2 / 2) / sqrt(2 pi) as a power of two
    const float density = exp2_fast(fmaf(size * -0.72134752044448170f, size, -1.3257480647361593f));
    return fmaf(-size * t, sum * density, fmaxf(x, 0.0f));
}

__device__ __forceinline__ float silu_fast(float x) {
    return x * reciprocal(1.0f + exp2_fast(-1.44269504088896341f * x));
}

struct ElementEnd {
    float bias[PRODUCTS][2];

    __device__ __forceinline__ ElementEnd(const LinearParams& p, const Place& place) {
#pragma unroll
        for (int n = 0; n < PRODUCTS; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                bias[n][i] =
                    value_at(p.bias, place.warp_feature + n * TILE_FEATURES + threadIdx.x % 32 / 4 + 8 * i, p.features);
    }

    // Outputs of a lane at rows 8 j + 2 t and the next: of feature g + 8 i (GELU), or of gate g and up g (SWIGLU).
    __device__ __forceinline__ u32 pair(const float (&d)[END_ACCUMULATORS], int n, int j, int i, float2 factor) const {
        const int at = 4 * j + 2 * i;
        if (END == END_GELU)
            return pack2(gelu_fast(fmaf(d[at], factor.x, bias[n][i])),
                         gelu_fast(fmaf(d[at + 1], factor.y, bias[n][i])));
        const float first = silu_fast(fmaf(d[at], factor.x, bias[n][0])) * fmaf(d[at + 2], factor.x, bias[n][1]);
        const float second = silu_fast(fmaf(d[at + 1], factor.y, bias[n][0])) * fmaf(d[at + 3], factor.y, bias[n][1]);
        return pack2(first, second);
    }

    __device__ __forceinline__ void finish(const LinearParams& p, const Place& place, u32 staging, u32 factors,
                                           int barrier, const float (&d)[PRODUCTS][END_ACCUMULATORS]) {
        const int thread = threadIdx.x % WARPGROUP, warp = thread / 32, lane = thread % 32;
        const int matrix = lane / 8, matrix_row = lane % 8;
        const int columns = p.features / (END == END_SWIGLU ? 2 : 1);  // of the output
        const int first_column = place.warpgroup_feature / (END == END_SWIGLU ? 2 : 1);
        auto factor_of = [&](int j) {
            return NORM ? load_shared<float2>(factors + 4 * (8 * j + 2 * (lane % 4))) : make_float2(1.0f, 1.0f);
        };
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            named_barrier_sync(barrier, WARPGROUP);  // the rows before are read
#pragma unroll
            for (int rows = 0; rows < STAGED_ROWS; rows += MATRICES_ROWS) {
                const int j = (round * STAGED_ROWS + rows) / 8;
                if (8 * j >= END_ROWS) break;
#pragma unroll
                for (int n = 0; n < PRODUCTS; ++n) {
                    const int tile = warp * PRODUCTS + n;
                    u32 words[4];
#pragma unroll
                    for (int m = 0; m < 4; ++m) {
                        const int at = END == END_SWIGLU ? j + m : j + m / 2;
                        words[m] = pair(d[n], n, at, END == END_SWIGLU ? 0 : m % 2, factor_of(at));
                    }
                    const int row = rows + (END == END_SWIGLU ? matrix : matrix / 2) * 8 + matrix_row;
                    const int chunk = END == END_SWIGLU ? tile : 2 * tile + matrix % 2;
                    store_matrix_x4_trans(staging + staged_chunk(row, chunk), words[0], words[1], words[2], words[3]);
                }
            }
            named_barrier_sync(barrier, WARPGROUP);  // the rows are there
#pragma unroll
            for (int k = 0; k < STAGED_ROWS * CHUNKS_A_ROW / WARPGROUP; ++k) {
                const int unit = k * WARPGROUP + thread, chunk = unit % CHUNKS_A_ROW, row = unit / CHUNKS_A_ROW;
                const int tile_row = round * STAGED_ROWS + row, column = first_column + 8 * chunk;
                const uint4 words = load_shared<uint4>(staging + staged_chunk(row, chunk));
                if (tile_row >= END_ROWS || place.row + tile_row >= p.rows) continue;
                write_chunk(p, place.row + tile_row, column, columns - column, words);
            }
        }
    }

    // Eight columns of a row, or as many as there are.
    __device__ __forceinline__ static void write_chunk(const LinearParams& p, int row, int column, int count,
                                                       uint4 words) {
        Element* out = static_cast<Element*>(p.output) + static_cast<long long>(row) * p.output_stride + column;
        if (count >= 8) {
            store_global<uint4>(out, words);
        } else {
            const u32 parts[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int e = 0; e < 7; ++e)
                if (e < count) out[e] = static_cast<Element>(parts[e / 2] >> (e % 2 * 16));
        }
    }
};

template <bool FLOATS> struct EndOf {
    using Type = FloatEnd;
};
template <> struct EndOf<false> {
    using Type = ElementEnd;
};
using End = EndOf<FLOAT_STAGING>::Type;
