// y = x Wᵀ for few rows, with a fused end: latency is everything.
//
// A block owns FEATURE_TILES tiles of 16 features and 8 * COLUMNS rows; its warps divide the depth. Each lane has all its
// weights on their way to registers before it waits for the kernels before, so that what remains behind the wait is the
// latency of the activations, a few matrix products, one barrier and the end.
//
// The products have features on the long side (m16n8k16: 16 features x 8 rows). Each warp leaves its part of the sums in
// shared memory; warp u then adds those of unit u, 8 rows of one tile, in a fixed order, and finishes them. What a row
// becomes depends on DEPTH and WARPS alone, not on the other rows, COLUMNS, FEATURE_TILES or STAGED.
//
// Compile-time: DTYPE_FP16 or DTYPE_BF16; END; NORM; DEPTH, padded; WARPS; COLUMNS; FEATURE_TILES; STAGED, whether the
// activations come through shared memory (whole sectors; even COLUMNS) or straight to registers (COLUMNS 1 and 2); RAGGED.
// Launch (soprano_cupy/gpu/linear.py): grid (feature tiles / FEATURE_TILES, rows / (8 * COLUMNS)), 32 * WARPS threads.
#include "device.cuh"
#include "linear_params.cuh"
#include "linear_ends.cuh"

constexpr int THREADS = WARPS * WARP_LANES;
constexpr int FRAGMENTS = DEPTH / 16;
constexpr int HELD = (FRAGMENTS + WARPS - 1) / WARPS;  // of a warp: those from warp * HELD on
constexpr bool EVEN = FRAGMENTS % WARPS == 0;
constexpr int GROUPS = COLUMNS < 2 ? 1 : 2;  // of 8 rows whose activations a lane holds at once
constexpr int UNITS = FEATURE_TILES * COLUMNS;
constexpr int CHAINS = HELD >= 6 ? 3 : HELD >= 2 ? 2 : 1;  // of products that wait for one another
// Of a multiprocessor; as few as that, so that the compiler has registers for all loads to be under way at once.
constexpr int MIN_BLOCKS = WARPS >= 16 || HELD * FEATURE_TILES > 4 ? 1 : 3;
constexpr int SUM_FOURS = (DEPTH / TILE_FEATURES + 15) / 16;  // of the norm's partial sums, of one lane of four

static_assert(WARPS >= 4 && UNITS <= WARPS,
              "each unit has a warp of its own, and four chains of sums something to add");
static_assert(STAGED ? COLUMNS % 2 == 0 : COLUMNS <= 2, "16 rows at a time from shared memory; registers for as many");

// Shared memory, in bytes; soprano_cupy/gpu/linear.py counts the same. A staged row is an odd number of 16-byte pieces,
// so that 8 rows lie in different banks. A row of partial sums is 20 floats, for the same reason.
constexpr int ROW_PIECES = 2 * HELD + 1, ROW_BYTES = ROW_PIECES * 16;
constexpr int STAGED_BYTES = STAGED ? WARPS * 8 * COLUMNS * ROW_BYTES : 0;
constexpr int PARTIAL_ROW = 20, PARTIAL_BYTES = 8 * PARTIAL_ROW * 4;

// Whether fragment j of this warp exists.
DEVICE bool has_fragment(int j) { return EVEN || warp_index() * HELD + j < FRAGMENTS; }

// The activations of a warp's fragments: words of the right operand, for one or two groups of 8 rows.
struct Activations {
    unsigned words[GROUPS][HELD][2];

    // Straight from memory: a lane reads its pairs. pairs: the first of each group, null where the row does not exist.
    DEVICE void load(const Element* const (&pairs)[GROUPS]) {
#pragma unroll
        for (int c = 0; c < GROUPS; ++c) {
#pragma unroll
            for (int j = 0; j < HELD; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    words[c][j][half] = 0;
                    if (pairs[c] != nullptr && has_fragment(j)) {
                        words[c][j][half] = load_global_in_place<unsigned>(pairs[c] + 16 * j + 8 * half);
                    }
                }
            }
        }
    }

    // From shared memory: two groups from the row at `rows_smem` on.
    DEVICE void read(unsigned rows_smem) {
        const int lane = lane_index();
        const unsigned address = rows_smem + ((lane & 7) + (lane >> 4) * 8) * ROW_BYTES + ((lane >> 3) & 1) * 16;
#pragma unroll
        for (int j = 0; j < HELD; ++j) {
            unsigned four[4];
            load_matrix_x4(four, address + 32 * j);
            words[0][j][0] = four[0];
            words[0][j][1] = four[1];
            words[GROUPS - 1][j][0] = four[2];
            words[GROUPS - 1][j][1] = four[3];
        }
    }
};

// Where this lane's pairs of a group of rows begin; null where its row does not exist.
DEVICE const Element* first_pair(const LinearParams& params, int first_row) {
    const int lane = lane_index(), row = first_row + lane / 4;
    const Element* input = static_cast<const Element*>(params.input) + warp_index() * HELD * 16 + 2 * (lane & 3);
    return row < params.rows ? input + static_cast<long long>(row) * params.input_stride : nullptr;
}

// This warp's columns of all rows, on their way to its own part of shared memory.
DEVICE void stage_rows(const LinearParams& params, int first_row, unsigned staged_smem) {
    constexpr int PIECES = 8 * COLUMNS * 2 * HELD;
    const Element* input = static_cast<const Element*>(params.input) + warp_index() * HELD * 16;
#pragma unroll
    for (int i = 0; i < PIECES; i += WARP_LANES) {
        const int index = i + lane_index(), row = index / (2 * HELD), piece = index % (2 * HELD);
        if (PIECES % WARP_LANES != 0 && index >= PIECES) break;
        const Element* source = input + static_cast<long long>(first_row + row) * params.input_stride + 8 * piece;
        copy_async_16(staged_smem + row * ROW_BYTES + piece * 16, source,
                      first_row + row < params.rows && has_fragment(piece / 2));
    }
    copy_async_commit();
}

// What a unit needs besides its products, asked for as early as may be.
struct UnitInputs {
    Constants constants[1];
    Share residual[1];
    float4 square_sums[SUM_FOURS];
    int tile, row;
    bool live;
    EndPlace place;
    const float* sums;  // of the norm, this lane's first

    // A warp that has no unit asks for nothing. Addresses are made ready before the wait.
    DEVICE UnitInputs(const LinearParams& params, int unit, int first_row)
        : tile(blockIdx.x * FEATURE_TILES + unit / COLUMNS),
          row(first_row + unit % COLUMNS * 8 + lane_index() / 4),
          live(unit < UNITS && row < params.rows),
          place(params, row, live, tile) {
        place.elements = opaque_global(place.elements);
        place.floats = opaque_global(place.floats);
        if constexpr (NEEDS_RESIDUAL) place.residual = opaque_global(place.residual);
        if constexpr (END == END_RESIDUAL) place.next_sum = opaque_global(place.next_sum);
        sums = opaque_global(square_sums_of(params, row) + (lane_index() & 3) * 4);
        if (unit < UNITS) constants[0].load(params, tile);
    }
    DEVICE void load(const LinearParams& params) {
        if constexpr (NEEDS_RESIDUAL) residual[0] = place.load_residual(0);
        if constexpr (NORM) {
#pragma unroll
            for (int i = 0; i < SUM_FOURS; ++i) {
                const int tiles = RAGGED ? params.sum_tiles : DEPTH / TILE_FEATURES;
                square_sums[i] = load_square_sums(sums + 16 * i, live ? tiles - (lane_index() & 3) * 4 - 16 * i : 0);
            }
        }
    }
    DEVICE float factor(const LinearParams& params) const {
        if constexpr (!NORM) return 1.0f;
        float partial = 0.0f;
#pragma unroll
        for (int i = 0; i < SUM_FOURS; ++i) partial += sum4(square_sums[i]);
        return factor_of_sum(params, partial);
    }
};

// Where this lane leaves its first sum of a unit, and where it reads its share of one, from the unit's start on.
DEVICE unsigned partial_store_offset() { return ((lane_index() & 3) * 2 * PARTIAL_ROW + lane_index() / 4) * 4; }
DEVICE unsigned partial_load_offset() { return (lane_index() / 4 * PARTIAL_ROW + (lane_index() & 3) * 2) * 4; }

// Adds the chains of a warp's products and leaves them as rows of features. d: feature lane / 4 (and 8 more), rows
// 2 (lane % 4) and the next. address: of this lane.
DEVICE void store_partial(unsigned address, const float (&chains)[CHAINS][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float sum = chains[0][i];
#pragma unroll
        for (int chain = 1; chain < CHAINS; ++chain) sum += chains[chain][i];
        store_shared<float>(address + ((i & 1) * PARTIAL_ROW + 8 * (i / 2)) * 4, sum);
    }
}

// The products of a warp's fragments with one or two groups of rows. address: this lane's in the first tile and group.
DEVICE void multiply(const Activations& activations, const uint4 (&weights)[FEATURE_TILES][HELD], unsigned address) {
#pragma unroll
    for (int f = 0; f < FEATURE_TILES; ++f) {
#pragma unroll
        for (int c = 0; c < GROUPS; ++c) {
            float chains[CHAINS][4] = {};
#pragma unroll
            for (int j = 0; j < HELD; ++j) {
                const unsigned a[4] = {weights[f][j].x, weights[f][j].y, weights[f][j].z, weights[f][j].w};
                mma_16x8x16(chains[j % CHAINS], a, activations.words[c][j][0], activations.words[c][j][1]);
            }
            store_partial(address + (f * COLUMNS + c) * PARTIAL_BYTES, chains);
        }
    }
}

// A unit's products: the parts of all warps, added in four chains and those in pairs. address: this lane's.
DEVICE Share sum_partials(unsigned address) {
    Share sums[4];
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        const unsigned part = address + warp * UNITS * PARTIAL_BYTES;
        const Share share = {load_shared<float2>(part), load_shared<float2>(part + 32)};
        Share& sum = sums[warp % 4];
        sum = warp < 4 ? share : Share{add2(sum.low, share.low), add2(sum.high, share.high)};
    }
    return {add2(add2(sums[0].low, sums[1].low), add2(sums[2].low, sums[3].low)),
            add2(add2(sums[0].high, sums[1].high), add2(sums[2].high, sums[3].high))};
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    linear_rows(const __grid_constant__ LinearParams params) {
    grid_dependency_launch();
    const int warp = warp_index(), lane = lane_index(), first_row = blockIdx.y * 8 * COLUMNS;
    const int first_tile = blockIdx.x * FEATURE_TILES;
    const int tiles = (params.features + TILE_FEATURES - 1) / TILE_FEATURES;
    const unsigned smem = shared_base(), partials_smem = smem + STAGED_BYTES;
    const unsigned staged_smem = smem + warp * 8 * COLUMNS * ROW_BYTES;

    uint4 weights[FEATURE_TILES][HELD];
#pragma unroll
    for (int f = 0; f < FEATURE_TILES; ++f) {
        const uint4* packed = static_cast<const uint4*>(params.weights) +
                              (static_cast<long long>(first_tile + f) * FRAGMENTS + warp * HELD) * WARP_LANES + lane;
#pragma unroll
        for (int j = 0; j < HELD; ++j) {
            weights[f][j] = make_uint4(0u, 0u, 0u, 0u);
            if (first_tile + f < tiles && has_fragment(j)) weights[f][j] = load_global_once(packed + j * WARP_LANES);
        }
    }
    UnitInputs inputs(params, warp, first_row);
    const Element* pairs[GROUPS];
#pragma unroll
    for (int c = 0; c < GROUPS; ++c) pairs[c] = opaque_global(first_pair(params, first_row + 8 * c));
    const unsigned stored_smem = opaque(partials_smem + warp * UNITS * PARTIAL_BYTES + partial_store_offset());
    const unsigned summed_smem = opaque(partials_smem + warp * PARTIAL_BYTES + partial_load_offset());

    grid_dependency_wait();  // the activations, sums and residual stream of the kernels before are written

    inputs.load(params);  // first, as the compiler would else put it behind the products
    Activations activations;
    if constexpr (STAGED) {
        stage_rows(params, first_row, staged_smem);
    } else {
        activations.load(pairs);
    }
    if constexpr (STAGED) {
        copy_async_wait<0>();
        sync_warp();  // the warp's activations are there
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c += GROUPS) {
        if constexpr (STAGED) activations.read(staged_smem + 8 * c * ROW_BYTES);
        multiply(activations, weights, stored_smem + c * PARTIAL_BYTES);
    }
    const float factor = inputs.factor(params);
    sync_block();  // all parts of the sums are written
    if (warp >= UNITS) return;
    const Share product[1] = {sum_partials(summed_smem)};
    finish_row<1, false>(inputs.place, product, factor, inputs.constants, inputs.residual);
}
